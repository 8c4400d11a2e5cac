"""One weights file for all programs, in the safetensors format, written tensor by tensor.

ONNX initializers point into it by offset and length, so prefill and decode share one copy on disk and in
memory, and the model is never held in memory while compiling.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    aliases = _tied_names(model)
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

    ``on_bytes`` is told after each tensor how many bytes of how many are written.
    """
    digest = hashlib.sha256(layout.header)
    with path.open("wb") as file, checkpoint:
        checkpoint.require(layout.tensors)
        file.write(layout.header)
        for name, place in layout.tensors.items():
            data = checkpoint.read(name, place.shape).to(place.dtype).contiguous()
            raw = data.reshape(-1).view(torch.uint8).numpy().data
            file.write(raw)
            digest.update(raw)
            on_bytes(place.offset + place.length, layout.size)
    return digest.hexdigest()


class Checkpoint:
    """The tensors of a model directory under their names in the Hugging Face model.

    Names in the files are mapped by transformers' own conversion table. Raises UserError for a directory without
    safetensors, missing tensors (lists them), shapes that do not fit, and conversions that are more than a new name.
    """

    def __init__(self, directory: Path, model: nn.Module) -> None:
        self.directory = directory
        self.model = model
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    @cached_property
    def location(self) -> dict[str, tuple[str, str]]:
        """Name in the model -> (file, name in the file)."""
        found: dict[str, tuple[str, str]] = {}
        rename = _renamer(self.model)
        for file, keys in self._files().items():
            for key in keys:
                found.setdefault(rename(key), (file, key))
        aliases = _tied_names(self.model)
        for name in list(found):
            found.setdefault(aliases.get(name, name), found[name])
        return found

    def require(self, names: Iterable[str]) -> None:
        """Check that every tensor exists."""
        missing = [n for n in names if n not in self.location]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(
                f"checkpoint lacks {len(missing)} tensors: {shown}", where=str(self.directory),
                fix="download the whole checkpoint, or check that config.json belongs to it",
            )  # fmt: skip

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.require([name])
        file, key = self.location[name]
        if file not in self._open:
            from safetensors import safe_open

            self._open[file] = self._stack.enter_context(safe_open(str(self.directory / file), framework="pt"))
        tensor: Tensor = self._open[file].get_tensor(key)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"tensor {key} has shape {tuple(tensor.shape)}, the configuration says {shape}",
                where=str(self.directory / file),
                fix="check that config.json belongs to this checkpoint",
            )
        return tensor

    def _files(self) -> dict[str, list[str]]:
        from safetensors import SafetensorError, safe_open

        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            files: dict[str, list[str]] = {}
            for key, file in json.loads(index.read_text())["weight_map"].items():
                files.setdefault(file, []).append(key)
            absent = sorted(f for f in files if not (self.directory / f).is_file())
            if absent:
                raise UserError(
                    f"missing shards: {', '.join(absent)}",
                    where=str(self.directory),
                    fix="download the whole checkpoint",
                )
            return files
        if not single.is_file():
            raise UserError(
                "no model.safetensors", where=str(self.directory),
                fix="save the model with save_pretrained; other weight formats are not read",
            )  # fmt: skip
        try:
            with safe_open(str(single), framework="pt") as opened:
                return {single.name: list(opened.keys())}
        except SafetensorError as error:
            raise UserError(
                f"not a valid safetensors file ({error})", where=str(single), fix="download it again"
            ) from None


def _renamer(model: nn.Module) -> Callable[[str], str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [t for t in table if isinstance(t, WeightRenaming)]
    converters = [t for t in table if isinstance(t, WeightConverter)]
    names = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

    def rename(key: str) -> str:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, names)  # type: ignore[arg-type]
        if converted is not None:
            raise UserError(
                f"tensor {key} must be rearranged, not only renamed", where="checkpoint",
                fix="load the model with transformers, save it with save_pretrained(save_original_format=False)",
            )  # fmt: skip
        return re.sub(r"^\.", "", name)

    return rename


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = first.setdefault(id(parameter), name)
        if stored != name:
            aliases[name] = stored
    return aliases
