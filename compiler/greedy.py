"""Greedy selection over a table of similarities or distances, worked out before: dependent steps, one scan.

A chosen token is put at minus infinity, so none is chosen twice; of equal gains the lower index is taken. ``scan_op``
is the operator below ``torch``'s ``scan``: the same node, but eager calls need no compiler and its inputs keep our
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

NOTHING = torch.finfo(torch.float32).min
"""OpenVINO 2026.4 gives this as the largest of values that are all minus infinity; a number is above both."""

Fold = Callable[[Tensor, Tensor], Tensor]
Gain = Callable[..., Tensor]

SPENT = 1e-4
"""What is left of a token's variance (its squared length outside the span of the chosen ones, of 1) when it counts as
none: rounding in float32 stays well below."""


def pick_by_fold(table: Tensor, start: Tensor, weight: Tensor | None, k: int, rule: str, trade: float) -> Tensor:
    """From ``start [G]`` on, k - 1 times the token whose gain is highest; the state is the chosen tokens' rows of
    ``table [G,N,N]`` folded together. ``[G,k]`` in the order they are picked.

    ``rule`` is "farthest" (state: minimum; gain: the state), "sum" (sum; the state), "weighted" (minimum; ``weight
    [G,N]`` times the state) or "relevance" (maximum; ``trade * weight - (1 - trade) * state``).
    """
    if k == 1:
        return start.unsqueeze(1).clone()
    if rule == "farthest":
        return _pick_farthest(table, start, k)
    if rule == "sum":
        return _pick_greedily(table, start, k, torch.add, lambda total, _rows: total)
    assert weight is not None
    if rule == "weighted":
        return _pick_greedily(table, start, k, torch.minimum, lambda near, _rows, score: score * near, weight)

    def gain(nearest: Tensor, _rows: Tensor, score: Tensor) -> Tensor:
        return trade * score - (1.0 - trade) * nearest

    return _pick_greedily(table, start, k, torch.maximum, gain, weight)


def pick_by_coverage(table: Tensor, start: Tensor, weight: Tensor, k: int, product: bool) -> Tensor:
    """From ``start [G]`` on, k - 1 times the token j with the highest ``weight[j] * more[j]``, or their sum.

    A token i is covered by its highest entry of ``table [G,N,N]`` in the rows chosen; ``more[j]`` is the sum over all i
    of what j would add to that. ``weight [G,N]``. A step reads the whole table.
    """
    if k == 1:
        return start.unsqueeze(1).clone()
    return _pick_greedily(table, start, k, torch.maximum, coverage_gain(table.shape, product), weight)


def coverage_gain(shape: torch.Size, product: bool) -> Gain:
    """The gain of :func:`pick_by_coverage` over a table of this shape, by what is covered and all its rows."""

    def gain(covered: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        more = torch.relu(rows.reshape(*shape) - covered.unsqueeze(1)).sum(dim=2)
        return weight * more if product else weight + more

    return gain


def pick_by_determinant(table: Tensor, score: Tensor, k: int) -> Tensor:
    """k times the token with the largest variance left, of the kernel ``score_i * table_ij * score_j``.

    That is ``score_j ** 2`` times what of unit vector j lies outside the span of the chosen ones (fast greedy MAP: one
    new row of the Cholesky factor a step, state k times N). ``table [G,N,N]`` holds cosines; ``score [G,N]`` stands
    outside the factorisation, which leaves the choice as it is and keeps small scores from being lost in rounding.
    What is compared is the square root, since the square of a small score may be 0. Tokens inside the span come last,
    by score: from the step on in which none is left outside.
    """
    groups, count = score.shape
    position = torch.arange(count, device=score.device)
    offset = torch.arange(groups, device=score.device) * count
    rows = table.reshape(groups * count, count)
    steps = torch.arange(k, device=score.device, dtype=torch.float32).unsqueeze(1)
    rank = torch.arange(k, device=score.device, dtype=torch.float32).reshape(1, k, 1)

    def pick_freest(
        left: Tensor, taken: Tensor, factor: Tensor, step: Tensor,
        table: Tensor, offset: Tensor, position: Tensor, score: Tensor, rank: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        spread = torch.where(left + taken > SPENT, score * torch.sqrt(left.clamp_min(0.0)), -math.inf)
        outside = spread.amax(dim=1, keepdim=True) > NOTHING
        pick = torch.where(outside, spread, score + taken).argmax(dim=1)
        mine = pick.reshape(-1, 1)
        variance = left.gather(1, mine)
        known = (factor * factor.gather(2, mine.unsqueeze(1).expand(-1, factor.shape[1], 1))).sum(dim=1)
        row = (table.index_select(0, pick + offset) - known) * torch.rsqrt(variance.clamp_min(SPENT))
        row = torch.where(variance > SPENT, row, 0.0)
        factor = torch.where(rank == step, row.unsqueeze(1), factor)
        taken = torch.where(position == mine, -math.inf, taken)
        return left - row * row, taken, factor, pick

    left, taken = torch.ones_like(score), torch.zeros_like(score)
    state = [left, taken, torch.zeros(groups, k, count, dtype=table.dtype, device=score.device)]
    captured = (rows, offset, position, score, rank)
    picks: Tensor
    *_, picks = scan_op(pick_freest, state, [steps], additional_inputs=captured)
    return picks.transpose(0, 1).contiguous()


def _pick_farthest(distance: Tensor, start: Tensor, k: int) -> Tensor:
    groups, count, _ = distance.shape
    position = torch.arange(count, device=distance.device)
    rows = distance.reshape(groups * count, count)
    offset = torch.arange(groups, device=distance.device) * count
    state = _mark_chosen(rows.index_select(0, start + offset), position, start)

    def pick_farthest(
        state: Tensor, _step: Tensor, rows: Tensor, offset: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        pick = state.argmax(dim=1)
        nearer = torch.minimum(state, rows.index_select(0, pick + offset))
        return _mark_chosen(nearer, position, pick), pick

    steps = torch.zeros(k - 1, 1, device=distance.device)
    _, picks = scan_op(pick_farthest, [state], [steps], additional_inputs=(rows, offset, position))
    return _in_order(start, picks)


def _mark_chosen(distance: Tensor, position: Tensor, pick: Tensor) -> Tensor:
    return torch.where(position == pick.unsqueeze(1), -math.inf, distance)


def _pick_greedily(table: Tensor, start: Tensor, k: int, fold: Fold, gain: Gain, *given: Tensor) -> Tensor:
    """Choose ``start [G]``, then k - 1 times the token with the highest ``gain(state, rows, *given) [G,N]``.

    ``rows [G*N,N]`` is ``table [G,N,N]``; the state is the chosen tokens' rows of it folded together by ``fold``.
    """
    groups, count, _ = table.shape
    position = torch.arange(count, device=table.device)
    offset = torch.arange(groups, device=table.device) * count
    rows = table.reshape(groups * count, count)

    def pick_best(
        state: Tensor, taken: Tensor, _step: Tensor, rows: Tensor, offset: Tensor, position: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        pick = (gain(state, rows, *given) + taken).argmax(dim=1)
        state = fold(state, rows.index_select(0, pick + offset))
        return state, torch.where(position == pick.unsqueeze(1), -math.inf, taken), pick

    taken = torch.where(position == start.unsqueeze(1), -math.inf, 0.0)
    steps = torch.zeros(k - 1, 1, device=table.device)
    state = [rows.index_select(0, start + offset), taken]
    captured: tuple[Any, ...] = (rows, offset, position, *(tensor.detach() for tensor in given))
    *_, picks = scan_op(pick_best, state, [steps], additional_inputs=captured)
    return _in_order(start, picks)


def _in_order(start: Tensor, picks: Tensor) -> Tensor:
    """``start [G]`` and the picks of a scan ``[k-1,G]`` as ``[G,k]``."""
    return torch.cat([start.unsqueeze(0), picks]).transpose(0, 1).contiguous()
