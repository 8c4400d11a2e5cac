"""Merges along time: what stays the same from frame to frame becomes one token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.compiler.layout import Grid
from secateur.passes.methods.score_change import frame_layout
from secateur.passes.methods.select import Selection


def run_mean(selection: Selection, grid: Grid) -> Tensor:
    """Each survivor becomes the mean of itself and the dropped tokens that follow it, ``mix [G,k,N]`` (FrameFusion).

    A token follows the one at its place in the frame before; its run ends at the next survivor at that place. Rows sum
    to one. A dropped token with no survivor before it is lost. See ``frame_layout`` for what a frame is.
    """
    frames, places = frame_layout(grid)
    keep = selection.keep
    count = frames * places
    survives = torch.zeros(keep.shape[0], count, device=keep.device).scatter(1, keep, 1.0)
    # Tokens of one run share their place and the number of survivors there so far; no two survivors do.
    number = survives.reshape(-1, frames, places).cumsum(dim=1).reshape(-1, count).to(torch.int64)
    place = torch.arange(places, device=keep.device).expand(frames, places).reshape(-1)
    run = number * places + place
    member = (run.gather(1, keep).unsqueeze(-1) == run.unsqueeze(1)).to(torch.float32)
    return member / member.sum(dim=-1, keepdim=True)


MERGES: dict[str, Callable[..., Tensor]] = {"run_mean": run_mean}
