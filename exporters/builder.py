"""Building ONNX graphs node by node: values with known shapes, shared constants, stable names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.exporters.operands import Operands
from secateur.runtime.errors import SecateurError

TYPES: Mapping[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A NumPy array of a tensor; bfloat16 as ``ml_dtypes.bfloat16``."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


Lower = Callable[["Builder", fx.Node], Any]
"""Turns one FX node into ONNX nodes; returns its value, or a list for several outputs."""


class Builder:
    """Collects the nodes of one ONNX graph while FX nodes are lowered one after the other.

    ``values`` holds what each FX node became. Constants of equal content are shared. ``layer`` is the module path
    of the FX node being lowered; it goes into the names, so that a profile of the graph reads like the model.
    ``module`` owns the subgraphs of scans; a scan's body is built with its surroundings as ``parent``.
    ``lowerings`` holds a function per FX target, ``dialect`` the name of the dialect they write, for errors.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        lowerings: Mapping[Any, Lower],
        parent: Builder | None = None,
        prefix: str = "",
        dialect: str = "",
    ) -> None:
        self.module, self.lowerings = module, lowerings
        self.dialect: str = dialect if parent is None else parent.dialect
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = [] if parent is None else parent.initializers
        self.values: dict[fx.Node, Any] = {}
        self.layer = ""
        self.prefix = prefix
        self._constants: dict[Any, ir.Value] = {} if parent is None else parent._constants
        self._counts: dict[str, int] = {} if parent is None else parent._counts
        self._memo: dict[Any, ir.Value] = {}
        self._reshaped: dict[ir.Value, ir.Value] = {}
        self._operands: dict[fx.Node, Operands] = {}
        self.swapped: dict[ir.Value, ir.Value] = {}
        """4-D value -> the value it is the (1, 2) transpose of."""
        self.turned: set[ir.Value] = set() if parent is None else parent.turned
        """Weights that lie in their file with the last two dimensions exchanged."""

    def inside(self, module: fx.GraphModule, prefix: str) -> Builder:
        """A builder that writes ``module`` into the same graph, under names of its own."""
        inner = Builder(module, self.lowerings, self, prefix)
        inner.nodes, inner.swapped = self.nodes, self.swapped
        inner._memo, inner._reshaped = self._memo, self._reshaped
        return inner

    def op(
        self,
        name: str,
        *inputs: ir.Value | None,
        dtype: torch.dtype | ir.DataType,
        shape: Sequence[int],
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """A node with one output."""
        return self.ops(name, *inputs, types=[(dtype, shape)], domain=domain, attributes=attributes)[0]

    def ops(
        self,
        name: str,
        *inputs: ir.Value | None,
        types: Sequence[tuple[torch.dtype | ir.DataType, Sequence[int]]],
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> list[ir.Value]:
        """A node whose outputs have the given dtypes and shapes."""
        title = self._name(name)
        outputs = []
        for i, (dtype, shape) in enumerate(types):
            kind = TYPES[dtype] if isinstance(dtype, torch.dtype) else dtype
            outputs.append(
                ir.Value(
                    name=f"{title}:{i}" if len(types) > 1 else title,
                    shape=ir.Shape([int(n) for n in shape]),
                    type=ir.TensorType(kind),
                )
            )
        attrs = [_attribute(k, v) for k, v in sorted((attributes or {}).items())]
        self.nodes.append(ir.Node(domain, name, inputs, attrs, outputs=outputs, name=title))
        return outputs

    def constant(self, data: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """An initializer with the data inside the graph; equal ones are shared."""
        array = to_numpy(data) if isinstance(data, torch.Tensor) else np.asarray(data)
        if dtype is not None:
            array = array.astype(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else TYPES[dtype].numpy())
        key = (array.dtype.str, str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            kind = ir.DataType.BFLOAT16 if array.dtype == ml_dtypes.bfloat16 else ir.DataType.from_numpy(array.dtype)
            name = f"constant_{len(self._constants)}"
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(kind))
            value.const_value = ir.Tensor(array, dtype=kind, name=name)
            self.initializers.append(value)
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def remember(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        """One value per key: reshapes and slices that several readers want are made once."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """``value`` in another shape; of a chain of reshapes only the last one is left."""
        shape = [int(n) for n in shape]
        value = self._reshaped.get(value, value)
        if shape_of(value) == shape:
            return value

        def make() -> ir.Value:
            made = self.op("Reshape", value, self.ints(*shape), dtype=type_of(value), shape=shape)
            self._reshaped[made] = value
            return made

        return self.remember(("reshape", value, tuple(shape)), make)

    def expand(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """``value`` broadcast to ``shape``; of a constant, a larger constant."""
        shape = [int(n) for n in shape]
        if shape_of(value) == shape:
            return value
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
            return self.constant(np.ascontiguousarray(np.broadcast_to(value.const_value.numpy(), shape)))
        return self.op("Expand", value, self.ints(*shape), dtype=type_of(value), shape=shape)

    def slice(self, value: ir.Value, axis: int, start: int, end: int, step: int = 1) -> ir.Value:
        shape = shape_of(value)
        axis %= len(shape)
        shape[axis] = math.ceil((end - start) / step)
        bounds = [self.ints(n) for n in (start, end, axis, step)]
        make = lambda: self.op("Slice", value, *bounds, dtype=type_of(value), shape=shape)  # noqa: E731
        return self.remember(("slice", value, axis, start, end, step), make)

    def swap(self, value: ir.Value) -> ir.Value:
        """``transpose(1, 2)`` of a 4-D value; undoing one gives back what was there."""
        if value in self.swapped:
            return self.swapped[value]

        def make() -> ir.Value:
            a, b, c, d = shape_of(value)
            turned = self.op(
                "Transpose", value, dtype=type_of(value), shape=[a, c, b, d], attributes={"perm": [0, 2, 1, 3]}
            )
            self.swapped[turned] = value
            return turned

        return self.remember(("swap", value), make)

    def cast(self, value: ir.Value, dtype: torch.dtype | ir.DataType) -> ir.Value:
        kind = TYPES[dtype] if isinstance(dtype, torch.dtype) else dtype
        if type_of(value) == kind:
            return value
        make = lambda: self.op("Cast", value, dtype=kind, shape=shape_of(value), attributes={"to": int(kind)})  # noqa: E731
        return self.remember(("cast", value, kind), make)

    def lower(self, graph: fx.Graph) -> None:
        """Lower the calls of a graph in order; placeholders and attributes must have values already."""
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            layer = str(node.meta.get("layer") or "")
            # A copy of a layer's projections that only a stage's score reads is no part of the layer.
            self.layer = f"score/{layer}" if node.meta.get("before_site") else layer
            if (lower := self.lowerings.get(node.target)) is None:
                raise SecateurError(
                    f"no ONNX lowering for {node.target}",
                    where=f"export: node {node.name} in {self.layer or 'a stage'}",
                    fix="write it with operators that exporters/lowering*.py knows, or add a lowering there",
                )
            self.values[node] = lower(self, node)
            for name in self.operands(node).unread:
                raise self.refuse(node, name)
        self.layer = ""

    def operands(self, node: fx.Node) -> Operands:
        """What a node is called with, by name. After its lowering, whatever was not read is refused."""
        return self._operands.setdefault(node, Operands(node))

    def refuse(self, node: fx.Node, operand: str, fix: str = "") -> SecateurError:
        """The error for an operand that this dialect has no form for, or whose lowering does not know it."""
        return SecateurError(
            f"{node.target} with {self.operands(node).show(operand)} has no form in dialect {self.dialect or '?'}",
            where=f"export: node {node.name} in {self.layer or 'a stage'}",
            fix=fix or f"leave {operand} at its default, or give it a form in exporters/lowering*.py",
        )

    def _name(self, op: str) -> str:
        base = f"{self.prefix}{self.layer}/{op}" if self.layer else f"{self.prefix}{op}"
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        return f"{base}_{count}" if count else base


def shape_of(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [int(n) for n in value.shape]  # type: ignore[arg-type]  # static by then


def type_of(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def make_port(b: Builder, name: str, kind: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """An input of the graph that ``b`` writes."""
    return ir.Value(name=f"{b.prefix}{name}", shape=ir.Shape(shape), type=ir.TensorType(kind))


def _attribute(name: str, value: Any) -> ir.Attr:
    if isinstance(value, ir.Graph):
        return ir.AttrGraph(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, (bool, int)):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return ir.AttrInt64s(name, value)
    raise SecateurError(f"attribute {name} of type {type(value).__name__}", where="export")
