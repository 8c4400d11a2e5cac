"""Selectors that keep some tokens outright and fold a part of the others together, and a merge that weighs by score.

They return :class:`Selection` with ``assigned [G,N]``, which says into which survivor a token goes, if into any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.compiler.layout import Grid
from secateur.passes.methods.rows import ranks, take_rows, unit_rows
from secateur.passes.methods.select import Selection, top_k


def top_k_and_clusters(
    score: Tensor,
    tokens: Tensor,
    k: int,
    recycled: Annotated[float, Field(ge=0, lt=1)] = 0.3,
    per_cluster: Annotated[int, Field(ge=1)] = 10,
) -> Selection:
    """The highest of ``score [G,N]``, and clusters of the next highest (SparseVLM's recycling).

    When m tokens are left over, the best n = floor(``recycled`` * m) + 1 of them are clustered around c =
    floor(n / ``per_cluster``) + 1 of their own, and the rest go. Of all splits of k into outright survivors and
    centres the one with the most survivors is taken whose m gives this c. When k is too small for any, one token
    survives and the others are centres. Nothing is clustered when k = N.

    Centres are density peaks of ``tokens [G,N,D]``: distance is Euclidean over sqrt(D), density the exponential of
    minus the mean square distance to the c nearest (itself included), and a centre has a high product of density
    and distance to the nearest denser token; the densest always is one. Logarithms of both are compared: the densities
    of tokens some ten apart would all be zero. Of equally dense tokens the first counts as denser; the authors break
    ties by random noise.
    """
    groups, count = score.shape
    top, centres = _split(count, k, recycled, per_cluster)
    if centres == 0:
        return _pair(top_k(score, k).keep, count)
    number = max(math.floor(recycled * (count - top)) + 1, centres)
    order = score.topk(top + number, dim=1).indices
    pool = order[:, top:]
    peaks, cluster = _find_peaks(take_rows(tokens, pool), centres)
    keep, moved = torch.cat([order[:, :top], pool.gather(1, peaks)], dim=1).sort(dim=1)
    position = torch.arange(k, device=score.device).unsqueeze(0).expand(groups, k)
    place = torch.zeros_like(moved).scatter(1, moved, position)
    assigned = torch.full((groups, count), k, dtype=torch.int64, device=score.device)
    assigned = assigned.scatter(1, pool, place[:, top:].gather(1, cluster)).scatter(1, keep, position)
    return Selection(keep, assigned=assigned)


def top_k_and_cells(score: Tensor, k: int, grid: Grid, cells: Annotated[float, Field(ge=1)] = 27 / 15.6) -> Selection:
    """The highest of ``score [G,N]``, and the best of each cell of the grid among the others (VFlowOpt's recycling).

    Cells divide a frame's sides into ``cells`` equal parts, the last one possibly cut off. Of the k survivors c =
    floor(``cells`` ** 2) per frame, at most k - 1, are the highest tokens of their cell among those not kept
    outright, and the other tokens of the cell go into them. With more cells than c those with the highest token
    win and the other cells' tokens go; with fewer, the next highest tokens fill up. Nothing goes when k = N.
    """
    groups, count = score.shape
    number = min(math.floor(cells**2) * grid.frames, k - 1)
    if k == count or number == 0:
        return _pair(top_k(score, k).keep, count)
    cells_of = _cell_of(grid, grid.rows / cells, grid.columns / cells)
    cell = torch.tensor(cells_of, device=score.device)
    outright = score.topk(k - number, dim=1).indices
    left = torch.ones_like(score).scatter(1, outright, 0.0) > 0
    member = cell == torch.arange(max(cells_of) + 1, device=score.device).unsqueeze(1)
    best = torch.where(left.unsqueeze(1) & member, score.unsqueeze(1), -math.inf).argmax(dim=2)
    leader = best.index_select(1, cell)
    position = torch.arange(count, device=score.device).unsqueeze(0).expand(groups, count)
    order = ranks(score)
    value = torch.where(left, torch.where(leader == position, order + count, order), -1.0)
    keep = torch.cat([outright, value.topk(number, dim=1).indices], dim=1).sort(dim=1).values
    return _pair(keep, count, leader)


def merge_windows(tokens: Tensor, k: int, grid: Grid, side: Annotated[int, Field(ge=2)] = 3) -> Selection:
    """Fold the most uniform windows of ``side`` by ``side`` tokens into one token each (MustDrop's spatial merging).

    A window is as uniform as the mean cosine of its pairs of ``tokens [G,N,D]``; its last token stays for all. Windows
    are folded, the most uniform first, until N - k tokens are gone, the last of them in part. With k below the number
    of windows the first windows' tokens go altogether.
    """
    groups, count, _ = tokens.shape
    cells = _cell_of(grid, side, side)
    windows = max(cells) + 1
    last = {window: token for token, window in enumerate(cells)}
    anchor = torch.tensor([last[window] for window in cells], device=tokens.device)
    cell = torch.tensor(cells, device=tokens.device)
    member = (cell == torch.arange(windows, device=tokens.device).unsqueeze(1)).to(tokens.dtype)
    size = member.sum(dim=1)
    added = member @ unit_rows(tokens)
    pairs = (size * (size - 1.0)).clamp_min(1.0)
    uniform = torch.where(size > 1.0, ((added * added).sum(dim=2) - size) / pairs, -2.0)

    position = torch.arange(count, device=tokens.device)
    # How late a token goes: windows by uniformity, tokens of a window in order, what stays for a window behind all. A
    # window's numbers are as many as its places, so that they are exact in float32 for millions of tokens.
    places = side * side
    inside = torch.tensor([float(token % grid.columns % side + token // grid.columns % grid.rows % side * side)
                           for token in range(count)], device=tokens.device)  # fmt: skip
    turn = (windows - 1.0 - ranks(uniform)).index_select(1, cell) * places + inside
    turn = torch.where(position == anchor, float(windows * places) + cell, turn)
    keep = turn.topk(k, dim=1).indices.sort(dim=1).values
    return _pair(keep, count, anchor.unsqueeze(0).expand(groups, count))


def merge_by_score(selection: Selection, score: Tensor) -> Tensor:
    """Each survivor becomes the average of itself and its tokens, weighed by ``score [G,N]`` >= 0, ``mix [G,k,N]``.

    Without pairs, or where no score is above zero, survivors stay as they are.
    """
    position = torch.arange(score.shape[1], device=score.device)
    stays = (selection.keep.unsqueeze(2) == position).to(score.dtype)
    if selection.assigned is None:
        return stays
    survivor = torch.arange(selection.keep.shape[1], device=score.device).unsqueeze(1)
    weight = (selection.assigned.unsqueeze(1) == survivor).to(score.dtype) * score.unsqueeze(1)
    total = weight.sum(dim=2, keepdim=True)
    return torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), stays)


def _split(count: int, k: int, recycled: float, per_cluster: int) -> tuple[int, int]:
    """Outright survivors and centres of :func:`top_k_and_clusters`; they add up to k."""
    for top in range(k, 0, -1):
        left = count - top
        centres = (math.floor(recycled * left) + 1) // per_cluster + 1 if left else 0
        if top + centres <= k:
            return top, k - top
    return 1, k - 1


def _find_peaks(rows: Tensor, centres: int) -> tuple[Tensor, Tensor]:
    """The density peaks among ``rows [G,n,D]``, ``[G,c]``, and the peak each row is nearest to, ``[G,n]`` in 0..c-1."""
    groups, count, width = rows.shape
    position = torch.arange(count, device=rows.device)
    square = (rows * rows).sum(dim=2)
    apart = square.unsqueeze(2) + square.unsqueeze(1) - 2.0 * (rows @ rows.transpose(1, 2))
    # Nearest neighbours of each other tie in density, so rounding must not tell the two halves apart.
    apart = torch.where(position.unsqueeze(1) < position, apart, apart.transpose(1, 2))
    apart = torch.where(position.unsqueeze(1) == position, 0.0, apart.clamp_min(0.0)) / width
    distance = torch.sqrt(apart)
    near = distance.topk(centres, dim=2, largest=False).values
    density = -(near * near).mean(dim=2)  # its logarithm
    mine, other = density.unsqueeze(2), density.unsqueeze(1)
    denser = (other > mine) | ((other == mine) & (position < position.unsqueeze(1)))
    # Larger than any distance, so that the densest row, which has no denser one, always is a peak.
    beyond = 2.0 * distance.amax(dim=2).amax(dim=1).unsqueeze(1).unsqueeze(1)
    to_denser = torch.where(denser, distance, beyond).amin(dim=2)
    peaks = (density + torch.log(to_denser)).topk(centres, dim=1).indices
    cluster = (-take_rows(distance, peaks)).argmax(dim=1)
    own = torch.arange(centres, device=rows.device).unsqueeze(0).expand(groups, centres)
    return peaks, cluster.scatter(1, peaks, own)


def _cell_of(grid: Grid, high: float, wide: float) -> list[int]:
    """The cell each token lies in when frames are cut into cells of ``high`` by ``wide`` tokens."""
    rows = [math.floor(row / high) for row in range(grid.rows)]
    columns = [math.floor(column / wide) for column in range(grid.columns)]
    down, across = rows[-1] + 1, columns[-1] + 1
    return [(f * down + y) * across + x for f in range(grid.frames) for y in rows for x in columns]


def _pair(keep: Tensor, count: int, leader: Tensor | None = None) -> Selection:
    """``keep [G,k]`` of ``count`` tokens, where a token that goes joins its ``leader [G,N]`` if that one stays."""
    groups, k = keep.shape
    position = torch.arange(k, device=keep.device).unsqueeze(0).expand(groups, k)
    own = torch.full((groups, count), k, dtype=torch.int64, device=keep.device).scatter(1, keep, position)
    return Selection(keep, assigned=own if leader is None else torch.where(own < k, own, own.gather(1, leader)))


SELECTORS: dict[str, Callable[..., Selection]] = {
    "merge_windows": merge_windows,
    "top_k_and_cells": top_k_and_cells,
    "top_k_and_clusters": top_k_and_clusters,
}
MERGES: dict[str, Callable[..., Tensor]] = {"merge_by_score": merge_by_score}
