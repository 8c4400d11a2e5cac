"""Operators for the heavy parts of scores and selectors, so that each survives tracing and pruning as one node.

Whoever exports may have a kernel for one (``exporters/plugins``); everyone else writes its plain form, which is also
its eager kernel: ``PLAIN`` names it. What users write themselves is traced as it stands.

``received_attention``: ``query [B,H,L,d]``, ``key [B,Hkv,L,d]`` -> float32 ``[B,H,L]``, the attention every key
receives, mean over the queries; with ``last [B]`` int64 over those up to that slot alone. Never a window or a block.
``top_rows``: ``score [G,N]`` -> int64 ``[G,k]``, the k highest, ascending; of equal scores the lower index first.
``pick_by_fold``, ``pick_by_coverage``, ``pick_by_determinant``: ``table [G,N,N]`` float32 -> int64 ``[G,k]`` in the
order they are picked; see :mod:`secateur.compiler.greedy`.
"""

# The schemas below type the kernels.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.compiler import greedy
from secateur.compiler.ops import LIB, same_block

LIB.define("received_attention(Tensor query, Tensor key, float scale, bool causal, Tensor? last=None) -> Tensor")
LIB.define("top_rows(Tensor score, int k) -> Tensor")
LIB.define("pick_by_fold(Tensor table, Tensor start, Tensor? weight, int k, str rule, float trade) -> Tensor")
LIB.define("pick_by_coverage(Tensor table, Tensor start, Tensor weight, int k, bool product) -> Tensor")
LIB.define("pick_by_determinant(Tensor table, Tensor score, int k) -> Tensor")


def score_rows(query: Tensor, key: Tensor, scale: float, slots: Tensor, block_ids: Tensor | None = None) -> Tensor:
    """Scaled products of some query rows with all keys; -inf for keys behind the query's own slot and not of its block.

    ``query [B,H,R,d]``, ``key [B,Hkv,L,d]``, ``slots [B,R]``, ``block_ids [B,L]`` -> float32 ``[B,H,R,L]``.
    """
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    folded = query.float().reshape(batch, key.shape[1], groups * rows, width)
    logits = (folded @ key.float().transpose(-1, -2) * scale).reshape(batch, heads, rows, key.shape[2])
    future = torch.arange(key.shape[2], device=query.device) > slots[..., None]
    if block_ids is not None:
        future = future & ~same_block(block_ids.gather(1, slots)[..., None], block_ids[:, None])
    return logits.masked_fill(future[:, None], float("-inf"))


def attend_rows(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention without a mask, softmax over all keys: ``[M,H,R,d]``, ``[M,H,S,d]`` -> float32 ``[M,H,R,S]``."""
    return torch.softmax((query.float() * scale) @ key.float().transpose(-1, -2), -1)


def mean_over_real(attention: Tensor, last: Tensor) -> Tensor:
    """The mean over the queries up to slot ``last [B]``: ``[B,H,L,L]`` -> ``[B,H,L]``."""
    real = (torch.arange(attention.shape[2], device=last.device) <= last[:, None]).float()
    weight = real / real.sum(1, keepdim=True)
    return (weight[:, None, None] @ attention)[:, :, 0]


def receive_plainly(query: Tensor, key: Tensor, scale: float, causal: bool, last: Tensor | None = None) -> Tensor:
    """``received_attention`` by the whole ``[B,H,L,L]`` map."""
    if causal:
        slots = torch.arange(key.shape[2], device=query.device).expand(query.shape[0], key.shape[2])
        attention = torch.softmax(score_rows(query, key, scale, slots), -1)
    else:
        attention = attend_rows(query, key, scale)
    return attention.mean(2) if last is None else mean_over_real(attention, last)


def take_highest(score: Tensor, k: int) -> Tensor:
    """``top_rows``, but torch leaves the choice among equal scores open."""
    return score.topk(k, dim=-1).indices.sort(dim=-1).values


@torch.library.register_fake("secateur::received_attention", lib=LIB)
def _received_attention_fake(query, key, scale, causal, last=None):
    return query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("secateur::top_rows", lib=LIB)
def _top_rows_fake(score, k):
    return score.new_empty((score.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("secateur::pick_by_fold", lib=LIB)
def _pick_by_fold_fake(table, start, weight, k, rule, trade):
    return start.new_empty((table.shape[0], k))


@torch.library.register_fake("secateur::pick_by_coverage", lib=LIB)
def _pick_by_coverage_fake(table, start, weight, k, product):
    return start.new_empty((table.shape[0], k))


@torch.library.register_fake("secateur::pick_by_determinant", lib=LIB)
def _pick_by_determinant_fake(table, score, k):
    return table.new_empty((table.shape[0], k), dtype=torch.int64)


received_attention = torch.ops.secateur.received_attention.default
top_rows = torch.ops.secateur.top_rows.default
pick_by_fold = torch.ops.secateur.pick_by_fold.default
pick_by_coverage = torch.ops.secateur.pick_by_coverage.default
pick_by_determinant = torch.ops.secateur.pick_by_determinant.default

PLAIN: Mapping[Any, Callable[..., Tensor]] = {
    received_attention: receive_plainly,
    top_rows: take_highest,
    pick_by_fold: greedy.pick_by_fold,
    pick_by_coverage: greedy.pick_by_coverage,
    pick_by_determinant: greedy.pick_by_determinant,
}
"""Operator -> the function of the same arguments that is its eager kernel and what is exported without a kernel."""

for _operator, _plain in PLAIN.items():
    LIB.impl(_operator, _plain, "CompositeExplicitAutograd")
