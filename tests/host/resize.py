"""Pillow's resize in NumPy, from what docs/ports.md says of it: two passes in fixed point, 8 bits between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

BITS = 22
Array = np.ndarray[Any, Any]


def _box(x: float) -> float:
    return float(-0.5 < x <= 0.5)


def _bilinear(x: float) -> float:
    return max(0.0, 1 - abs(x))


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0:
        return 1.0
    a, b = (float(np.float32(each)) for each in (0.54, 0.46))
    return 0.0 if x >= 1 else math.sin(math.pi * x) / (math.pi * x) * (a + b * math.cos(math.pi * x))


def _bicubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "box": (_box, 0.5), "bilinear": (_bilinear, 1), "hamming": (_hamming, 1), "bicubic": (_bicubic, 2),
    "lanczos": (_lanczos, 3),
}  # fmt: skip
"""Name -> the function, and how far from 0 it reaches."""


def resize(picture: Array, height: int, width: int, filter: str, passes: str) -> Array:
    """uint8 [H, W, 3] to uint8 [height, width, 3]."""
    if picture.shape[:2] == (height, width):
        return picture
    if filter == "nearest":
        rows, columns = (_nearest(*sizes) for sizes in zip(picture.shape[:2], (height, width), strict=True))
        return picture[rows][:, columns]
    lost = picture.shape[0] - height, picture.shape[1] - width
    vertical_first = passes == "by_reduction" and lost[0] > 0 and lost[0] > 2 * lost[1]
    for axis in (0, 1) if vertical_first else (1, 0):
        picture = _pass(picture, axis, (height, width)[axis], filter)
    return picture


def _nearest(size: int, to: int) -> Array:
    """Added up one after the other, as the library does it: products round otherwise."""
    step = size / to
    return np.minimum(np.cumsum([step * 0.5, *[step] * (to - 1)]).astype(int), size - 1)


def _pass(picture: Array, axis: int, to: int, filter: str) -> Array:
    size = picture.shape[axis]
    if size == to:
        return picture
    function, support = FILTERS[filter]
    scale = size / to
    wider = max(1.0, scale)
    lines = np.moveaxis(picture, axis, 0).astype(np.int64)
    made = np.empty((to, *lines.shape[1:]), np.uint8)
    for place in range(to):
        centre = (place + 0.5) * scale
        first = max(0, int(centre - support * wider + 0.5))
        last = min(size, int(centre + support * wider + 0.5))
        weights = np.array([function((at - centre + 0.5) / wider) for at in range(first, last)])
        weights = weights / weights.sum()
        fixed = np.trunc(weights * (1 << BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
        total = np.tensordot(fixed, lines[first:last], 1) + (1 << BITS - 1)
        made[place] = np.clip(total >> BITS, 0, 255)
    return np.moveaxis(made, 0, axis)
