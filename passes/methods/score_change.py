"""Scores by change: against the frame before, or through a layer of the decoder; ``[G,N]`` float32, higher = keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.compiler.layout import Grid
from secateur.passes.methods.rows import Scored, unit_rows

GOLDEN = (math.sqrt(5) - 1) / 2


def frame_layout(grid: Grid) -> tuple[int, int]:
    """Frames, and tokens per frame. A single image has no other frame to compare with: its rows take their place."""
    if grid.frames > 1:
        return grid.frames, grid.rows * grid.columns
    return grid.rows, grid.columns


def frame_change(tokens: Tensor, grid: Grid, compare: Literal["previous", "group_of_four"] = "previous") -> Tensor:
    """How little a token resembles the token at its place in an earlier frame, ``[G,N]``.

    One minus the cosine of ``tokens [G,N,D]`` with their counterparts, 0 to 2. ``"previous"`` compares a frame with
    the one before it (EVS, FrameFusion). ``"group_of_four"`` is DyCoke's: of every four frames the second and third
    are compared with the first, the fourth with the third.

    The first frame (of each four) has nothing to be compared with and comes before all others, at 3 to 4. Among its
    tokens the fractional parts of multiples of the golden ratio decide, so that the highest, however many, lie evenly
    over the frame. See :func:`frame_layout` for what a frame is.
    """
    frames, places = frame_layout(grid)
    size = 4 if compare == "group_of_four" else frames
    earlier = [f - 1 if compare == "previous" else f - (2 if f % size == 2 else 1) for f in range(frames)]
    reference = torch.tensor([max(f, 0) for f in earlier], device=tokens.device)
    units = unit_rows(tokens).reshape(-1, frames, places, tokens.shape[-1])
    change = 1.0 - (units * units.index_select(1, reference)).sum(dim=-1)
    spread = [[3.0 + (f * places + p) * GOLDEN % 1.0 for p in range(places)] for f in range(frames)]
    leads = torch.tensor([[f % size == 0] for f in range(frames)], device=tokens.device)
    change = torch.where(leads, torch.tensor(spread, dtype=change.dtype, device=tokens.device), change)
    return change.reshape(tokens.shape[:2])


def mean_query_importance(queries: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
    """What the average query attends to, times the length of the token, ``[G,N]`` (PACT's EUTI).

    The mean of ``queries [G,H,N,d]`` over the tokens meets ``keys [G,Hk,N,d]`` (heads that share keys stand
    together); softmax over the N tokens, mean over heads, times the Euclidean norm of ``tokens [G,N,D]``.
    """
    groups, heads, _, width = queries.shape
    shared = keys.shape[1]
    query = queries.mean(dim=2).reshape(groups, shared, heads // shared, width)
    attention = torch.softmax(query @ keys.transpose(2, 3) * width**-0.5, dim=-1)
    return attention.mean(dim=(1, 2)) * torch.linalg.vector_norm(tokens, dim=-1)


def token_transition_variation(
    branch_inputs: Tensor, branch_outputs: Tensor, real_slots: Tensor, slots: Tensor, carried: Tensor | None = None
) -> Scored:
    """How much the layer before the site changes a token, added up over layers (TransPrune's TTV), ``[G,N]``.

    A branch (attention, MLP) that reads x and adds y changes a token by ``|y| / |x|`` times the share of ``1 -
    cos(x, y)`` in a softmax over all real slots of the row. The two branches of ``branch_inputs`` and
    ``branch_outputs [G,2,L,D]`` are summed, ``slots [G,N]`` picks the prunable tokens, and ``carried [G,N]`` is what
    earlier stages added up. The score is the total divided by its sum; the total itself is carried on.
    """
    length_in = torch.linalg.vector_norm(branch_inputs, dim=-1).clamp_min(1e-12)
    length_out = torch.linalg.vector_norm(branch_outputs, dim=-1).clamp_min(1e-12)
    cosine = (branch_inputs * branch_outputs).sum(dim=-1) / (length_in * length_out)
    turn = torch.softmax(torch.where(real_slots.unsqueeze(1), 1.0 - cosine, -math.inf), dim=-1)
    change = (length_out / length_in * turn).sum(dim=1).gather(1, slots)
    total = change if carried is None else carried + change
    return Scored(total / total.sum(dim=-1, keepdim=True), total)


SCORES: dict[str, Callable[..., Any]] = {
    "frame_change": frame_change,
    "mean_query_importance": mean_query_importance,
    "token_transition_variation": token_transition_variation,
}
