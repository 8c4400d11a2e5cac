"""What a property test drew, as JSON: written out, so that a found case can be run again whatever becomes of the code.

Hypothesis' own form replays the choices a strategy made, and holds only while neither it nor the strategy changes.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any


class Draws:
    """Stands for ``st.data()``: hands out what was drawn, in order; with ``source`` it draws there and takes notes."""

    def __init__(self, values: list[Any], source: Any = None) -> None:
        self.values, self._source, self._next = values, source, 0

    def draw(self, strategy: Any, label: Any = None) -> Any:
        if self._source is not None:
            self.values.append(self._source.draw(strategy, label))
            return self.values[-1]
        if not self.values:
            return None
        # Hypothesis may call a test again with the same example.
        value = self.values[self._next % len(self.values)]
        self._next += 1
        return value

    def __repr__(self) -> str:
        return f"Draws({self.values!r})"


def encode(value: Any) -> Any:
    """``value`` as what JSON holds. Raises TypeError for a type that is not listed here."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list):
        return [encode(part) for part in value]
    if isinstance(value, tuple):
        parts = [encode(part) for part in value]
        kind = type(value)
        return (
            {"tuple": parts} if kind is tuple else {"named": f"{kind.__module__}:{kind.__qualname__}", "values": parts}
        )
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(part)] for key, part in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Draws):
        return {"draws": [encode(part) for part in value.values]}
    if type(value).__module__ == "torch" and type(value).__name__ == "Tensor":
        return {
            "tensor": encode(value.tolist()),
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [*value.shape],
        }
    raise TypeError(
        f"tests/fuzz/values.py cannot write {type(value).__name__}: let the test draw plain values, or add it"
    )


def decode(written: Any) -> Any:
    """What :func:`encode` was given."""
    if isinstance(written, list):
        return [decode(part) for part in written]
    if not isinstance(written, dict):
        return written
    match written:
        case {"float": text}:
            return float(text)
        case {"tuple": parts}:
            return tuple(decode(part) for part in parts)
        case {"named": name, "values": parts}:
            module, _, kind = name.partition(":")
            return getattr(import_module(module), kind)(*(decode(part) for part in parts))
        case {"dict": pairs}:
            return {decode(key): decode(part) for key, part in pairs}
        case {"bytes": text}:
            return bytes.fromhex(text)
        case {"draws": parts}:
            return Draws([decode(part) for part in parts])
        case {"tensor": parts, "dtype": dtype, "shape": shape}:
            import torch

            return torch.tensor(decode(parts), dtype=getattr(torch, dtype)).reshape(shape)
    raise ValueError(f"no value is written as {written!r}")
