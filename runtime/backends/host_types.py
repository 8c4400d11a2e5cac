"""How numbers of a program's types lie in host memory. NumPy has no bf16: its bits are kept as uint16."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.backends import NUMPY_DTYPES
from secateur.runtime.errors import UserError

STORAGE: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(kind) for name, kind in NUMPY_DTYPES.items()},
    "bf16": np.dtype(np.uint16),
}
"""A port's type -> the NumPy type of the same size that holds its bits."""


def byte_size(shape: tuple[int, ...] | list[int], dtype: str) -> int:
    return prod(shape) * STORAGE[dtype].itemsize


def store(values: NDArray[Any], dtype: str, out: NDArray[Any]) -> None:
    """Put ``values`` into ``out``, of type ``STORAGE[dtype]`` and the same shape, converted to ``dtype``.

    What is too large for fp16 becomes infinity, as it does on the device.
    """
    if dtype == "bf16":
        out[...] = to_bf16(values)
        return
    with np.errstate(over="ignore"):
        out[...] = values


def load(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A copy of ``stored``, of type ``STORAGE[dtype]``, as numbers: bf16 as float32, others as their own type."""
    return from_bf16(stored) if dtype == "bf16" else stored.copy()


def to_bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of the nearest bf16, of two equally near the even one; NaN stays NaN."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
    bits = single.view(np.uint32)
    # Half of the last place that stays, less one where the number below is even; a carry rounds up to infinity.
    nearest = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(single), quiet, nearest).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The same numbers as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def check_dtype(dtype: str, where: str) -> None:
    if dtype not in STORAGE:
        raise UserError(f"no type {dtype!r}", where=where, available=STORAGE)
