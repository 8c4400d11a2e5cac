"""Budgets that flow from windows of time to kinds of token (SEATS, arXiv 2605.20035).

A window is a few moments one after the other; what is seen in it and what is heard are its cells. The authors round
budgets and repair them one token at a time; where such a loop ends is computed here at once, at static shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Annotated, Literal

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
    score: Tensor,
    tokens: Tensor,
    k: int,
    layout: Layout,
    frames: Count = 2,
    rates: tuple[Positive, ...] = (1.0, 1.0),
    sound: Count | None = None,
) -> Selection:
    """Greedy k-center weighted by ``score [G,N]`` as ``weighted_max_min``, in every window of ``frames`` moments and
    kind of token by itself (SEATS, stage I).

    Cells share k in proportion to their tokens times their kind's rate, the published keep ratios of what is seen and
    heard; one token at least. Distances are cosines of ``tokens [G,N,D]``. With ``sound`` the windows of what is heard
    are so many of its tokens one after the other, whenever they are heard.
    """
    groups, count, _ = tokens.shape
    if k == count:
        return Selection(torch.arange(count, device=tokens.device).unsqueeze(0).expand(groups, count))
    quotas, parts = _cell_quotas(layout, k, frames, rates, sound)
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
    alone: Literal["windows", "highest"] = "windows",
) -> Tensor:
    """Puts first the tokens that every window's and kind's quota picks by ``score [G,N]`` (SEATS, stage II).

    A kind's weight p in a window of ``frames`` moments is a softmax over windows of its mean score there, divided by
    ``temperature``; a window without tokens of the kind has mean 0 and takes part. Of k, a window gets its part of the
    p averaged over both kinds, rounded (halves to even), from 1 to the tokens it has; then the largest gives one away,
    or the smallest with room takes one (the first of equals), until the budgets sum to k. In a window the seen get
    their part by ``p * K``, rounded, the heard the rest, both at most what is there, and a kind that is there 1 at
    least, even where the sum of all then exceeds k: there the largest quotas give one away again until it is k. K is
    the kind's part of k in proportion to its tokens times its rate. Where an earlier stage left one kind only
    ``score`` decides; where there was one from the start, ``alone`` says whether it has windows as well, or as in the
    authors' code ``score`` decides. ``source [G,N]`` finds the tokens in the layout. Compares all pairs of tokens.
    """
    if len(set(layout.modalities)) < 2 and alone == "highest":
        return score
    table, kinds = layout.cells(frames)
    cells = max(table) + 1 + (-(max(table) + 1)) % kinds
    groups, windows = score.shape[0], cells // kinds
    where = torch.tensor(table, device=score.device).unsqueeze(0).expand(groups, len(table)).gather(1, source)
    members = (where.unsqueeze(2) == torch.arange(cells, device=score.device)).to(score.dtype)
    count = members.sum(dim=1)
    mean = (score.unsqueeze(1) @ members).squeeze(1) / count.clamp_min(1.0)
    count, mean = count.reshape(groups, windows, kinds), mean.reshape(groups, windows, kinds)
    size = count.sum(dim=2)
    weight = torch.softmax(torch.where(size.unsqueeze(2) > 0, mean / temperature, _ABSENT), dim=1)

    part = torch.tensor([float(n) for n in modality_quotas(layout, k, rates)], device=score.device)
    largest = max(Counter(cell // kinds for cell in table).values())
    budget = _repair((weight.mean(dim=2) * k).round(), size, k, largest)
    quota = budget if kinds == 1 else _split_windows(budget, weight * part, count).reshape(groups, cells)
    quota = _lower(quota, k, largest).gather(1, where)

    behind, ahead = score.unsqueeze(2), score.unsqueeze(1)
    place = torch.arange(score.shape[1], device=score.device)
    before = (ahead > behind) | ((ahead == behind) & (place < place.unsqueeze(1)))
    rank = (before & (where.unsqueeze(2) == where.unsqueeze(1))).to(score.dtype).sum(dim=2)
    several = (count.sum(dim=1).amin(dim=1, keepdim=True) > 0).to(score.dtype)
    return prefer(score, (rank < quota).to(score.dtype) * several)


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


def _cell_quotas(
    layout: Layout, k: int, frames: int, rates: tuple[float, ...], sound: int | None
) -> tuple[list[int], Parts]:
    """Tokens that each cell keeps, and which token belongs to which cell that holds any."""
    heard = accumulate(layout.modalities)
    table = [
        (kind, (number - 1) // sound if kind and sound else moment // frames)
        for moment, kind, number in zip(layout.frames, layout.modalities, heard, strict=True)
    ]
    held = sorted(set(table))
    quotas = [0] * len(held)
    for kind, kept in enumerate(modality_quotas(layout, k, rates)):
        mine = [at for at, cell in enumerate(held) if cell[0] == kind]
        sizes = [table.count(held[at]) for at in mine]
        for at, part in zip(mine, share_out(sizes, kept, sizes), strict=True):
            quotas[at] = part
    return quotas, Parts([held.index(cell) for cell in table])


def _repair(budget: Tensor, size: Tensor, total: int, largest: int) -> Tensor:
    """Rounded ``budget [G,W]`` between 1 and ``size [G,W]`` (0 where that is 0), repaired to sum to ``total``.

    First :func:`_lower`; then adding one over and over to the smallest that has room raises all below some level to it,
    and the first of those at the level to one above. ``largest`` is no less than any size.
    """
    budget = _lower(torch.minimum(budget.clamp_min(1.0), size), total, largest)
    levels = _levels(largest, size)
    raised = torch.maximum(budget.unsqueeze(1), torch.minimum(size.unsqueeze(1), levels)).sum(dim=2)
    level = (raised <= total).to(size.dtype).sum(dim=1, keepdim=True)
    filled = torch.maximum(budget, torch.minimum(size, level))
    lacking = total - filled.sum(dim=1, keepdim=True)
    return filled + _first(((filled <= level) & (size > level)).to(size.dtype), lacking)


def _lower(budget: Tensor, total: int, largest: int) -> Tensor:
    """``budget [G,W]`` after taking one from the largest, the first of equals, until the sum is ``total`` at most or
    all are 1.

    That lowers all above some level to it, and the first of those at the level to one below.
    """
    level = torch.minimum(budget.unsqueeze(1), _levels(largest, budget)).sum(dim=2) < total
    level = level.to(budget.dtype).sum(dim=1, keepdim=True) + 1.0
    capped = torch.minimum(budget, level)
    excess = capped.sum(dim=1, keepdim=True) - total
    return capped - _first(((budget >= level) & (level > 1.0)).to(budget.dtype), excess)


def _levels(largest: int, like: Tensor) -> Tensor:
    """1 to ``largest + 1`` as a column."""
    return torch.arange(1, largest + 2, device=like.device).to(like.dtype).unsqueeze(1)


def _first(mask: Tensor, number: Tensor) -> Tensor:
    """``mask [G,W]`` (1 or 0) where no more than ``number [G,1]`` ones come up to and with it."""
    return mask * (mask.cumsum(dim=1) <= number).to(mask.dtype)


def _split_windows(budget: Tensor, due: Tensor, count: Tensor) -> Tensor:
    """What is seen and what is heard in windows of ``budget [G,W]`` tokens, in proportion to ``due [G,W,2]`` and at
    most ``count [G,W,2]``: ``[G,W,2]``. A kind that is there and would get none takes one, of the other kind's where
    that has more than one."""
    there, sounds = count[:, :, 0], count[:, :, 1]
    fraction = due[:, :, 0] / (due.sum(dim=2) + 1e-12)
    seen = torch.minimum((budget * fraction).round(), there)
    heard = torch.minimum(budget - seen, sounds)
    seen = seen + torch.minimum(budget - seen - heard, there - seen)

    none = (there > 0) & (seen < 1)
    seen = torch.where(none, 1.0, seen)
    heard = torch.where(none & (heard > 1), torch.minimum(sounds, budget - seen).clamp_min(1.0), heard)
    none = (sounds > 0) & (heard < 1)
    heard = torch.where(none, 1.0, heard)
    seen = torch.where(none & (seen > 1), torch.minimum(there, budget - heard).clamp_min(1.0), seen)
    return torch.stack([seen, heard], dim=2)


SCORES: dict[str, Callable[..., Tensor]] = {
    "unlike_sound": unlike_sound,
    "window_modality_quotas": window_modality_quotas,
}
SELECTORS: dict[str, Callable[..., Selection]] = {"windowed_max_min": windowed_max_min}
NEED_SOUND = ("unlike_sound",)
"""Functions that score all tokens alike where nothing is heard."""
