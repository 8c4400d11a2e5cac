"""Greedy selectors: k dependent steps, each taking the token that adds most to those chosen already.

Every one is a single scan over a table of similarities worked out once, as in :func:`max_min`, whatever k is.
A chosen token is put at minus infinity, so none is chosen twice. Similarity is the cosine of ``tokens [G,N,D]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from secateur.passes.methods.rows import unit_rows
from secateur.passes.methods.select import Selection

Fraction = Annotated[float, Field(ge=0, le=1)]
Fold = Callable[[Tensor, Tensor], Tensor]
Gain = Callable[..., Tensor]

SPENT = 1e-4
"""What is left of a token's variance (its squared length outside the span of the chosen ones, of 1) when it counts as
none: rounding in float32 stays well below."""


def max_sum(tokens: Tensor, k: int, first: Literal["largest_sum", "first_token"] = "largest_sum") -> Selection:
    """Greedy max-sum diversity: next is the token whose distances (1 - cosine) to all chosen ones add up to most.

    The start is the token with the largest sum of distances to all others, or token 0.
    """
    distance = 1.0 - _cosines(tokens)
    if first == "first_token":
        start = torch.zeros_like(distance[:, 0, 0], dtype=torch.int64)
    else:
        start = distance.sum(dim=2).argmax(dim=1)
    return _pick_greedily(distance, start, k, torch.add, lambda total, _rows: total)


def max_marginal_relevance(tokens: Tensor, score: Tensor, k: int, weight: Fraction = 0.5) -> Selection:
    """Maximal marginal relevance (IDPruner): ``weight * score - (1 - weight) * highest similarity to a chosen token``.

    The start is the highest of ``score [G,N]``, which should lie in [0, 1] to be comparable with a cosine.
    """

    def gain(nearest: Tensor, _rows: Tensor, score: Tensor) -> Tensor:
        return weight * score - (1.0 - weight) * nearest

    return _pick_greedily(_cosines(tokens), score.argmax(dim=1), k, torch.maximum, gain, score)


def farthest_by_score(tokens: Tensor, score: Tensor, k: int) -> Selection:
    """Farthest points weighted by ``score [G,N]`` (ZOO-Prune): ``score * smallest distance to a chosen token``.

    Distance is 1 - cosine, the start is the highest score. Scores must not be negative.
    """

    def gain(nearest: Tensor, _rows: Tensor, score: Tensor) -> Tensor:
        return score * nearest

    return _pick_greedily(1.0 - _cosines(tokens), score.argmax(dim=1), k, torch.minimum, gain, score)


def coverage(
    tokens: Tensor, score: Tensor, k: int, power: float = 1.0, combine: Literal["product", "sum"] = "product"
) -> Selection:
    """Saliency times coverage (SCOPE): next is the token with the highest ``score ** power * gain``, or their sum.

    A token i is covered by its highest similarity to a chosen token, 0 at first; the gain of j is the sum over all i
    of what j would add to that. ``score [G,N]`` must not be negative. A step reads the whole [G,N,N] table.
    """
    alike = torch.relu(_cosines(tokens))  # coverage starts at 0, so what is below adds nothing
    weight = score if power == 1.0 else score**power

    shape = alike.shape

    def gain(covered: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        more = torch.relu(rows.reshape(*shape) - covered.unsqueeze(1)).sum(dim=2)
        return weight * more if combine == "product" else weight + more

    start = gain(torch.zeros_like(score), alike, weight).argmax(dim=1)
    return _pick_greedily(alike, start, k, torch.maximum, gain, weight)


def determinant(tokens: Tensor, score: Tensor, k: int) -> Selection:
    """Greedy maximum of a determinantal point process (CDPruner) with kernel ``score_i * cosine_ij * score_j``.

    Each step takes the token with the largest variance left, ``score_j ** 2`` times what of the unit vector j lies
    outside the span of the chosen ones (fast greedy MAP: one new row of the Cholesky factor a step, state k times N).
    The scores stand outside the factorisation, which leaves the choice as it is and keeps small ones from being lost
    in rounding. ``score [G,N]`` must not be negative.

    Once the chosen tokens span all others (k beyond the tokens' rank), the authors' code divides rounding errors.
    Here such tokens come last, by score.
    """
    groups, count = score.shape
    if k == count:
        return _everything(score)
    alike, score = _cosines(tokens), score.detach()
    position = torch.arange(count, device=score.device)
    offset = torch.arange(groups, device=score.device) * count
    table = alike.reshape(groups * count, count)
    weight = score * score
    # What tokens inside the span are ranked by: below every variance, and above a chosen token.
    last = score / (score.amax(dim=1, keepdim=True) + 1e-12) - 2.0
    steps = torch.arange(k, device=score.device, dtype=torch.float32).unsqueeze(1)
    rank = torch.arange(k, device=score.device, dtype=torch.float32).reshape(1, k, 1)

    def pick_freest(
        left: Tensor, taken: Tensor, factor: Tensor, step: Tensor,
        table: Tensor, offset: Tensor, position: Tensor, weight: Tensor, last: Tensor, rank: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        free = left > SPENT
        pick = (torch.where(free, weight * left, last) + taken).argmax(dim=1)
        mine = pick.reshape(-1, 1)
        variance = left.gather(1, mine)
        known = (factor * factor.gather(2, mine.unsqueeze(1).expand(-1, factor.shape[1], 1))).sum(dim=1)
        row = (table.index_select(0, pick + offset) - known) * torch.rsqrt(variance.clamp_min(SPENT))
        row = torch.where(variance > SPENT, row, 0.0)
        factor = torch.where(rank == step, row.unsqueeze(1), factor)
        taken = torch.where(position == mine, -math.inf, taken)
        return left - row * row, taken, factor, pick

    state = [torch.ones_like(score), torch.zeros_like(score), torch.zeros(groups, k, count, device=score.device)]
    *_, picks = scan_op(pick_freest, state, [steps], additional_inputs=(table, offset, position, weight, last, rank))
    return Selection(picks.transpose(0, 1).sort(dim=1).values)


def _cosines(tokens: Tensor) -> Tensor:
    """``[G,N,N]``."""
    units = unit_rows(tokens.detach())  # indices have no gradient, and scan cannot record one for them
    return units @ units.transpose(1, 2)


def _everything(score: Tensor) -> Selection:
    groups, count = score.shape
    return Selection(torch.arange(count, device=score.device).unsqueeze(0).expand(groups, count))


def _pick_greedily(table: Tensor, start: Tensor, k: int, fold: Fold, gain: Gain, *given: Tensor) -> Selection:
    """Choose ``start [G]``, then k - 1 times the token with the highest ``gain(state, rows, *given) [G,N]``.

    ``rows [G*N,N]`` is ``table [G,N,N]``; the state is the chosen tokens' rows of it folded together by ``fold``.
    """
    groups, count, _ = table.shape
    if k == count:
        return _everything(table[:, 0])
    if k == 1:
        return Selection(start.unsqueeze(1))
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
    captured = (rows, offset, position, *(tensor.detach() for tensor in given))
    *_, picks = scan_op(pick_best, state, [steps], additional_inputs=captured)
    return Selection(torch.cat([start.unsqueeze(0), picks]).transpose(0, 1).sort(dim=-1).values)


SELECTORS: dict[str, Callable[..., Selection]] = {
    "coverage": coverage,
    "determinant": determinant,
    "farthest_by_score": farthest_by_score,
    "max_marginal_relevance": max_marginal_relevance,
    "max_sum": max_sum,
}
