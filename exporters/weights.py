"""One weights file for all programs, in the safetensors format, written tensor by tensor.

ONNX initializers point into it by offset and length, so prefill and decode share one copy on disk and in
memory, and the model is never held in memory while compiling.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.exporters.checkpoint import Checkpoint, tied_names
from secateur.runtime.errors import UserError

WEIGHTS_FILE = "weights.safetensors"
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_ALIGNMENT = 64


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in the weights file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    length: int


@dataclass(frozen=True)
class WeightLayout:
    """Offsets of every tensor, known from shapes alone. ``aliases`` maps tied names to the stored one."""

    tensors: Mapping[str, Placed]
    header: bytes
    aliases: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return max((p.offset + p.length for p in self.tensors.values()), default=len(self.header))

    def find(self, name: str) -> Placed:
        return self.tensors[self.aliases.get(name, name)]


def plan_weights(used: Mapping[str, Tensor], model: nn.Module, dtype: torch.dtype) -> WeightLayout:
    """Lay out the parameters the programs use, in order of first use; tied parameters are stored once."""
    aliases = tied_names(model)
    entries: dict[str, Any] = {}
    placed: dict[str, tuple[int, int]] = {}
    position = 0
    for name, tensor in used.items():
        name = aliases.get(name, name)
        if name in entries:
            continue
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        length = tensor.numel() * kind.itemsize
        entries[name] = {
            "dtype": _KINDS[kind], "shape": list(tensor.shape), "data_offsets": [position, position + length]
        }  # fmt: skip
        placed[name] = (position, length)
        position += length
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    # Spaces after the JSON are part of the format; they put the first tensor on a cache line.
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    kinds = {v: k for k, v in _KINDS.items()}
    tensors = {
        name: Placed(tuple(entries[name]["shape"]), kinds[entries[name]["dtype"]], len(header) + start, length)
        for name, (start, length) in placed.items()
    }
    return WeightLayout(tensors, header, aliases)


def write_weights(
    layout: WeightLayout,
    checkpoint: Checkpoint,
    path: Path,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Stream the tensors out of the checkpoint, cast one by one; returns the SHA-256 of the file.

    ``on_bytes`` is told after each tensor how many bytes of how many are written. Raises UserError, before anything
    is written, for tensors that are missing or of another shape and for a disk that is too full.
    """
    digest = hashlib.sha256(layout.header)
    with checkpoint:
        checkpoint.require({name: place.shape for name, place in layout.tensors.items()})
        _require_space(path.parent, layout.size)
        with path.open("wb") as file:
            file.write(layout.header)
            for name, place in layout.tensors.items():
                data = checkpoint.read(name, place.shape).to(place.dtype).contiguous()
                raw = data.reshape(-1).view(torch.uint8).numpy().data
                file.write(raw)
                digest.update(raw)
                on_bytes(place.offset + place.length, layout.size)
    return digest.hexdigest()


def _require_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise UserError(
            f"disk full: the weights take {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            where=str(directory.parent),
            fix="free some space or choose another directory",
        )
