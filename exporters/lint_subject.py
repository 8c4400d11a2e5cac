"""What a lint rule reads: the graph, its target, and a node's inputs, sizes and attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

Problem = tuple[str, str]
"""What is wrong, and what to do."""

LARGE = 2**16
"""Constants of more elements are weights: their values are not read."""


@dataclass(frozen=True)
class Subject:
    """The graph under the rules, and what it is meant for. ``directory`` is where its weights lie, None before it is
    written."""

    model: ir.Model
    target: str
    dtype: str
    sm: int | None
    directory: Path | None = None
    _fixed: dict[ir.Value, bool] = field(default_factory=dict)

    def is_fixed(self, value: ir.Value) -> bool:
        """Whether a value is known before the graph runs: it follows from constants and from shapes of others."""
        path = [value]
        while path:
            one = path[-1]
            producer = one.producer()
            if one in self._fixed or producer is None or ir.convenience.get_const_tensor(one) is not None:
                # Of what comes from outside, constants only.
                self._fixed.setdefault(path.pop(), ir.convenience.get_const_tensor(one) is not None)
                continue
            sources = [] if producer.op_type in ("Shape", "Size") else [i for i in producer.inputs if i is not None]
            unknown = [source for source in sources if source not in self._fixed]
            if unknown:
                path += unknown
                continue
            bodies = any(attribute.type == ir.AttributeType.GRAPH for attribute in producer.attributes.values())
            self._fixed[path.pop()] = not bodies and all(self._fixed[source] for source in sources)
        return self._fixed[value]


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None when it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def dtype_of(node: ir.Node, index: int = 0) -> ir.DataType | None:
    value = given(node, index)
    return value.dtype if value is not None else None


def shape_of(node: ir.Node, index: int = 0) -> tuple[int, ...] | None:
    """Static sizes of an input, or None when any is unknown."""
    value = given(node, index)
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]  # static by then


def numbers_of(value: ir.Value | None) -> np.ndarray | None:  # type: ignore[type-arg]  # of any dtype
    """What a constant holds, flat; None for anything else and for weights."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > LARGE:
        return None
    return None if tensor.dtype == ir.DataType.STRING else np.asarray(tensor.numpy()).reshape(-1)


def constant_of(value: ir.Value | None) -> list[int] | None:
    numbers = numbers_of(value)
    return None if numbers is None else [int(number) for number in numbers]


def int_of(node: ir.Node, name: str, default: int = 0) -> int:
    return node.attributes.get_int(name, default) or 0


def text_of(node: ir.Node, name: str, default: str) -> str:
    return node.attributes.get_string(name, default) or default


_PASSING = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def source_of(value: ir.Value | None, through: tuple[str, ...] = _PASSING) -> ir.Value | None:
    """The value that ``value`` is after nodes of the types ``through``, first input each, are taken off."""
    while value is not None and (node := value.producer()) is not None and node.op_type in through:
        value = given(node, 0)
    return value


def made_by(value: ir.Value | None, *ops: str, through: tuple[str, ...] = _PASSING) -> ir.Node | None:
    """The node of one of these types that makes a value."""
    found = source_of(value, through)
    node = found.producer() if found is not None else None
    return node if node is not None and node.op_type in ops else None


def readers_of(node: ir.Node, through: tuple[str, ...] = _PASSING) -> Iterator[ir.Node]:
    """The nodes that read a node's first result, those of the types ``through`` passed over."""
    for reader in node.outputs[0].consumers():
        if reader.op_type in through:
            yield from readers_of(reader, through)
        else:
            yield reader
