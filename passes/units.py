"""From numbers per patch to numbers per visual token, where a token is a square of patches.

Families that put ``merge`` by ``merge`` patches together behind their tower have one visual token per square, row by
row as the squares lie in the image. Attention *to* a square is the sum over its patches, so that what a query pays
still adds up to one; attention *of* a square, and its queries, keys and values, are the mean over its patches. Two
numbers for ``merge`` are patches down and across: of sound, whose positions lie in one row, (1, 2). Where a grid of
patches is resized (:class:`Pooled`) a token is the mean of patches by their weights in it, and what is paid to a patch
is shared out among the tokens it counts in, by the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.compiler.pooled import Pooled, bilinear_weights

Merge = int | tuple[int, int] | Pooled


def sum_units(values: Tensor, grid: tuple[int, int], merge: Merge, dim: int = -1) -> Tensor:
    """``[...,P,...]`` with the patches of an image at ``dim`` -> ``[...,N,...]``, sums over each token's patches.

    ``grid`` is rows and columns of tokens, N their product, P = N times the patches of a token. Patches count row by
    row.
    """
    if merge == 1:
        return values
    if isinstance(merge, Pooled):
        return _resize(values, grid, merge, dim, shared=True)
    down, across = sides(merge)
    dim %= values.dim()
    rows, columns = grid
    split = values.reshape(*values.shape[:dim], rows, down, columns, across, *values.shape[dim + 1 :])
    whole = split.sum((dim + 1, dim + 3))
    return whole.reshape(*values.shape[:dim], rows * columns, *values.shape[dim + 1 :])


def mean_units(values: Tensor, grid: tuple[int, int], merge: Merge, dim: int = -1) -> Tensor:
    """The same with means."""
    if isinstance(merge, Pooled):
        return _resize(values, grid, merge, dim, shared=False)
    down, across = sides(merge)
    return values if merge == 1 else sum_units(values, grid, merge, dim) / (down * across)


def sides(merge: int | tuple[int, int]) -> tuple[int, int]:
    """Patches of a token down and across."""
    return (merge, merge) if isinstance(merge, int) else merge


def _resize(values: Tensor, grid: tuple[int, int], merge: Pooled, dim: int, shared: bool) -> Tensor:
    down, across = (
        torch.tensor(bilinear_weights(before, after)) for before, after in zip(merge.grid, grid, strict=True)
    )
    if shared:
        # What is paid to a patch that counts in no token is lost: a grid that shrinks to less than half has some.
        down, across = (weights / weights.sum(0).where(weights.sum(0) > 0, 1.0) for weights in (down, across))
    last = values.transpose(dim, -1)
    # Rows, then columns: the grid lies in the last dimension.
    split = last.reshape(-1, *merge.grid) @ across.t()
    whole = (down @ split).reshape(*last.shape[:-1], grid[0] * grid[1])
    return whole.transpose(dim, -1)
