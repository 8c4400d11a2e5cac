"""A stage at its site, as one function of tensors: group, score, select, merge, and take the rows that stay.

Text and padding always survive; exactly K prunable tokens do. The functions here are traced and spliced into
the graph, and called as they are by the eager oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.compiler import ops
from secateur.compiler.recipe import PlannedStage
from secateur.compiler.token_map import TokenMap
from secateur.passes.signals import attend_from_cls, attend_from_row, find_prunable, take_columns
from secateur.passes.stage import StageFunction


class Reduced(NamedTuple):
    """What a decoder stage leaves. ``rows [B,L']`` slots of the sequence that stay, ``kept [B,K]`` indices into the
    row's prunable tokens, ``hidden [B,L',D]``, ``prunable [B,L']`` bool."""

    rows: Tensor
    kept: Tensor
    hidden: Tensor
    prunable: Tensor


def reduce_sequence(
    stage: StageFunction,
    hidden: Tensor,
    prunable: Tensor,
    last: Tensor,
    taps: Mapping[str, tuple[Tensor, Tensor, float]],
    forced: Tensor | None = None,
    scored: list[Tensor] | None = None,
) -> Reduced:
    """Run a stage before a decoder layer.

    ``hidden [B,L,D]``, ``prunable [B,L]`` bool with ``groups * length_in`` true entries a row, ``last [B]`` slot of
    the last real token; ``taps`` gives, per attention signal, query row ``[B,H,1,d]``, keys ``[B,Hkv,L,d]`` and scale.
    ``forced [B,K]`` replaces the choice (not the merge) and ``scored`` collects the score ``[G,N]``, for comparison.
    """
    planned = stage.planned
    batch, length = prunable.shape
    total, left = planned.groups * planned.length_in, planned.groups * planned.length_out
    columns = find_prunable(prunable, total)
    tokens = _split_groups(ops.take_rows(hidden, columns).float(), planned)
    signals: dict[str, Tensor] = {}
    if "tokens" in stage.signals:
        signals["tokens"] = tokens
    for name, (query, key, scale) in taps.items():
        attention = take_columns(attend_from_row(query, key, scale, last), columns)
        signals[name] = _split_groups(attention.transpose(1, 2), planned).transpose(1, 2)
    if scored is not None and stage.bound.score is not None:
        scored.append(stage.score(signals))
    chosen = _choose(stage, signals, None if forced is None else _to_groups(forced, planned))
    kept = _to_row(chosen.keep, planned)
    stays = torch.zeros(batch, length, dtype=torch.int64).scatter(1, ops.take_rows(columns, kept), 1) > 0
    rows = find_prunable(stays | ~prunable, length - total + left)
    new_prunable = ops.take_rows(prunable, rows)
    new_hidden = ops.take_rows(hidden, rows)
    if chosen.mix is not None:
        mixed = (chosen.mix @ tokens).reshape(batch, left, -1).to(hidden.dtype)
        target = find_prunable(new_prunable, left)[..., None].expand(mixed.shape)
        new_hidden = new_hidden.scatter(1, target, mixed)
    return Reduced(rows, kept, new_hidden, new_prunable)


def reduce_features(
    stage: StageFunction,
    tokens: Tensor,
    taps: Mapping[str, tuple[Tensor, Tensor, float]],
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a stage after the tower: ``tokens [M,N,D]`` -> ``[M,K,D]`` and the kept indices ``[M,K]``, per image."""
    chosen = _choose(stage, collect_vision_signals(stage, tokens, taps), forced)
    if chosen.mix is None:
        return ops.take_rows(tokens, chosen.keep), chosen.keep
    return (chosen.mix @ tokens.float()).to(tokens.dtype), chosen.keep


def collect_vision_signals(
    stage: StageFunction, tokens: Tensor, taps: Mapping[str, tuple[Tensor, Tensor, float]]
) -> dict[str, Tensor]:
    """The signals a stage after the tower asks for, from the tower's queries and keys ``[M,H,1+N,d]``."""
    signals: dict[str, Tensor] = {}
    if "tokens" in stage.signals:
        signals["tokens"] = tokens.float()
    for name, (query, key, scale) in taps.items():
        signals[name] = attend_from_cls(query, key, scale) if name == "cls_attention" else key[:, :, 1:].float()
    return signals


def _choose(stage: StageFunction, signals: Mapping[str, Tensor], forced: Tensor | None) -> TokenMap:
    return stage(signals) if forced is None else stage.with_keep(signals, forced)


def _split_groups(tokens: Tensor, planned: PlannedStage) -> Tensor:
    """``[B,V,...]`` -> ``[B*groups, V/groups, ...]``."""
    return tokens.reshape(tokens.shape[0] * planned.groups, planned.length_in, *tokens.shape[2:])


def _to_row(keep: Tensor, planned: PlannedStage) -> Tensor:
    """Per-group indices ``[B*groups,K]`` -> indices into the row's prunable tokens ``[B,groups*K]``."""
    offset = torch.arange(planned.groups)[:, None] * planned.length_in
    split = keep.reshape(-1, planned.groups, planned.length_out) + offset
    return split.reshape(-1, planned.groups * planned.length_out)


def _to_groups(kept: Tensor, planned: PlannedStage) -> Tensor:
    offset = torch.arange(planned.groups)[:, None] * planned.length_in
    return (kept.reshape(-1, planned.groups, planned.length_out) - offset).reshape(-1, planned.length_out)
