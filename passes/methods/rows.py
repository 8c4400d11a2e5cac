"""Two things several methods do to rows: scale them to length one, and pick some of them."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """Rows ``[..., D]`` divided by their Euclidean norm. A row of zeros stays zero instead of becoming NaN."""
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-12)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``rows [G,N,D]`` at ``index [G,K]`` (int64), group by group: ``[G,K,D]``."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
