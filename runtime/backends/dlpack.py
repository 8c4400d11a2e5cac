"""DLPack capsules of device memory, made and read with ctypes: no framework is needed on either side.

The structures are those of DLPack before version 1, which every consumer still takes
(https://dmlc.github.io/dlpack/latest/python_spec.html).
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, PYFUNCTYPE, Structure, c_char_p, c_int32, c_int64, c_void_p, py_object, pythonapi
from dataclasses import dataclass
from math import prod
from typing import Any

from secateur.runtime.errors import UserError

CPU, CUDA = 1, 2
"""Kinds of device, as DLPack numbers them."""
_CODES = {"fp32": (2, 32), "fp16": (2, 16), "bf16": (4, 16), "int64": (0, 64), "int32": (0, 32), "bool": (6, 8)}
"""A port's type -> its code and bits."""
_NAME = b"dltensor"


class _Device(Structure):
    _fields_ = (("kind", c_int32), ("number", c_int32))


class _Type(Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(Structure):
    _fields_ = (
        ("data", c_void_p), ("device", _Device), ("dimensions", c_int32), ("type", _Type), ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


_Deleter = CFUNCTYPE(None, c_void_p)


class _Managed(Structure):
    _fields_ = (("tensor", _Tensor), ("context", c_void_p), ("deleter", _Deleter))


# The same functions of the interpreter twice: a capsule that is being destroyed must not be counted as used.
_new = PYFUNCTYPE(py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", pythonapi))
_pointer = PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", pythonapi))
_dying_is = PYFUNCTYPE(ctypes.c_int, c_void_p, c_char_p)(("PyCapsule_IsValid", pythonapi))
_dying_pointer = PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", pythonapi))

_exported: dict[int, tuple[Any, ...]] = {}
"""What capsules that are in use need, by their structure's address."""


@_Deleter
def _delete(address: int) -> None:
    _exported.pop(address, None)


@PYFUNCTYPE(None, c_void_p)
def _destroy(capsule: int) -> None:
    # A consumer renames the capsule and calls the deleter itself; one that nobody took still has its name.
    if _dying_is(capsule, _NAME):
        _exported.pop(_dying_pointer(capsule, _NAME), None)


def export_capsule(address: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int], owner: object) -> Any:
    """A capsule of row-major memory at ``address``; ``owner`` lives until its consumer is done with it."""
    sizes = (c_int64 * max(len(shape), 1))(*shape)
    managed = _Managed()
    managed.tensor = _Tensor(
        address, _Device(*device), len(shape), _Type(*_CODES[dtype], 1), ctypes.cast(sizes, POINTER(c_int64)), None, 0
    )
    managed.deleter = _delete
    place = ctypes.addressof(managed)
    _exported[place] = (managed, sizes, owner)
    return _new(place, _NAME, ctypes.cast(_destroy, c_void_p))


@dataclass(frozen=True)
class Given:
    """Somebody else's device memory; it stays while ``capsule`` does."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    capsule: Any


def read_capsule(values: Any, stream: int, device: tuple[int, int]) -> Given:
    """What an object with ``__dlpack__`` holds on ``device``; work of the stream numbered ``stream`` may read it.

    Raises UserError for a type no program has, or memory that is not row-major. The capsule is left as it is, so that
    it frees what it holds when it is dropped.
    """
    capsule = values.__dlpack__(stream=stream)
    tensor = _Managed.from_address(_pointer(capsule, _NAME)).tensor
    if (tensor.device.kind, tensor.device.number) != device:
        raise UserError("its memory is not where it says", where="DLPack")
    kind = (tensor.type.code, tensor.type.bits)
    dtype = next((name for name, code in _CODES.items() if code == kind and tensor.type.lanes == 1), None)
    if dtype is None:
        raise UserError(f"type code {kind[0]} of {kind[1]} bits", where="DLPack", available=_CODES)
    shape = tuple(tensor.shape[i] for i in range(tensor.dimensions))
    if tensor.strides and prod(shape):
        dense = [prod(shape[i + 1 :]) for i in range(len(shape))]
        if any(size > 1 and tensor.strides[i] != dense[i] for i, size in enumerate(shape)):
            raise UserError("the memory is not row-major", where="DLPack", fix="make it contiguous first")
    return Given(int(tensor.data or 0) + int(tensor.byte_offset), shape, dtype, capsule)
