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

    Of equal scores the lower index comes first.
    """
    order = score.argsort(dim=-1, stable=True)
    place = torch.arange(score.shape[-1], dtype=torch.float32, device=score.device)
    place = place.unsqueeze(0).expand(*order.shape)
    return torch.zeros_like(score).scatter(1, order, place)
