"""What several methods share: a score with something to carry on, and small moves on rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scored(NamedTuple):
    """What a score function returns when the next stage shall be told something other than the score: ``carry
    [G,N]`` reaches it as the signal ``carried``, for the tokens that are kept."""

    score: Tensor
    carry: Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """Rows ``[..., D]`` divided by their Euclidean norm. A row of zeros stays zero instead of becoming NaN."""
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-12)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``rows [G,N,D]`` at ``index [G,K]`` (int64), group by group: ``[G,K,D]``."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def ranks(score: Tensor) -> Tensor:
    """The place of each of ``score [G,N]`` from the lowest, 0, to the highest, N - 1: float32, without ties.

    Of equal scores the lower index ranks higher: the highest ranks are what a top-k of the scores keeps. Whole numbers
    are exact in float32 up to 2**24, so that multiples of N may be added without losing the order.
    """
    count = score.shape[-1]
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(count - 1, -1, -1, dtype=torch.float32, device=score.device)
    return torch.zeros_like(score, dtype=torch.float32).scatter(1, order, place.unsqueeze(0).expand(*order.shape))


def prefer(score: Tensor, weight: Tensor) -> Tensor:
    """The order of ``score [G,N]`` with every token of ``weight [G,N]`` 1 above all of weight 0, of weight 2 above all
    of 1, as whole numbers, float32. Weights are whole numbers; of equal tokens the lower index ranks higher.

    Scores are ranked first. A constant added to them instead would round away what tells small scores apart: attention
    over thousands of tokens lies far below the 1.2e-7 that float32 resolves beside 1.
    """
    return ranks(score) + weight * score.shape[-1]
