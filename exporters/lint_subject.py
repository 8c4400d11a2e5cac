"""What a lint rule reads: the graph, its target, and a node's inputs, sizes and attributes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

Problem = tuple[str, str]
"""What is wrong, and what to do."""


@dataclass(frozen=True)
class Subject:
    """The graph under the rules, and what it is meant for."""

    model: ir.Model
    target: str
    dtype: str
    sm: int | None


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


def constant_of(value: ir.Value | None) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None


def int_of(node: ir.Node, name: str, default: int = 0) -> int:
    return node.attributes.get_int(name, default) or 0


def text_of(node: ir.Node, name: str, default: str) -> str:
    return node.attributes.get_string(name, default) or default
