"""What the files of a checkpoint call the tensors of a model, by transformers' own conversion table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime.errors import UserError


class Rearrangement:
    """transformers' operations that make one tensor of the model out of those of the files: stacked experts, say.

    ``keys`` are the parts' names in the files, in the order in which they are put together.
    """

    def __init__(self, converter: Any, name: str, model: nn.Module) -> None:
        self._converter, self._name, self._model = converter, name, model
        self._patterns: list[str] = []
        self.keys: list[str] = []

    def add(self, key: str, pattern: str) -> None:
        self.keys.append(key)
        self._patterns.append(pattern)

    def run(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, from its parts as ``read`` gives them; on the ``meta`` device its shape without any data."""
        return self._convert(zip(self.keys, self._patterns, strict=True), read)

    def pieces(self, read: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """The tensor in pieces that lie one behind the other: an expert each where experts are stacked, else one."""
        if (groups := self._stacked()) is None:
            yield self.run(read)
            return
        for group in groups:
            yield self._convert(group, read)

    def _stacked(self) -> list[list[tuple[str, str]]] | None:
        """Keys and patterns of each piece, if parts are stacked along dimension 0 and nothing touches it afterwards."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        first, *rest = self._converter.operations
        if not isinstance(first, MergeModulelist) or first.dim != 0:
            return None
        if not all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in rest):
            return None
        lists: dict[str, list[tuple[str, str]]] = {}
        for key, pattern in zip(self.keys, self._patterns, strict=True):
            lists.setdefault(pattern, []).append((key, pattern))
        if len({len(found) for found in lists.values()}) > 1:
            return None
        return [list(group) for group in zip(*lists.values(), strict=True)]

    def _convert(self, parts: Iterable[tuple[str, str]], read: Callable[[str], Tensor]) -> Tensor:
        converter = deepcopy(self._converter)
        for key, pattern in parts:
            converter.collected_tensors[pattern].append(lambda key=key: read(key))
        try:
            made = converter.convert(self._name, model=self._model, config=self._model.config)
        except (UserError, OSError):
            raise  # of reading a part
        except Exception as error:  # operations raise whatever torch raises
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"tensor {self.keys[0]} and its like do not make {self._name} ({reason})") from None
        # One part, or operations that had nothing to do, come back as a list.
        (tensor,) = made.values()
        found: Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return found

    def keeps_bytes(self, part: Tensor) -> bool:
        """Whether the bytes of the one part given, a ``meta`` tensor, are those of the result in the same order."""
        if len(self.keys) > 1:
            return False
        made = self.run(lambda key: part)
        same = made.untyped_storage()._cdata == part.untyped_storage()._cdata
        return same and made.is_contiguous() and made.numel() == part.numel()

    def turns_matrices(self) -> bool:
        """Whether the result is the one part with its last two dimensions exchanged, or the part as it is."""
        from transformers.core_model_loading import Transpose

        turns = [{o.dim0 % 3, o.dim1 % 3} for o in self._converter.operations if isinstance(o, Transpose)]
        return len(self.keys) == len(turns) == len(self._converter.operations) == 1 and turns == [{1, 2}]


def map_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str | Rearrangement]:
    """Name in the model -> its key in the files, or the operations that make it.

    Keys the model has no tensor for are mapped as well, to a name the model does not know. Raises UserError for a
    key that would have to be split into several tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)  # type: ignore[arg-type]  # any module will do
    renamings = [t for t in table if isinstance(t, WeightRenaming)]
    converters = [t for t in table if isinstance(t, WeightConverter)]
    owners = {pattern: c for c in converters for pattern in c.source_patterns}
    known: Any = tensors_of(model)
    prefix = str(model.base_model_prefix)
    found: dict[str, str | Rearrangement] = {}
    # Their order is that of a list's parts, and some renamings wait for the first key of a group.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        name = re.sub(r"^\.", "", name)
        if pattern is None or name not in known:
            found.setdefault(name, key)
            continue
        if len(owners[pattern].target_patterns) > 1:
            raise UserError(
                f"tensor {key} must be split into several", where="checkpoint",
                fix="load the model with transformers, save it with save_pretrained(save_original_format=False)",
            )  # fmt: skip
        parts = found.setdefault(name, Rearrangement(owners[pattern], name, model))
        if isinstance(parts, Rearrangement):
            parts.add(key, pattern)
    aliases = tied_names(model)
    for name in list(found):
        found.setdefault(aliases.get(name, name), found[name])
    return found


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = first.setdefault(id(parameter), name)
        if stored != name:
            aliases[name] = stored
    return aliases


def ignored_names(model: nn.Module) -> re.Pattern[str] | None:
    """What transformers expects in checkpoints beside this model's tensors: parts of a larger model, mostly."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return re.compile("|".join(f"(?:{p})" for p in sorted(patterns))) if patterns else None


def on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
