"""What an operator was called with, by name. A lowering answers every operand; what it does not answer is refused."""

from __future__ import annotations

from typing import Any

from torch import fx

from secateur.compiler.program import operands_of


class Operands:
    """The operands of an FX node by the names of its operator's schema; those that were left out have their defaults.

    ``operands[name]`` reads one. ``leave`` names those that need no reading: what the result's dtype or shape says,
    what ONNX does anyway, what is about gradients. ``unread`` are the others that are not at their defaults.
    """

    def __init__(self, node: fx.Node) -> None:
        self._values = operands_of(node)
        schema = getattr(node.target, "_schema", None)
        arguments = () if schema is None else schema.arguments
        defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
        self._open = {n for n, v in self._values.items() if n not in defaults or not _equal(v, defaults[n])}

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self._open.discard(name)
        return value

    def read(self, *names: str) -> tuple[Any, ...]:
        return tuple(self[name] for name in names)

    def leave(self, *names: str) -> None:
        self._open.difference_update(names)

    @property
    def unread(self) -> list[str]:
        return [name for name in self._values if name in self._open]

    def show(self, name: str) -> str:
        """``name=value``; of a tensor the name alone."""
        value = self._values[name]
        return name if isinstance(value, fx.Node) else f"{name}={value}"


def _equal(value: Any, default: Any) -> bool:
    return not isinstance(value, fx.Node) and bool(value == default)
