"""Selectors and a merge where what is seen and what is heard have rates of their own (the omni ports that SEATS, arXiv
2605.20035, compares itself with).

How many tokens of each kind and window stay is known when a function is traced: from the layout, k and the rates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.compiler.layout import Layout, share_out
from secateur.passes.methods.rows import take_rows, unit_rows
from secateur.passes.methods.select import Selection
from secateur.passes.methods.select_windows import Parts, rank_within
from secateur.passes.methods.windows_in_time import Count, Positive, modality_quotas


def top_k_per_modality(
    score: Tensor,
    k: int,
    layout: Layout,
    rates: tuple[Positive, ...] = (1.0, 1.0),
    share: Literal["kept", "removed"] = "kept",
) -> Selection:
    """The highest of ``score [G,N]`` among what is seen, and the highest among what is heard.

    ``rates`` are keep ratios of what is seen and heard. With ``share`` "kept", k is shared out in proportion to a
    kind's tokens times its rate. With "removed" the N - k others are, in proportion to its tokens times what its rate
    leaves over 1: after a cut behind some whole layers the means over all layers are in the rates' proportions.
    One token of each kind stays where k suffices.
    """
    quotas = modality_quotas(layout, k, rates) if share == "kept" else _leave_over(layout, k, rates)
    picked = []
    for kind, quota in enumerate(quotas):
        if quota:
            mine = torch.tensor([i for i, other in enumerate(layout.modalities) if other == kind], device=score.device)
            best = score.index_select(1, mine).topk(quota, dim=1).indices
            picked.append(mine.unsqueeze(0).expand(score.shape[0], len(mine)).gather(1, best))
    return Selection(torch.cat(picked, dim=1).sort(dim=1).values)


def top_k_and_uniform_per_window(
    score: Tensor,
    k: int,
    layout: Layout,
    contextual: Annotated[float, Field(gt=0, lt=1)] = 0.05,
    frames: tuple[Count, ...] = (1, 2),
    rates: tuple[Positive, ...] = (1.0, 1.0),
) -> Selection:
    """In every window of one kind of token the highest of ``score [G,N]``, and merge targets spread evenly over what
    remains (VisionZip for video and sound).

    A window is ``frames`` moments long, of what is seen and of what is heard. k is shared out to kinds in proportion to
    their tokens times their rate, and within a kind to windows in proportion to their tokens. Of a window's n tokens
    round(``contextual`` * n) places, at least one, are targets: every floor(M / places)-th of its M tokens, in their
    order, that are not chosen by score. A window of one place gives it to the highest score.
    """
    sizes, quotas, part = _windows(layout, k, frames, rates)
    targets = [min(max(round(contextual * n), 1), quota - 1) if quota else 0
               for n, quota in zip(sizes, quotas, strict=True)]  # fmt: skip
    dominant = [quota - places for quota, places in zip(quotas, targets, strict=True)]
    steps = [(n - d) // places if places else 1 for n, d, places in zip(sizes, dominant, targets, strict=True)]

    def of_token(numbers: list[int]) -> Tensor:
        return torch.tensor([float(numbers[cell]) for cell in part], device=score.device)

    high = (rank_within(score, part) < of_token(dominant)).to(score.dtype)
    parts = Parts(part)
    left = parts.gather((1.0 - high).unsqueeze(-1)).squeeze(-1) * parts.there.to(score.dtype)
    place = (left.cumsum(dim=2) - left).flatten(1).index_select(1, parts.back)
    step = of_token(steps)
    turn = (place / step).to(torch.int64).to(score.dtype)  # rounds towards zero
    even = ((place - turn * step == 0) & (turn < of_token(targets))).to(score.dtype) * (1.0 - high)
    keep = (high + even).topk(k, dim=1).indices.sort(dim=1).values
    return Selection(keep, even.gather(1, keep) > 0.5)


def nearest_target_in_window(
    selection: Selection,
    tokens: Tensor,
    layout: Layout,
    frames: tuple[Count, ...] = (1, 2),
    average: Literal["assigned", "all"] = "assigned",
) -> Tensor:
    """Fold each dropped token into the target of its own window and kind that is most similar, ``mix [G,k,N]``.

    As ``nearest_target``, with the cosine of ``tokens [G,N,D]`` as similarity; a token without a target in its window
    goes. Windows are those of ``top_k_and_uniform_per_window``.
    """
    groups, count, _ = tokens.shape
    keep = selection.keep
    table = torch.tensor(_cells(layout, frames), device=tokens.device).unsqueeze(0).expand(groups, count)
    unit = unit_rows(tokens)
    alike = take_rows(unit, keep) @ unit.transpose(1, 2)
    fits = table.gather(1, keep).unsqueeze(2) == table.unsqueeze(1)
    if selection.targets is not None:
        fits = fits & selection.targets.unsqueeze(-1)
    nearest = torch.where(fits, alike, -2.0).argmax(dim=1)  # below any cosine

    stays = (torch.arange(count, device=tokens.device) == keep.unsqueeze(-1)).to(alike.dtype)
    dropped = 1.0 - stays.sum(dim=1, keepdim=True)
    survivor = torch.arange(keep.shape[1], device=tokens.device).unsqueeze(-1)
    assigned = ((survivor == nearest.unsqueeze(1)) & fits).to(alike.dtype) * dropped
    number = assigned.sum(dim=-1, keepdim=True)
    return (stays + assigned) / (1.0 + number) if average == "all" else stays + assigned / number.clamp_min(1.0)


def _leave_over(layout: Layout, k: int, rates: tuple[float, ...]) -> list[int]:
    """How many of k tokens each kind gets when the others are shared out, one at least where k suffices."""
    sizes = [layout.modalities.count(kind) for kind in range(max(layout.modalities) + 1)]
    least = [min(n, 1) for n in sizes] if k >= sum(n > 0 for n in sizes) else [0] * len(sizes)
    most = [n - one for n, one in zip(sizes, least, strict=True)]
    weights = [n * max(1.0 - rate, 1e-6) for n, rate in zip(sizes, rates, strict=False)]
    held = [kind for kind, n in enumerate(sizes) if n]
    gone = share_out([weights[i] for i in held], len(layout.modalities) - k, [most[i] for i in held])
    quotas = list(sizes)
    for kind, number in zip(held, gone, strict=True):
        quotas[kind] -= number
    return quotas


def _cells(layout: Layout, frames: tuple[int, ...]) -> list[int]:
    """Of every token the number of its window, windows of each kind by themselves; ``frames`` moments of each kind."""
    kinds = max(layout.modalities) + 1
    long = frames if len(frames) >= kinds else (*frames, *[frames[-1]] * kinds)
    cells = [(kind, moment // long[kind]) for moment, kind in zip(layout.frames, layout.modalities, strict=True)]
    number = {cell: index for index, cell in enumerate(sorted(set(cells)))}
    return [number[cell] for cell in cells]


def _windows(
    layout: Layout, k: int, frames: tuple[int, ...], rates: tuple[float, ...]
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of every window, how many of them stay, and every token's window."""
    part = _cells(layout, frames)
    sizes = [part.count(cell) for cell in range(max(part) + 1)]
    kind = dict(zip(part, layout.modalities, strict=True))
    quotas = [0] * len(sizes)
    for number, kept in enumerate(modality_quotas(layout, k, rates)):
        mine = [cell for cell in range(len(sizes)) if kind[cell] == number]
        if not mine:
            continue
        held = [sizes[cell] for cell in mine]
        for cell, quota in zip(mine, share_out(held, kept, held), strict=True):
            quotas[cell] = quota
    return sizes, quotas, part


SELECTORS: dict[str, Callable[..., Selection]] = {
    "top_k_and_uniform_per_window": top_k_and_uniform_per_window,
    "top_k_per_modality": top_k_per_modality,
}
MERGES: dict[str, Callable[..., Tensor]] = {"nearest_target_in_window": nearest_target_in_window}
