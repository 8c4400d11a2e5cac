"""Greedy selectors: k dependent steps, each taking the token that adds most to those chosen already.

Every one is a single operator over a table of similarities worked out once, as in :func:`max_min`, whatever k is: its
steps stand in :mod:`secateur.compiler.greedy`. Similarity is the cosine of ``tokens [G,N,D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.compiler import score_ops
from secateur.compiler.greedy import coverage_gain
from secateur.passes.methods.rows import unit_rows
from secateur.passes.methods.select import Selection

Fraction = Annotated[float, Field(ge=0, le=1)]


def max_sum(tokens: Tensor, k: int, first: Literal["largest_sum", "first_token"] = "largest_sum") -> Selection:
    """Greedy max-sum diversity: next is the token whose distances (1 - cosine) to all chosen ones add up to most.

    The start is the token with the largest sum of distances to all others, or token 0.
    """
    distance = 1.0 - _cosines(tokens)
    if first == "first_token":
        start = torch.zeros_like(distance[:, 0, 0], dtype=torch.int64)
    else:
        start = distance.sum(dim=2).argmax(dim=1)
    return _pick_by_fold(distance, start, None, k, "sum")


def max_marginal_relevance(tokens: Tensor, score: Tensor, k: int, weight: Fraction = 0.5) -> Selection:
    """Maximal marginal relevance (IDPruner): ``weight * score - (1 - weight) * highest similarity to a chosen token``.

    The start is the highest of ``score [G,N]``, which should lie in [0, 1] to be comparable with a cosine.
    """
    return _pick_by_fold(_cosines(tokens), score.argmax(dim=1), score, k, "relevance", weight)


def farthest_by_score(tokens: Tensor, score: Tensor, k: int) -> Selection:
    """Farthest points weighted by ``score [G,N]`` (ZOO-Prune): ``score * smallest distance to a chosen token``.

    Distance is 1 - cosine, the start is the highest score. Scores must not be negative.
    """
    return _pick_by_fold(1.0 - _cosines(tokens), score.argmax(dim=1), score, k, "weighted")


def coverage(
    tokens: Tensor, score: Tensor, k: int, power: float = 1.0, combine: Literal["product", "sum"] = "product"
) -> Selection:
    """Saliency times coverage (SCOPE): next is the token with the highest ``score ** power * gain``, or their sum.

    A token i is covered by its highest similarity to a chosen token, 0 at first; the gain of j is the sum over all i
    of what j would add to that. ``score [G,N]`` must not be negative. A step reads the whole [G,N,N] table.
    """
    alike = torch.relu(_cosines(tokens))  # coverage starts at 0, so what is below adds nothing
    if power != 1.0 and combine == "product":
        # A common factor changes no choice, and powers of what lies far from 1 leave float32.
        highest = score.amax(dim=1, keepdim=True)
        score = score / torch.where(highest > 0, highest, 1.0)
    weight = score if power == 1.0 else score**power

    gain = coverage_gain(alike.shape, combine == "product")
    start = gain(torch.zeros_like(score), alike, weight).argmax(dim=1)
    if k == score.shape[1]:
        return _everything(score)
    if k == 1:
        return Selection(start.unsqueeze(1))
    picks: Tensor = score_ops.pick_by_coverage(alike, start, weight, k, combine == "product")
    return Selection(picks.sort(dim=-1).values)


def determinant(tokens: Tensor, score: Tensor, k: int) -> Selection:
    """Greedy maximum of a determinantal point process (CDPruner) with kernel ``score_i * cosine_ij * score_j``.

    Each step takes the token with the largest variance left, ``score_j ** 2`` times what of the unit vector j lies
    outside the span of the chosen ones (fast greedy MAP: one new row of the Cholesky factor a step, state k times N).
    The scores stand outside the factorisation, which leaves the choice as it is and keeps small ones from being lost
    in rounding. ``score [G,N]`` must not be negative.

    Once the chosen tokens span all others (k beyond the tokens' rank), the authors' code divides rounding errors.
    Here such tokens come last, by score.
    """
    if k == score.shape[1]:
        return _everything(score)
    picks: Tensor = score_ops.pick_by_determinant(_cosines(tokens), score.detach(), k)
    return Selection(picks.sort(dim=1).values)


def _cosines(tokens: Tensor) -> Tensor:
    """``[G,N,N]``."""
    units = unit_rows(tokens.detach())  # indices have no gradient, and scan cannot record one for them
    return units @ units.transpose(1, 2)


def _everything(score: Tensor) -> Selection:
    groups, count = score.shape
    return Selection(torch.arange(count, device=score.device).unsqueeze(0).expand(groups, count))


def _pick_by_fold(
    table: Tensor, start: Tensor, weight: Tensor | None, k: int, rule: str, trade: float = 0.0
) -> Selection:
    """From ``start [G]`` on, by one of the rules of :func:`secateur.compiler.greedy.pick_by_fold`."""
    if k == table.shape[1]:
        return _everything(table[:, 0])
    if k == 1:
        return Selection(start.unsqueeze(1))
    picks: Tensor = score_ops.pick_by_fold(table, start, weight, k, rule, trade)
    return Selection(picks.sort(dim=-1).values)


SELECTORS: dict[str, Callable[..., Selection]] = {
    "coverage": coverage,
    "determinant": determinant,
    "farthest_by_score": farthest_by_score,
    "max_marginal_relevance": max_marginal_relevance,
    "max_sum": max_sum,
}
