"""The header of a safetensors file: 8 bytes of length, then JSON that says where each tensor lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_LONGEST = 100 << 20  # the format's own bound
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: ``dtype`` as the format spells it (F32, BF16, …), ``offset`` from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class WeightHeader:
    """The tensors of a file by name, in the header's order, and the SHA-256 of the header as it lies in the file."""

    tensors: Mapping[str, TensorEntry]
    sha256: str


def hash_header(path: Path) -> str:
    """SHA-256 of the header's bytes, its length included. Raises ValueError when the file is too short for it."""
    return hashlib.sha256(_read_bytes(path)).hexdigest()


def read_header(path: Path) -> WeightHeader:
    """The header of a file, held against the file's size.

    Tensors must follow one another without gap or overlap and end where the file ends, and have as many bytes as
    their shape and dtype say. Raises ValueError that names what is wrong in a few words, OSError as reading does.
    """
    raw = _read_bytes(path)
    tensors: dict[str, TensorEntry] = {}
    try:
        content = json.loads(raw[8:])
        for name, entry in content.items():
            if name != "__metadata__":
                tensors[name] = _read_entry(entry, len(raw))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    end = len(raw)
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.length)):
        if tensor.offset != end:
            raise ValueError("offsets")
        end += tensor.length
    if end != path.stat().st_size:
        raise ValueError("data length")
    return WeightHeader(tensors, hashlib.sha256(raw).hexdigest())


def _read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, _LONGEST):
            raise ValueError("header length")
        return start + file.read(length)


def _read_entry(entry: Any, data: int) -> TensorEntry:
    begin, end = entry["data_offsets"]
    kind, shape = entry["dtype"], tuple(entry["shape"])
    numbers = (begin, end, *shape)
    if not isinstance(kind, str) or not all(type(n) is int and n >= 0 for n in numbers) or begin > end:
        raise ValueError("offsets")
    if kind in _BYTES and end - begin != prod(shape) * _BYTES[kind]:
        raise ValueError("tensor length")
    return TensorEntry(kind, shape, data + begin, end - begin)
