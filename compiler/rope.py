"""Kinds of rotary embedding: which a decoder may say, and how those are traced whose frequencies follow the length.

transformers recomputes the frequencies of two kinds at every call, from the largest position id of that call: *dynamic*
beyond ``max_position_embeddings`` and *longrope* beyond ``original_max_position_embeddings``. Whether a geometry gets
that far is known before anything is traced. One that does not has constant frequencies, as every other kind has; one
that does computes them in the graph, row by row, from the positions it is given. A branch on data would not trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.runtime.errors import UserError

if TYPE_CHECKING:
    from secateur.compiler.geometry import Geometry
    from secateur.compiler.trace import Source

CONSTANT = ("default", "linear", "yarn", "llama3", "proportional")
BY_LENGTH = ("dynamic", "longrope")


def check_rope(text: Any, where: str) -> None:
    """Refuse rotary embeddings of a decoder's configuration ``text`` that transformers does not compute, or that were
    not looked at here. ``where`` names the file. Raises UserError."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name, told in _list_told(text).items():
        place = ".".join(part for part in (f"{where}: text_config.rope_parameters", name) if part)
        kind = _kind(told)
        if kind not in (*CONSTANT, *BY_LENGTH) or kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise UserError(
                f"no decoder is compiled with rope of the kind {kind!r}", where=place, available=CONSTANT + BY_LENGTH,
                fix="use a checkpoint whose config.json says one of these",
            )  # fmt: skip
        if kind == "default":
            continue
        try:
            frequencies, long = _frequencies(text, name, None), _frequencies(text, name, _limit(text, name) + 1)
        except Exception as error:  # whatever its arithmetic meets
            raise UserError(
                f"transformers cannot compute rope of the kind {kind!r} from {_show(told)} "
                f"({type(error).__name__}: {error})", where=place,
                fix="compare config.json with the published one",
            ) from None  # fmt: skip
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if frequencies.shape != (width // 2,) or long.shape != frequencies.shape:
            raise UserError(
                f"rope of the kind {kind!r} turns {2 * len(frequencies)} of a head's {width} numbers", where=place,
                fix="these decoders turn all of them, in transformers too: check partial_rotary_factor and head_dim",
            )  # fmt: skip
        if not (frequencies.isfinite().all() and long.isfinite().all()):
            raise UserError(
                f"rope of the kind {kind!r} has frequencies that are not finite, from {_show(told)}", where=place,
                fix="compare config.json with the published one",
            )  # fmt: skip


def follow_length(source: Source, geometry: Geometry) -> tuple[str, ...]:
    """Types of decoder layers whose frequencies depend on a row's length in a bundle of this geometry; ``""`` stands
    for all layers where they share one embedding."""
    text = source.text
    found = [name for name, its in _list_told(text).items() if _kind(its) in BY_LENGTH]
    reach = _reach(source.at(geometry), geometry) if found else 0
    return tuple(name for name in found if reach > _limit(text, name))


def steady_rope(decoder: nn.Module, following: tuple[str, ...]) -> None:
    """Put an embedding into ``decoder``, for tracing, that decides nothing by data; ``following`` are the types of
    layers whose frequencies follow the length."""
    found = _list_told(decoder.config).values()
    if any(_kind(its) in BY_LENGTH for its in found):
        decoder.rotary_emb = SteadyRotary(decoder.get_submodule("rotary_emb"), following).to("meta")


def forget_lengths(decoder: nn.Module) -> None:
    """Let transformers' own embedding answer every call as a model does that was just loaded.

    Of the kind "dynamic" it remembers the longest call so far: what it makes of a row depends on the rows before it.
    """
    rotary: Any = decoder.rotary_emb
    prefixes = [
        f"{name}_" if name else "" for name, its in _list_told(rotary.config).items() if _kind(its) == "dynamic"
    ]

    def forget(module: Any, args: Any) -> None:
        for prefix in prefixes:
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))

    if prefixes:
        rotary.register_forward_pre_hook(forget)


class SteadyRotary(nn.Module):
    """A decoder's ``rotary_emb`` with the same results, whose frequencies are constants or computed in the graph.

    Dynamic: base times ``g ** (d / (d - 2))`` with ``g = factor * n / max - (factor - 1)`` for rows of n positions
    beyond max, d numbers a head; so frequency i, which is ``base ** (-2i / d)``, is divided by ``g ** (2i / (d - 2))``.
    Longrope: one of two sets of frequencies, by length.
    """

    def __init__(self, rotary: nn.Module, following: tuple[str, ...]) -> None:
        super().__init__()
        self.rotary, self.following = rotary, following
        config = rotary.config
        for name in following:
            if _kind(_list_told(config)[name]) == "longrope":
                value = _frequencies(config, name, _limit(config, name) + 1)
            else:
                half = len(_frequencies(config, name, None))
                value = torch.arange(half, dtype=torch.float32) / (1 - half)
            self.register_buffer(f"{name}_varied", value, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, ...]:
        """Tables ``[B,S,d]`` for positions ``[B,S]`` or ``[3,B,S]``; ids of slots behind a row's end must not be the
        largest."""
        named = {} if layer_type is None else {"layer_type": layer_type}
        plain = inspect.unwrap(type(self.rotary).forward)  # without the update that branches on the length
        if (layer_type or "") not in self.following:
            made: tuple[Tensor, ...] = plain(self.rotary, x, position_ids, **named)
            return made
        rows = []
        for row in range(position_ids.shape[-2]):
            ids = position_ids[..., row : row + 1, :]
            rows.append(plain(self._with_frequencies(ids, layer_type), x, ids, **named))
        return rows[0] if len(rows) == 1 else tuple(torch.cat(tables) for tables in zip(*rows, strict=True))

    def _with_frequencies(self, ids: Tensor, layer_type: str | None) -> Any:
        """The embedding with the frequencies of a row with these positions."""
        config, name = self.rotary.config, layer_type or ""
        attribute = f"{name}_inv_freq" if name else "inv_freq"
        usual, varied = getattr(self.rotary, attribute), getattr(self, f"{name}_varied")
        length, limit = ids.amax() + 1, _limit(config, name)
        told = _list_told(config)[name]
        if _kind(told) == "longrope":
            return _Changed(self.rotary, attribute, torch.where(length > limit, varied, usual))
        growth = told["factor"] * length.to(torch.float32) / limit - (told["factor"] - 1)
        return _Changed(self.rotary, attribute, usual * torch.where(length > limit, growth, 1.0) ** varied)


class _Changed:
    """A module with another value of one attribute, for calling its functions."""

    def __init__(self, module: nn.Module, name: str, value: Tensor) -> None:
        self._module = module
        setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _list_told(text: Any) -> dict[str, Mapping[str, Any]]:
    """What a configuration says of rope, by type of layer; by ``""`` where all layers share it."""
    told = text.rope_parameters
    used = getattr(text, "layer_types", None) or ()
    return {name: its for name, its in told.items() if isinstance(its, dict) and name in used} or {"": told}


def _kind(told: Mapping[str, Any]) -> str:
    """transformers spells old configurations, which say ``type``, anew when it reads them."""
    return str(told["rope_type"])


def _limit(text: Any, name: str) -> int:
    """The largest number of positions with the usual frequencies."""
    told = _list_told(text)[name]
    long = told["original_max_position_embeddings"] if _kind(told) == "longrope" else text.max_position_embeddings
    return int(long)


def _frequencies(text: Any, name: str, length: int | None) -> Tensor:
    """What transformers computes for rows of ``length`` positions: ``[d/2]`` float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    named = {"layer_type": name} if name else {}
    kind = _kind(_list_told(text)[name])
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](text, torch.device("cpu"), seq_len=length, **named)[0]
    return frequencies


def _reach(source: Source, geometry: Geometry) -> int:
    """One more than the largest position id that a row of a bundle may have, its new tokens counted."""
    words, facts = geometry.text_tokens + geometry.new_tokens, source.vision
    if source.media is not None:
        return words + sum(max(item.tokens, item.span, item.reach) for item in source.media.items)
    return words + facts.items * (facts.tokens_per_item + facts.extra_rows)


def _show(told: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in told.items() if not isinstance(value, list))
