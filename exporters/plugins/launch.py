"""What it takes to launch a kernel besides the addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton ``kernel``, every size of it known.

    ``pointers``: the kernel's first parameters in order, inputs before outputs, with their element types ("fp32",
    "fp16", "bf16", "i32"), or None for one that is left out. ``constants``: the parameters behind them, which are
    compiled in: sizes are static, so no scalar is passed at run time.
    """

    kernel: Any
    grid: tuple[int, int, int]
    pointers: Mapping[str, str | None]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2


def cover(count: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``count`` and ``least``."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def ceil_divide(count: int, size: int) -> int:
    return -(-count // size)


def attention_blocks(width: int, dtype: str) -> tuple[int, int]:
    """Query rows and keys of a tile: the tiles of queries and of two stages of keys fit 48 KiB of shared memory, which
    every architecture gives without being asked."""
    bytes_per_row = cover(width) * (4 if dtype == "fp32" else 2)
    rows = 64 if bytes_per_row <= 256 else 32 if bytes_per_row <= 512 else 16
    return rows, min(rows, 32)


Shapes = Sequence[Sequence[int]]
