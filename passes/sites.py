"""A stage at its site, as one function of tensors: group, score, select, merge, and take the rows that stay.

Text and padding always survive; exactly K prunable tokens do. The functions here are traced and spliced into
the graph; the eager oracle has a reading of its own (``compiler/oracle_stages.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.compiler import ops
from secateur.compiler.plan_recipe import PlannedStage
from secateur.compiler.token_map import TokenMap
from secateur.passes.signals import (
    PatchView,
    SequenceView,
    find_prunable,
    patch_signals,
    sequence_signals,
)
from secateur.passes.stage import StageFunction


class Reduced(NamedTuple):
    """What a decoder stage leaves. ``rows [B,L']`` slots of the sequence that stay, ``kept [B,K]`` indices into the
    row's prunable tokens, ``hidden [B,L',D]``, ``prunable [B,L']`` bool, ``state [B,K]`` for later stages."""

    rows: Tensor
    kept: Tensor
    hidden: Tensor
    prunable: Tensor
    state: dict[str, Tensor]


class Thinned(NamedTuple):
    """What a tower-side stage leaves: ``tokens [M,K,D]``, ``kept [M,K]``, ``state [M,K]`` for later stages. ``mix
    [M,K,N]`` where tokens were merged."""

    tokens: Tensor
    kept: Tensor
    state: dict[str, Tensor]
    mix: Tensor | None = None

    def thin(self, rows: Tensor) -> Tensor:
        """Other rows ``[M,N,D]`` of the same tokens, thinned as these were."""
        if self.mix is None:
            return ops.take_rows(rows, self.kept)
        return (self.mix @ rows.float()).to(rows.dtype)


def locate(prunable: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots of the ``count`` prunable tokens ``[B,count]`` and of all others ``[B,L-count]``, both ascending."""
    return find_prunable(prunable, count), find_prunable(~prunable, prunable.shape[1] - count)


def reduce_sequence(
    stage: StageFunction,
    seen: SequenceView,
    prunable: Tensor,
    tracked: Sequence[str] = (),
) -> Reduced:
    """Run a stage before a decoder layer.

    ``prunable [B,L]`` bool with ``groups * length_in`` true entries a row. ``tracked`` names the state later stages
    want.
    """
    planned = stage.planned
    batch, length = prunable.shape
    total, left = planned.groups * planned.length_in, planned.groups * planned.length_out
    if left == 0:
        rows = seen.texts
        none = torch.zeros(batch, length - total, dtype=torch.bool)
        return Reduced(rows, seen.columns[:, :0], ops.take_rows(seen.hidden, rows), none, {})
    chosen, carry = stage.run(sequence_signals(stage, seen))
    kept = _to_row(chosen.keep, planned)
    state = _next_state(tracked, seen.state, carry, chosen, planned, batch)
    if planned.observes:
        rows = torch.arange(length).expand(batch, length)
        return Reduced(rows, kept, seen.hidden, prunable, state)
    stays = torch.zeros(batch, length, dtype=torch.int64).scatter(1, ops.take_rows(seen.columns, kept), 1) > 0
    rows = find_prunable(stays | ~prunable, length - total + left)
    new_prunable = ops.take_rows(prunable, rows)
    new_hidden = ops.take_rows(seen.hidden, rows)
    if chosen.mix is not None:
        tokens = ops.take_rows(seen.hidden, seen.columns).float()
        grouped = tokens.reshape(batch * planned.groups, planned.length_in, tokens.shape[2])
        mixed = (chosen.mix @ grouped).reshape(batch, left, -1).to(seen.hidden.dtype)
        target = find_prunable(new_prunable, left)[..., None].expand(mixed.shape)
        new_hidden = new_hidden.scatter(1, target, mixed)
    return Reduced(rows, kept, new_hidden, new_prunable, state)


def reduce_patches(
    stage: StageFunction,
    seen: PatchView,
    layers: Mapping[str, tuple[int, ...]],
    tracked: Sequence[str] = (),
) -> Thinned:
    """Run a stage in the tower or after it, image by image; arguments as in :func:`reduce_sequence`."""
    tokens = seen.rows
    chosen, carry = stage.run(patch_signals(stage, seen, layers))
    state = _next_state(tracked, seen.state, carry, chosen, stage.planned, tokens.shape[0])
    if stage.planned.observes:
        return Thinned(seen.tokens, chosen.keep, state)
    thin = Thinned(tokens, chosen.keep, state, chosen.mix)
    return thin._replace(tokens=thin.thin(tokens))


def start_state(tracked: Sequence[str], batch: int, count: int) -> dict[str, Tensor]:
    """The state before any stage of a program: every token stands for itself, nothing is carried."""
    made = {
        "size": lambda: torch.ones(batch, count),
        "source": lambda: torch.arange(count).expand(batch, count),
    }
    return {name: make() for name, make in made.items() if name in tracked}


def _next_state(
    tracked: Sequence[str],
    state: Mapping[str, Tensor],
    carry: Tensor | None,
    chosen: TokenMap,
    planned: PlannedStage,
    batch: int,
) -> dict[str, Tensor]:
    """State of the tokens that stay, row by row ``[B,K]``; a merged token is as large as all that went into it."""
    groups = chosen.keep.shape[0]
    found: dict[str, Tensor] = {}
    for name in tracked:
        value = carry if name == "carried" and carry is not None else state.get(name)
        if value is None:
            continue
        value = value.reshape(groups, planned.length_in)
        if name == "size" and chosen.mix is not None:
            value = ((chosen.mix > 0).float() @ value.unsqueeze(-1)).squeeze(-1)
        else:
            value = value.gather(1, chosen.keep)
        found[name] = value.reshape(batch, -1)
    return found


def _to_row(keep: Tensor, planned: PlannedStage) -> Tensor:
    """Per-group indices ``[B*groups,K]`` -> indices into the row's prunable tokens ``[B,groups*K]``."""
    offset = torch.arange(planned.groups)[:, None] * planned.length_in
    split = keep.reshape(-1, planned.groups, keep.shape[1]) + offset
    return split.reshape(-1, planned.groups * keep.shape[1])
