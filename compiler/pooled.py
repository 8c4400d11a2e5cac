"""Grids of patches, or of tokens, that are resized to grids of fewer tokens, by bilinear interpolation."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Pooled:
    """The grid of patches that becomes a smaller grid of tokens."""

    grid: tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """What the tiles of an image make when they are put together, where that is too large and becomes smaller."""

    places: tuple[int, ...]
    """Of its tokens, row by row, where each lies among those of the image's grids."""
    before: tuple[int, int]
    """Its rows and columns of tokens."""
    after: tuple[int, int]
    """Those that reach the decoder."""


def bilinear_weights(before: int, after: int) -> list[list[float]]:
    """What each of ``before`` values in a line counts in each of ``after``: rows of the weights, which sum to 1.

    The centre of result i lies at ``(i + 1/2) * before / after - 1/2``, and the two values around it share it by their
    nearness; the ends stand for what lies beyond them. That is what ``torch.nn.functional.interpolate`` computes with
    mode "bilinear" in each direction.
    """
    found = []
    for index in range(after):
        centre = max((index + 0.5) * before / after - 0.5, 0.0)
        low = min(math.floor(centre), before - 1)
        high = min(low + 1, before - 1)
        row = [0.0] * before
        row[low] += 1.0 - (centre - low)
        row[high] += centre - low
        found.append(row)
    return found
