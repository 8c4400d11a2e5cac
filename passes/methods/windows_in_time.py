"""Budgets that flow from windows of time to kinds of token (SEATS, arXiv 2605.20035).

A window is a few moments one after the other; what is seen in it and what is heard are its cells. The authors repair
rounded budgets in loops until they fit; here one sharing-out with bounds and largest remainders gives the same kind of
numbers at static shapes, and always exactly k tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.compiler.layout import Layout, share_out
from secateur.passes.methods.rows import prefer, unit_rows
from secateur.passes.methods.score_change import GOLDEN
from secateur.passes.methods.select import Selection, pick_farthest_points
from secateur.passes.methods.select_windows import Parts

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
_ABSENT = -1e30


def windowed_max_min(
    score: Tensor, tokens: Tensor, k: int, layout: Layout, frames: Count = 2, rates: tuple[Positive, ...] = (1.0, 1.0)
) -> Selection:
    """Greedy k-center weighted by ``score [G,N]`` as ``weighted_max_min``, in every window of ``frames`` moments and
    kind of token by itself (SEATS, stage I).

    Cells share k in proportion to their tokens times their kind's rate, the published keep ratios of what is seen and
    heard; one token at least. Distances are cosines of ``tokens [G,N,D]``.
    """
    groups, count, _ = tokens.shape
    if k == count:
        return Selection(torch.arange(count, device=tokens.device).unsqueeze(0).expand(groups, count))
    quotas, parts = _cell_quotas(layout, k, frames, rates)
    units, weight = parts.gather(unit_rows(tokens.detach())), parts.gather(score.detach().unsqueeze(-1)).squeeze(-1)
    cells, size = parts.there.shape
    distance = (1.0 - units @ units.transpose(2, 3)) * weight.unsqueeze(2)
    # Places that hold no token lie infinitely near to everything: they are picked when nothing else is left.
    distance = torch.where(parts.there.unsqueeze(1), distance, -torch.inf)
    place = torch.arange(size, device=tokens.device)
    others = parts.there.unsqueeze(1) & parts.there.unsqueeze(2) & (place.unsqueeze(1) == place).logical_not()
    nearest = torch.where(others, distance, torch.inf).amin(dim=2)
    start = torch.where(parts.there, nearest, -torch.inf).reshape(groups * cells, size).argmax(dim=1)
    distance = distance.reshape(groups * cells, size, size)
    picks = pick_farthest_points(distance, start, max(quotas)).reshape(groups, cells * max(quotas))
    taken = torch.tensor([c * max(quotas) + step for c, quota in enumerate(quotas) for step in range(quota)])
    cell = torch.tensor([c for c, quota in enumerate(quotas) for _ in range(quota)])
    chosen = picks.index_select(1, taken) + cell * size
    whose = parts.tokens.reshape(1, cells * size).expand(groups, cells * size)
    return Selection(whose.gather(1, chosen).sort(dim=1).values)


def window_modality_quotas(
    score: Tensor,
    source: Tensor,
    k: int,
    layout: Layout,
    temperature: Positive = 0.1,
    frames: Count = 2,
    rates: tuple[Positive, ...] = (1.0, 1.0),
) -> Tensor:
    """Puts first the tokens that every window's and kind's quota picks by ``score [G,N]`` (SEATS, stage II).

    A kind's weight p in a window of ``frames`` moments is a softmax over windows of its mean score there, divided by
    ``temperature``. Of k, a window gets its part of the p averaged over kinds; within it a kind gets its part of
    ``p * K``, K the kind's tokens that stay if kinds leave in proportion to ``rates``. Parts are shared out by largest
    remainder (ties by place), none above what is there. Where k or the window suffices for one token of everything
    that is there, nothing gets less. ``source [G,N]`` finds the tokens in the layout. Compares all pairs of tokens.
    """
    table, kinds = layout.cells(frames)
    cells = max(table) + 1 + (-(max(table) + 1)) % kinds
    groups, windows = score.shape[0], cells // kinds
    where = torch.tensor(table, device=score.device).unsqueeze(0).expand(groups, len(table)).gather(1, source)
    members = (where.unsqueeze(2) == torch.arange(cells, device=score.device)).to(score.dtype)
    count = members.sum(dim=1)
    mean = (score.unsqueeze(1) @ members).squeeze(1) / count.clamp_min(1.0)
    count, mean = count.reshape(groups, windows, kinds), mean.reshape(groups, windows, kinds)
    present = (count > 0).to(score.dtype)
    weight = torch.softmax(torch.where(count > 0, mean / temperature, _ABSENT), dim=1) * present

    kept = torch.tensor([float(n) for n in modality_quotas(layout, k, rates)], device=score.device)
    total = torch.full((groups, 1), float(k), device=score.device)
    budget = _share_out(weight.mean(dim=2), total, present.sum(dim=2), count.sum(dim=2))
    quota = _share_out(weight * kept, budget.unsqueeze(2), present, count)
    quota = quota.reshape(groups, cells).gather(1, where)

    behind, ahead = score.unsqueeze(2), score.unsqueeze(1)
    place = torch.arange(score.shape[1], device=score.device)
    before = (ahead > behind) | ((ahead == behind) & (place < place.unsqueeze(1)))
    rank = (before & (where.unsqueeze(2) == where.unsqueeze(1))).to(score.dtype).sum(dim=2)
    return prefer(score, (rank < quota).to(score.dtype))


def unlike_sound(tokens: Tensor, source: Tensor, layout: Layout, frames: Count = 2) -> Tensor:
    """What is seen by how little it resembles what is heard in its window of ``frames`` moments, ``[G,N]``: a
    training-free proxy of ContextGuard (arXiv 2605.11605).

    The authors train a predictor from sound to coarse visual meaning and drop what it foretells. Here one minus the
    cosine of a token with the mean direction of its window's sound takes its place, among ``tokens [G,N,D]`` as the LLM
    reads them; 1 where nothing is heard. Sound itself comes first, at 3 to 4: among it the fractional parts of
    multiples of the golden ratio decide, so that the highest, however many, lie evenly over the row. ``source [G,N]``
    finds the tokens in the layout.
    """
    groups = tokens.shape[0]
    windows = [moment // frames for moment in layout.frames]
    sounds = list(accumulate(layout.modalities))
    spread = [3.0 + number * GOLDEN % 1.0 for number in sounds]
    window, heard, first = (
        torch.tensor(table, device=tokens.device).unsqueeze(0).expand(groups, len(table)).gather(1, source)
        for table in (windows, list(layout.modalities), spread)
    )
    sound = (heard == 1).to(tokens.dtype)
    unit = unit_rows(tokens)
    inside = (window.unsqueeze(1) == torch.arange(max(windows) + 1, device=tokens.device).unsqueeze(1)).to(tokens.dtype)
    pooled = (inside * sound.unsqueeze(1)) @ unit
    alike = (unit @ unit_rows(pooled).transpose(1, 2)).gather(2, window.unsqueeze(2)).squeeze(2)
    return torch.where(heard == 1, first.to(tokens.dtype), 1.0 - alike)


def modality_quotas(layout: Layout, k: int, rates: tuple[float, ...]) -> list[int]:
    """How many of k tokens each kind gets, in proportion to its tokens times its rate."""
    sizes = [layout.modalities.count(kind) for kind in range(max(layout.modalities) + 1)]
    return share_out([size * rate for size, rate in zip(sizes, rates, strict=False)], k, sizes)


def _cell_quotas(layout: Layout, k: int, frames: int, rates: tuple[float, ...]) -> tuple[list[int], Parts]:
    """Tokens that each cell keeps, and which token belongs to which cell that holds any."""
    table, kinds = layout.cells(frames)
    held = sorted(set(table))
    quotas = [0] * len(held)
    for kind, kept in enumerate(modality_quotas(layout, k, rates)):
        mine = [at for at, cell in enumerate(held) if cell % kinds == kind]
        sizes = [table.count(held[at]) for at in mine]
        for at, part in zip(mine, share_out(sizes, kept, sizes), strict=True):
            quotas[at] = part
    return quotas, Parts([held.index(cell) for cell in table])


def _share_out(weight: Tensor, total: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """``total [..., 1]`` in whole parts in proportion to ``weight [..., C]``, from ``least`` to ``most``: ``[..., C]``.

    With x the factor at which ``clamp(x * weight, least, most)`` sums to ``total``, parts are these numbers rounded
    down, and one more for the largest remainders. The sum grows with x in straight pieces, so x lies on the piece
    behind the last knee that is not above ``total``. Where ``least`` sums to more than ``total`` it is not heeded.
    """
    least = least * (least.sum(dim=-1, keepdim=True) <= total).to(weight.dtype)
    weight = weight.clamp_min(1e-12)
    starts, ends = least / weight, most / weight
    knees = torch.cat([starts, ends], dim=-1)
    bounds = least.unsqueeze(-2), most.unsqueeze(-2)
    sums = _between(knees.unsqueeze(-1) * weight.unsqueeze(-2), *bounds).sum(dim=-1)
    knee = torch.where(sums <= total, knees, 0.0).amax(dim=-1, keepdim=True)
    begun = _between(knee * weight, least, most).sum(dim=-1, keepdim=True)
    grows = ((starts <= knee) & (knee < ends)).to(weight.dtype)
    slope = (weight * grows).sum(dim=-1, keepdim=True).clamp_min(1e-12)
    exact = _between((knee + (total - begun) / slope) * weight, least, most)
    whole = exact.to(torch.int64).to(weight.dtype)  # rounds towards zero
    rest = exact - whole
    place = torch.arange(weight.shape[-1], device=weight.device)
    ahead = (rest.unsqueeze(-2) > rest.unsqueeze(-1)) | (
        (rest.unsqueeze(-2) == rest.unsqueeze(-1)) & (place < place.unsqueeze(1))
    )
    rank = ahead.to(weight.dtype).sum(dim=-1)
    return whole + (rank < total - whole.sum(dim=-1, keepdim=True)).to(weight.dtype)


def _between(value: Tensor, least: Tensor, most: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(value, least), most)


SCORES: dict[str, Callable[..., Tensor]] = {
    "unlike_sound": unlike_sound,
    "window_modality_quotas": window_modality_quotas,
}
SELECTORS: dict[str, Callable[..., Selection]] = {"windowed_max_min": windowed_max_min}
NEED_SOUND = ("unlike_sound",)
"""Functions that score all tokens alike where nothing is heard."""
