"""Selectors that give every frame its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.compiler.layout import Grid
from secateur.passes.methods.score_change import frame_layout
from secateur.passes.methods.select import Selection


def frame_quotas(score: Tensor, k: int, grid: Grid, group: Annotated[int, Field(ge=1)] = 4) -> Selection:
    """The first of every ``group`` frames as a whole; of the others equally many tokens each, the highest ``[G,N]``.

    Frames that share the budget get ``count // frames`` tokens, the earliest one more until the number is k. A k
    smaller than the first frames together is shared out among those alone. See ``frame_layout`` for what a frame is.
    """
    frames, places = frame_layout(grid)
    by_frame = score.reshape(-1, frames, places)
    first = [f for f in range(frames) if f % group == 0]
    whole = min(k, len(first) * places)
    picked = _highest_per_frame(by_frame, first, whole)
    if k > whole:
        others = [f for f in range(frames) if f % group]
        picked = torch.cat([picked, _highest_per_frame(by_frame, others, k - whole)], dim=1)
    return Selection(picked.sort(dim=-1).values)


def _highest_per_frame(by_frame: Tensor, frames: Sequence[int], count: int) -> Tensor:
    """The ``count`` tokens that the listed frames of ``by_frame [G,F,P]`` share, as indices into N, ``[G,count]``."""
    groups, _, places = by_frame.shape
    quota, extra = divmod(count, len(frames))
    listed = torch.tensor(frames, device=by_frame.device)
    best = by_frame.index_select(1, listed).topk(quota + (extra > 0), dim=-1).indices
    index = best + (listed * places).reshape(1, -1, 1)
    parts = [index[:, :, :quota].reshape(groups, -1)] if quota else []
    parts += [index[:, :extra, quota]] if extra else []
    return torch.cat(parts, dim=1)


SELECTORS: dict[str, Callable[..., Selection]] = {"frame_quotas": frame_quotas}
