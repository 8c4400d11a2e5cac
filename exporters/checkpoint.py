"""The tensors of a model directory, whatever its files call them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.exporters.tensor_names import Rearrangement, ignored_names, map_names, on_meta, tensors_of
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import TensorEntry, read_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
KINDS: Mapping[str, torch.dtype] = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""dtypes as safetensors files spell them."""
FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""Those a bundle may have."""
_SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies: ``file`` relative to the model directory, ``key`` its name there."""

    file: str
    key: str
    entry: TensorEntry


class Checkpoint:
    """The tensors of a model directory under their names in the Hugging Face model.

    Names in the files are mapped by transformers' own conversion table. Raises UserError for a directory without
    safetensors, missing and mis-shaped tensors (lists them), and keys that stand for several tensors.
    """

    def __init__(self, directory: Path, model: nn.Module) -> None:
        self.directory = directory
        self.model = model
        self._shapes: dict[str, tuple[int, ...]] = {}

    @cached_property
    def files(self) -> dict[str, Stored]:
        """Every tensor by its key in the files."""
        listed = list_tensors(self.directory)
        return {key: Stored(file, key, entry) for file, keys in listed.items() for key, entry in keys.items()}

    @cached_property
    def names(self) -> dict[str, str | Rearrangement]:
        """Name in the model -> key in the files, or what several keys are put together by."""
        return map_names(self.model, self.files)

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every tensor exists in the shape given; reads the files' headers only."""
        missing = [name for name in shapes if name not in self.names]
        if missing:
            raise UserError(
                f"checkpoint lacks {_count(missing)}: {_some(missing)}", where=str(self.directory),
                fix="download the whole checkpoint, or check that config.json belongs to it",
            )  # fmt: skip
        differ = {name: found for name, shape in shapes.items() if (found := self._shape(name)) != shape}
        if differ:
            keys = [self._keys(name)[0] for name in differ]
            each = [f"{_show(differ[name])} instead of {_show(shapes[name])}" for name in differ]
            raise UserError(
                f"{_count(keys)} of another shape than the configuration says: "
                + _some(f"{key} {difference}" for key, difference in zip(keys, each, strict=True)),
                where=str(self.directory / self.files[keys[0]].file),
                fix="check that config.json belongs to this checkpoint",
            )

    def unexpected(self) -> list[str]:
        """Keys the model has no tensor for, but for those transformers expects beside it."""
        known, ignored = tensors_of(self.model), ignored_names(self.model)
        extra = {key: name for name in self.names if name not in known for key in self._keys(name)}
        return sorted(k for k, name in extra.items() if not (ignored and (ignored.search(name) or ignored.search(k))))

    def dtype(self) -> str:
        """The one floating dtype of the model's tensors: fp32, fp16 or bf16.

        Raises UserError for several (says how many tensors have which) and for one that no bundle may have.
        """
        known = tensors_of(self.model)
        found: dict[str, list[str]] = {}
        for key in sorted({k for name in self.names if name in known for k in self._keys(name)}):
            kind = self.files[key].entry.dtype
            if kind not in KINDS or KINDS[kind].is_floating_point:
                found.setdefault(FLOATS.get(kind, kind), []).append(key)
        shown = ", ".join(f"{len(keys)} in {kind} (such as {keys[0]})" for kind, keys in sorted(found.items()))
        if len(found) > 1:
            raise UserError(
                f"the checkpoint has tensors of several dtypes: {shown}", where=f"--dtype auto: {self.directory}",
                fix="choose one with --dtype; tensors of another are cast",
            )  # fmt: skip
        if not found.keys() <= set(FLOATS.values()) or not found:
            raise UserError(
                f"the checkpoint's dtype is none a bundle may have: {shown or 'no tensors'}",
                where=f"--dtype auto: {self.directory}", available=FLOATS.values(), fix="choose one with --dtype",
            )  # fmt: skip
        return next(iter(found))

    def stored(self, name: str) -> Stored | None:
        """Where a tensor lies if its bytes are the model's as they are; None if it must be put together."""
        source = self.names[name]
        if isinstance(source, str):
            return self.files[source]
        found = self.files[source.keys[0]]
        return found if source.keeps_bytes(self._outline(found)) else None

    def turned(self, name: str) -> Stored | None:
        """Where a stack of matrices ``[E,A,B]`` lies if the file holds each of them turned, ``[E,B,A]``, and no more
        has to be done to it; None otherwise."""
        source = self.names[name]
        if isinstance(source, str) or not source.turns_matrices():
            return None
        found = self.files[source.keys[0]]
        shape = found.entry.shape
        return found if len(shape) == 3 and self._shape(name) == (shape[0], shape[2], shape[1]) else None

    def kind(self, stored: Stored) -> torch.dtype:
        """The dtype of a tensor of the files. Raises UserError for one that torch has no plain dtype for."""
        if stored.entry.dtype not in KINDS:
            raise UserError(
                f"tensor {stored.key} is in {stored.entry.dtype}", where=str(self.directory / stored.file),
                available=KINDS, fix="use the unquantised checkpoint",
            )  # fmt: skip
        return KINDS[stored.entry.dtype]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, copied from its file."""
        self.require({name: shape})
        source = self.names[name]
        if isinstance(source, str):
            return self._read(source)
        return source.run(self._read)

    def read_pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """One tensor in pieces whose bytes lie one behind the other: experts that files keep apart come one by one."""
        self.require({name: shape})
        source = self.names[name]
        if isinstance(source, str):
            yield self._read(source)
        else:
            yield from source.pieces(self._read)

    def _read(self, key: str) -> Tensor:
        stored = self.files[key]
        kind, entry = self.kind(stored), stored.entry
        raw = torch.empty(entry.length, dtype=torch.uint8)
        path = self.directory / stored.file
        with open(path, "rb") as file:
            file.seek(entry.offset)
            if entry.length and file.readinto(raw.numpy().data) != entry.length:
                raise _broken(path, "data length")
        return raw.view(kind).reshape(entry.shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        source = self.names[name]
        if isinstance(source, str):
            return self.files[source].entry.shape
        if name not in self._shapes:
            self._shapes[name] = tuple(source.run(lambda key: self._outline(self.files[key])).shape)
        return self._shapes[name]

    def _outline(self, stored: Stored) -> Tensor:
        return on_meta(stored.entry.shape, self.kind(stored))

    def _keys(self, name: str) -> list[str]:
        source = self.names[name]
        return [source] if isinstance(source, str) else source.keys


def open_checkpoint(directory: Path, model: nn.Module) -> Checkpoint:
    """The checkpoint of a directory. One whose files have not changed since is not read again: a model of many experts
    has some 20,000 tensors, and each step of compiling asks for them."""
    index = directory / INDEX
    files = sorted(directory.glob("*.safetensors")) + ([index] if index.is_file() else [])
    stamps = [(path.name, (stat := path.stat()).st_ino, stat.st_size, stat.st_mtime_ns) for path in files]
    return _open_checkpoint(directory, model, tuple(stamps))


@lru_cache(maxsize=2)
def _open_checkpoint(directory: Path, model: nn.Module, stamps: tuple[tuple[str, int, int, int], ...]) -> Checkpoint:
    return Checkpoint(directory, model)


def list_tensors(directory: Path) -> dict[str, Mapping[str, TensorEntry]]:
    """File -> the tensors in it, from the files' headers, which are held against the files' sizes.

    Raises UserError unless every file and tensor a model directory names is there and whole.
    """
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
        if not single.is_file():
            raise UserError(
                f"no {SINGLE}", where=str(directory),
                fix="save the model with save_pretrained; other weight formats are not read",
            )  # fmt: skip
        return {SINGLE: _read_tensors(single)}
    files: dict[str, list[str]] = {}
    try:
        for key, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(str(file), []).append(key)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("not a valid index of shards", where=str(index), fix="download it again") from None
    # Links are followed (download caches are made of them), paths out of the directory are not.
    outside = sorted(f for f in files if Path(f).is_absolute() or ".." in Path(f).parts)
    if outside:
        raise UserError(
            f"names shards outside its directory: {', '.join(outside)}", where=str(index), fix="download it again"
        )
    absent = sorted(f for f in files if not (directory / f).is_file())
    if absent:
        raise UserError(
            f"missing shards: {', '.join(absent)}", where=str(directory), fix="download the whole checkpoint"
        )
    found: dict[str, Mapping[str, TensorEntry]] = {}
    for file, keys in files.items():
        tensors = _read_tensors(directory / file)
        lost = [key for key in keys if key not in tensors]
        if lost:
            raise UserError(
                f"{file} lacks {_count(lost)} that the index says it has: {_some(lost)}", where=str(index),
                fix="download the whole checkpoint",
            )  # fmt: skip
        found[file] = {key: tensors[key] for key in keys}
    return found


def _read_tensors(path: Path) -> Mapping[str, TensorEntry]:
    try:
        return read_header(path).tensors
    except ValueError as error:
        raise _broken(path, str(error)) from None


def _broken(path: Path, reason: str) -> UserError:
    return UserError(f"not a valid safetensors file ({reason})", where=str(path), fix="download it again")


def _some(items: Iterable[str]) -> str:
    """The first few of a list, and how many more there are."""
    items = list(items)
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _count(items: Sized) -> str:
    return f"{len(items)} tensor" + ("" if len(items) == 1 else "s")


def _show(shape: tuple[int, ...]) -> str:
    return str(list(shape)).replace(" ", "")
