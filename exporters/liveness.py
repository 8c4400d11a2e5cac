"""How many bytes of intermediate results a graph holds at once, from its shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from secateur.exporters.builder import shape_of

_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
"""Operators whose result is what they are given, under another shape."""
_IN_PLACE = {
    "Abs", "Add", "And", "Cos", "Div", "Erf", "Exp", "Log", "Mul", "Neg", "Not", "Or", "Relu", "Sigmoid", "Sin", "Sqrt",
    "Sub", "Tanh",
}  # fmt: skip
"""Operators that may write over an operand nobody reads any more."""


def peak_bytes(graph: ir.Graph, materializes: bool) -> int:
    """Bytes of the most intermediate results that are alive at one time when nodes run in the graph's order.

    A result is alive from the node that makes it to the last one that reads it, inputs and outputs of a node together.
    Views share the bytes of what they view; an element-wise result takes the place of an operand of its size that is
    read for the last time. What the graph is given and what it returns lie in buffers of their own, and initializers
    are weights or constants: none of them counts. A loop holds its body's peak while it runs.

    ``materializes``: whether ONNX ``Attention`` writes out the products of queries and keys, as ONNX Runtime's CPU
    kernel does: float32, for each head, and once more for the mask. Other attention operators are fused.

    What it cannot know: backends run nodes in another order, fuse neighbours so that results between them never exist,
    round sizes up, and take scratch memory of their own inside a node.
    """
    return _Walk(graph, materializes).peak()


class _Walk:
    """One pass over a graph's nodes with the storages that are alive."""

    def __init__(self, graph: ir.Graph, materializes: bool) -> None:
        self.nodes, self.materializes = list(graph), materializes
        self.returned = {id(value) for value in graph.outputs}
        self.own: dict[int, int] = {}
        """Value -> the storage it lies in; values made elsewhere lie in none of ours."""
        self.last: dict[int, int] = {}
        """Storage -> the place of the node that reads it last."""
        for place, node in enumerate(self.nodes):
            for value in node.outputs:
                if id(value) in self.returned:
                    continue
                if node.op_type not in _VIEWS:
                    self.own[id(value)] = id(value)
                elif id(node.inputs[0]) in self.own:
                    self.own[id(value)] = self.own[id(node.inputs[0])]
            for value in (*node.outputs, *_read(node)):
                if (storage := self.own.get(id(value))) is not None:
                    self.last[storage] = place

    def peak(self) -> int:
        alive: dict[int, int] = {}
        highest = 0
        for place, node in enumerate(self.nodes):
            fresh = [v for v in node.outputs if self.own.get(id(v)) == id(v)]
            dying = {s: size for s, size in alive.items() if self.last[s] == place}
            for value in fresh:
                alive[id(value)] = size_of(value)
            held = sum(alive.values())
            if node.op_type in _IN_PLACE and fresh and size_of(fresh[0]) in self._operands(node, dying):
                held -= size_of(fresh[0])
            highest = max(highest, held + self._inside(node))
            for storage in [s for s in alive if self.last[s] <= place]:
                del alive[storage]
        return highest

    def _operands(self, node: ir.Node, dying: dict[int, int]) -> list[int]:
        """Sizes of the operands that are read for the last time."""
        storages = {self.own.get(id(value)) for value in node.inputs if value is not None}
        return [size for storage, size in dying.items() if storage in storages]

    def _inside(self, node: ir.Node) -> int:
        """What a node holds while it runs beside its operands and results."""
        bodies = (attribute.as_graph() for attribute in node.attributes.values() if _is_graph(attribute))
        inside = max((_body_bytes(body, self.materializes) for body in bodies), default=0)
        return inside + (_products(node) if self.materializes and node.op_type == "Attention" else 0)


def _body_bytes(body: ir.Graph, materializes: bool) -> int:
    """A body's peak, with one step of what it is given and returns."""
    return peak_bytes(body, materializes) + sum(size_of(value) for value in (*body.inputs, *body.outputs))


def _products(node: ir.Node) -> int:
    """float32 ``[B,H,S,T]`` of products and ``[B,1,S,T]`` of what is added to them."""
    queries, keys = node.inputs[:2]
    assert queries is not None
    assert keys is not None
    (batch, heads, rows, _), columns = shape_of(queries), shape_of(keys)[2]
    return 4 * batch * (heads + 1) * rows * columns


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """The values a node reads, those its bodies take from around it included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if _is_graph(attribute):
            for inner in attribute.as_graph():
                yield from _read(inner)


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type == ir.AttributeType.GRAPH


def size_of(value: ir.Value) -> int:
    """Bytes of a value of static shape."""
    assert value.dtype is not None
    return math.prod(shape_of(value)) * int(value.dtype.itemsize)
