"""Selectors: exactly k of N tokens, in their original order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from secateur.compiler import score_ops
from secateur.passes.methods.rows import unit_rows


class Selection(NamedTuple):
    """``keep [G,k]`` int64 strictly increasing; ``targets [G,k]`` bool marks the survivors others may merge into.

    ``targets`` is None when the selector does not tell survivors apart: then every survivor is a target.
    ``assigned [G,N]`` int64, of selectors that pair tokens themselves: which survivor (0 to k - 1, its place in
    ``keep``) each token joins; a survivor joins itself, a token that is simply dropped has k.
    """

    keep: Tensor
    targets: Tensor | None = None
    assigned: Tensor | None = None


def top_k(score: Tensor, k: int) -> Selection:
    """The k highest of ``score [G,N]``.

    Among equal scores ONNX prefers the lower index; torch leaves the choice open, so comparisons must be tie-aware.
    """
    return Selection(score_ops.top_rows(score, k))


def max_min(tokens: Tensor, k: int, first: Literal["second_smallest", "first_token"] = "second_smallest") -> Selection:
    """Greedy k-center on ``tokens [G,N,D]`` with cosine distance: next is the token farthest from all chosen ones.

    ``first="second_smallest"`` starts, as DivPrune does, from the token whose second-smallest distance (the smallest
    being to itself) is largest; ``"first_token"`` starts from token 0, the usual arbitrary start.

    Chosen tokens are put at distance minus infinity, so none is chosen twice. DivPrune's code relies on a token's
    distance to itself being the smallest, which rounding or duplicate tokens can break.

    The [G,N,N] distances are computed once: the start needs them all anyway, and a step then reads a row of N
    numbers instead of multiplying N rows of width D. The k-1 dependent steps are one operator
    (:mod:`secateur.compiler.greedy`).
    """
    groups, count, _ = tokens.shape
    if k == count:
        return Selection(_positions(tokens, count).unsqueeze(0).expand(groups, count))
    distance = _cosine_distance(tokens)
    start = _most_isolated(distance) if first == "second_smallest" else torch.zeros_like(_positions(tokens, groups))
    return _farthest_points(distance, start, k)


def weighted_max_min(score: Tensor, tokens: Tensor, k: int) -> Selection:
    """Greedy k-center as :func:`max_min`, where the distance to token j counts ``score[j]`` times (SEATS).

    ``score [G,N]`` must not be negative. Next is the token with the largest product of its score and its distance to
    the nearest chosen one; the first is the token whose weighted distance to its nearest neighbour is largest.
    """
    groups, count, _ = tokens.shape
    if k == count:
        return Selection(_positions(tokens, count).unsqueeze(0).expand(groups, count))
    distance = _cosine_distance(tokens) * score.detach().unsqueeze(1)
    return _farthest_points(distance, _most_isolated(distance), k)


def _cosine_distance(tokens: Tensor) -> Tensor:
    units = unit_rows(tokens.detach())  # indices have no gradient, and scan cannot record one for them
    return 1.0 - units @ units.transpose(1, 2)


def _most_isolated(distance: Tensor) -> Tensor:
    """The column of ``distance [G,N,N]`` whose smallest entry off the diagonal is largest, ``[G]``."""
    position = _positions(distance, distance.shape[-1])
    others = torch.where(position.unsqueeze(1) == position, math.inf, distance)
    return others.amin(dim=1).argmax(dim=1)


def _farthest_points(distance: Tensor, start: Tensor, k: int) -> Selection:
    """From ``start [G]`` on, k - 1 times the column farthest from the rows chosen so far; k is less than N."""
    return Selection(pick_farthest_points(distance, start, k).sort(dim=-1).values)


def pick_farthest_points(distance: Tensor, start: Tensor, k: int) -> Tensor:
    """The same in the order they are picked, ``[G,k]``."""
    if k == 1:
        return start.unsqueeze(1)
    picks: Tensor = score_ops.pick_by_fold(distance, start, None, k, "farthest", 0.0)
    return picks


def top_k_and_uniform(score: Tensor, k: int, contextual: Annotated[float, Field(gt=0, lt=1)] = 0.156) -> Selection:
    """The highest of ``score [G,N]``, and merge targets spread evenly over what remains.

    Of the k survivors, c = round(contextual * k) are targets (at least one when k > 1, at most k - 1; none when
    k = 1). They are every floor(M / c)-th, first c, of the M tokens in their order that are not among the top k - c.
    The default is VisionZip's 30 contextual tokens of 192.
    """
    groups, count = score.shape
    share = min(max(math.floor(contextual * k + 0.5), 1), k - 1)
    dominant = score.topk(k - share, dim=-1).indices
    if share == 0:
        keep = dominant.sort(dim=-1).values
        return Selection(keep, torch.zeros_like(keep, dtype=torch.bool))
    remaining = count - (k - share)
    position = _positions(score, count).unsqueeze(0).expand(groups, count)
    # Dominant tokens sort behind every real position, which leaves the others in order at the front.
    others = position.scatter(1, dominant, count).sort(dim=-1).values
    step = remaining // share
    targets = others[:, : step * share : step]
    keep, order = torch.cat([dominant, targets], dim=1).sort(dim=-1)
    return Selection(keep, order >= k - share)


def _positions(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device)


def nothing(tokens: Tensor, k: int) -> Selection:
    """No token at all: for a stage of share 0, after which the decoder goes on with text alone. ``keep [G,0]``."""
    assert k == 0, "this selector is for stages of share 0"
    return Selection(_positions(tokens, 0).unsqueeze(0).expand(tokens.shape[0], 0))


SELECTORS: dict[str, Callable[..., Selection]] = {
    "max_min": max_min,
    "nothing": nothing,
    "top_k": top_k,
    "top_k_and_uniform": top_k_and_uniform,
    "weighted_max_min": weighted_max_min,
}
