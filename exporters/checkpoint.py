"""The tensors of a model directory, whatever its files call them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.runtime.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
        for file, keys in list_tensors(self.directory).items():
            for key in keys:
                found.setdefault(rename(key), (file, key))
        aliases = tied_names(self.model)
        for name in list(found):
            found.setdefault(aliases.get(name, name), found[name])
        return found

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every tensor exists in the shape given; reads the files' headers only."""
        missing = [n for n in shapes if n not in self.location]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise UserError(
                f"checkpoint lacks {len(missing)} tensors: {shown}", where=str(self.directory),
                fix="download the whole checkpoint, or check that config.json belongs to it",
            )  # fmt: skip
        for name, shape in shapes.items():
            file, key = self.location[name]
            try:
                found = tuple(self._file(file).get_slice(key).get_shape())
            except Exception as error:
                raise _broken(self.directory / file, error) from None
            if found != shape:
                raise UserError(
                    f"tensor {key} has shape {_show(found)}, the configuration says {_show(shape)}",
                    where=str(self.directory / file),
                    fix="check that config.json belongs to this checkpoint",
                )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, mapped from its file."""
        self.require({name: shape})
        file, key = self.location[name]
        try:
            tensor: Tensor = self._file(file).get_tensor(key)
        except Exception as error:
            raise _broken(self.directory / file, error) from None
        return tensor

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(_open_file(self.directory / name))
        return self._open[name]


def list_tensors(directory: Path) -> dict[str, list[str]]:
    """File -> names of the tensors in it. Raises UserError unless every file a model directory names is there."""
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
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
        return files
    if not single.is_file():
        raise UserError(
            f"no {SINGLE}", where=str(directory),
            fix="save the model with save_pretrained; other weight formats are not read",
        )  # fmt: skip
    with _open_file(single) as opened:
        return {SINGLE: list(opened.keys())}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = first.setdefault(id(parameter), name)
        if stored != name:
            aliases[name] = stored
    return aliases


def _open_file(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"not a valid safetensors file ({error})", where=str(path), fix="download it again")


def _show(shape: tuple[int, ...]) -> str:
    return str(list(shape)).replace(" ", "")


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
