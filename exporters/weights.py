"""Where the programs' weights lie, and one file of them all, written tensor by tensor.

ONNX initializers point into safetensors files by offset and length, so prefill and decode share one copy on disk and
in memory, and the model is never held in memory while compiling. The files are the checkpoint's own (``shards.py``),
or the one written here, or both.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.exporters.checkpoint import KINDS, Checkpoint
from secateur.exporters.tensor_names import tied_names
from secateur.runtime.errors import UserError
from secateur.runtime.sizes import size_text

WEIGHTS_FILE = "weights.safetensors"
_NAMES = {kind: name for name, kind in KINDS.items()}
_ALIGNMENT = 64
MODES = ("stream", "reference", "copy")
"""How weights come into a bundle: written anew, as the checkpoint's files, as copies of them."""


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies: bytes ``offset`` to ``offset + length`` of ``file``, a path inside the bundle.

    ``shape`` is that of the bytes. Of a stack of matrices that lie there ``turned``, the last two dimensions are
    exchanged in it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    length: int
    file: str = WEIGHTS_FILE
    turned: bool = False


@dataclass(frozen=True)
class WeightLayout:
    """The place of every tensor, known from shapes and headers alone.

    ``mode`` is how the files get there, one of ``MODES``. ``header`` begins the file that is written: of all tensors
    in mode ``stream``, in the others of those that must be put together; it is empty where there are none. ``shards``
    are the checkpoint's files by their path in the bundle. ``aliases`` maps tied names to the stored one.
    """

    tensors: Mapping[str, Placed]
    header: bytes
    aliases: Mapping[str, str]
    mode: str = "stream"
    shards: Mapping[str, Path] = field(default_factory=dict)

    @property
    def written(self) -> dict[str, Placed]:
        """The tensors of the file that is written, in its order."""
        return {name: place for name, place in self.tensors.items() if place.file == WEIGHTS_FILE}

    @property
    def size(self) -> int:
        """Bytes of all tensors, and of the header before them where there is one."""
        return len(self.header) + sum(place.length for place in self.tensors.values())

    def find(self, name: str) -> Placed:
        return self.tensors[self.aliases.get(name, name)]


def plan_weights(used: Mapping[str, Tensor], model: nn.Module, dtype: torch.dtype) -> WeightLayout:
    """Lay out one file of the parameters the programs use, in order of first use; tied ones are stored once."""
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
            "dtype": _NAMES[kind], "shape": list(tensor.shape), "data_offsets": [position, position + length]
        }  # fmt: skip
        placed[name] = (position, length)
        position += length
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    # Spaces after the JSON are part of the format; they put the first tensor on a cache line.
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    tensors = {
        name: Placed(tuple(entries[name]["shape"]), KINDS[entries[name]["dtype"]], len(header) + start, length)
        for name, (start, length) in placed.items()
    }
    return WeightLayout(tensors, header, aliases)


def write_weights(
    layout: WeightLayout,
    checkpoint: Checkpoint,
    path: Path,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Stream the tensors out of the checkpoint, cast one by one, stacks expert by expert; returns the file's SHA-256.

    ``on_bytes`` is told after each tensor how many bytes of how many are written. Raises UserError, before anything
    is written, for tensors that are missing or of another shape and for a disk that is too full.
    """
    digest = hashlib.sha256(layout.header)
    written = layout.written
    size = len(layout.header) + sum(place.length for place in written.values())
    checkpoint.require({name: place.shape for name, place in written.items()})
    require_space(path.parent, size)
    with path.open("wb") as file:
        file.write(layout.header)
        for name, place in written.items():
            for piece in checkpoint.read_pieces(name, place.shape):
                data = piece.to(place.dtype).contiguous()
                raw = data.reshape(-1).view(torch.uint8).numpy().data
                file.write(raw)
                digest.update(raw)
            on_bytes(place.offset + place.length, size)
    return digest.hexdigest()


def require_space(directory: Path, size: int) -> None:
    """Raise UserError unless so many bytes are free; ``directory`` lies in the one that is named."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise UserError(
            f"disk full: the weights take {size_text(size)}, {size_text(free)} are free",
            where=str(directory.parent),
            fix="free some space or choose another directory",
        )
