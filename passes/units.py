"""From numbers per patch to numbers per visual token, where a token is a square of patches.

Families that put ``merge`` by ``merge`` patches together behind their tower have one visual token per square, row by
row as the squares lie in the image. Attention *to* a square is the sum over its patches, so that what a query pays
still adds up to one; attention *of* a square, and its queries, keys and values, are the mean over its patches. Two
numbers for ``merge`` are patches down and across: of sound, whose positions lie in one row, (1, 2).
"""

from __future__ import annotations

from torch import Tensor

Merge = int | tuple[int, int]


def sum_units(values: Tensor, grid: tuple[int, int], merge: Merge, dim: int = -1) -> Tensor:
    """``[...,P,...]`` with the patches of an image at ``dim`` -> ``[...,N,...]``, sums over each token's patches.

    ``grid`` is rows and columns of tokens, N their product, P = N times the patches of a token. Patches count row by
    row.
    """
    if merge == 1:
        return values
    down, across = sides(merge)
    dim %= values.dim()
    rows, columns = grid
    split = values.reshape(*values.shape[:dim], rows, down, columns, across, *values.shape[dim + 1 :])
    whole = split.sum((dim + 1, dim + 3))
    return whole.reshape(*values.shape[:dim], rows * columns, *values.shape[dim + 1 :])


def mean_units(values: Tensor, grid: tuple[int, int], merge: Merge, dim: int = -1) -> Tensor:
    """The same with means."""
    down, across = sides(merge)
    return values if merge == 1 else sum_units(values, grid, merge, dim) / (down * across)


def sides(merge: Merge) -> tuple[int, int]:
    """Patches of a token down and across."""
    return (merge, merge) if isinstance(merge, int) else merge
