"""Scores made from scores: combinations, normalisations and corrections, ``[G,N]`` float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.compiler.layout import Grid
from secateur.passes.methods.rows import Scored, prefer, ranks
from secateur.runtime.errors import UserError

Numbers = list[float] | tuple[float, ...]
Indices = list[int] | tuple[int, ...]
Share = Annotated[float, Field(ge=0, lt=1)]


def product(scores: tuple[Tensor, ...]) -> Tensor:
    """The product of all ``scores``, each ``[G,N]``."""
    result = scores[0]
    for score in scores[1:]:
        result = result * score
    return result


def weighted_sum(scores: tuple[Tensor, ...], weights: Numbers = ()) -> Tensor:
    """The sum of all ``scores``, each ``[G,N]``, times its weight; without ``weights`` all weigh 1."""
    weights = weights or [1.0] * len(scores)
    if len(weights) != len(scores):
        raise UserError(f"{len(weights)} weights for {len(scores)} scores", where="weighted_sum")
    result = scores[0] * weights[0]
    for score, weight in zip(scores[1:], weights[1:], strict=True):
        result = result + score * weight
    return result


def min_max(score: Tensor) -> Tensor:
    """``score [G,N]`` moved and scaled to run from 0 to 1 in each group. A constant score becomes 0."""
    low = score.amin(dim=1, keepdim=True)
    span = score.amax(dim=1, keepdim=True) - low
    return (score - low) / torch.where(span > 0, span, 1.0)


def rank(score: Tensor) -> Tensor:
    """The place of each token in the order of ``score [G,N]``, from 0, the lowest, to 1, the highest."""
    return ranks(score) / max(score.shape[1] - 1, 1)


def sum_to_one(score: Tensor) -> Tensor:
    """``score [G,N]``, at least 0, divided by its sum in each group."""
    total = score.sum(dim=1, keepdim=True)
    return score / torch.where(total > 0, total, 1.0)


def position_bias(score: Tensor, weights: Annotated[Numbers, Field(min_length=1)] = (1.0,)) -> Tensor:
    """``score [G,N]`` times a weight for each place among the N tokens: undoes the pull of late positions.

    ``weights`` of another length than N are resampled linearly, first on first and last on last.
    """
    count, last = score.shape[1], len(weights) - 1
    resampled = []
    for index in range(count):
        place = index * last / max(count - 1, 1)
        low = min(math.floor(place), max(last - 1, 0))
        part = place - low
        resampled.append((1 - part) * weights[low] + part * weights[min(low + 1, last)])
    return score * torch.tensor(resampled, dtype=torch.float32, device=score.device)


def padding_mask(
    score: Tensor,
    grid: Grid,
    left: Share = 0.0,
    top: Share = 0.0,
    right: Share = 0.0,
    bottom: Share = 0.0,
    most: Annotated[float, Field(ge=0, le=1)] = 0.5,
) -> Tensor:
    """``score [G,N]`` without the patches that lie in an image's padding: these score 0.

    ``left`` to ``bottom`` are the shares of an image's sides that were filled to make it square. A patch is padding
    when more than ``most`` of its area is.
    """
    across = [_overlap(column, grid.columns, left, 1 - right) for column in range(grid.columns)]
    down = [_overlap(row, grid.rows, top, 1 - bottom) for row in range(grid.rows)]
    inside = [float(1 - y * x <= most) for y in down for x in across] * grid.frames
    return score * torch.tensor(inside, dtype=torch.float32, device=score.device)


def sink_mask(
    score: Tensor,
    tokens: Tensor,
    text_tokens: Tensor,
    dims: Indices = (),
    found: Annotated[int, Field(ge=1)] = 2,
    tau: Annotated[float, Field(gt=0)] = 20.0,
) -> Tensor:
    """``score [G,N]`` without attention sinks: tokens with a huge entry in a sink dimension score 0 (VAR's test).

    A row h of ``tokens [G,N,D]`` is a sink when ``|h| / rms(h)`` exceeds ``tau`` in one of the sink dimensions, where
    ``rms(h) = sqrt(mean(h ** 2) + 1e-6)`` as in the authors' code: rows far below 1e-3 have none.
    These are ``dims``; where none are given, the ``found`` dimensions in which the prompt's first token, a sink in
    every decoder, is largest (the first row of ``text_tokens [G,T,D]``).
    """
    size = tokens.abs() * torch.rsqrt((tokens * tokens).mean(dim=-1, keepdim=True) + 1e-6)
    if dims:
        if not all(0 <= dim < tokens.shape[-1] for dim in dims):
            raise UserError(
                f"sink dimensions {list(dims)} do not all exist in rows of {tokens.shape[-1]}", where="dims"
            )
        sink = size.index_select(2, torch.tensor(list(dims), device=tokens.device)).amax(dim=-1)
    else:
        first = text_tokens[:, 0].abs().topk(min(found, tokens.shape[-1]), dim=-1).indices
        sink = size.gather(2, first.unsqueeze(1).expand(-1, size.shape[1], -1)).amax(dim=-1)
    return torch.where(sink > tau, 0.0, score)


def top_share(score: Tensor, share: Annotated[float, Field(gt=0, le=1)] = 0.08) -> Tensor:
    """1 for the ceil(``share`` * N) highest of ``score [G,N]``, 0 for the others: a set that later stages spare."""
    best = score.topk(math.ceil(share * score.shape[1]), dim=1).indices
    return torch.zeros_like(score).scatter(1, best, 1.0)


def spare_carried(score: Tensor, carried: Tensor) -> Scored:
    """The order of ``score [G,N]``, but tokens with a ``carried`` mark of 1 come before those with 0.

    The marks are carried on.
    """
    return Scored(prefer(score, carried), carried)


def _overlap(index: int, count: int, start: float, end: float) -> float:
    """The share of the ``index``-th of ``count`` equal parts of [0, 1] that lies between ``start`` and ``end``."""
    return max(0.0, min(index + 1, end * count) - max(index, start * count))


SCORES: dict[str, Callable[..., Tensor | Scored]] = {
    "min_max": min_max,
    "padding_mask": padding_mask,
    "position_bias": position_bias,
    "product": product,
    "rank": rank,
    "sink_mask": sink_mask,
    "spare_carried": spare_carried,
    "sum_to_one": sum_to_one,
    "top_share": top_share,
    "weighted_sum": weighted_sum,
}
