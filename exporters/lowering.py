"""One ATen operator, one function: how FX nodes become ONNX nodes. All shapes are static by now."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from secateur.exporters.builder import TYPES, Builder, shape_of, type_of

aten = torch.ops.aten
Lower = Callable[[Builder, fx.Node], Any]
LOWERINGS: dict[Any, Lower] = {}


def lowers(*targets: Any) -> Callable[[Lower], Lower]:
    """Register a function for ATen overloads."""

    def register(function: Lower) -> Lower:
        LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return register


def output(node: fx.Node) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of what the node computes."""
    value = node.meta["val"]
    return value.dtype, tuple(value.shape)


def read(b: Builder, value: Any, dtype: torch.dtype | None = None) -> ir.Value:
    """The ONNX value of an argument: a node, or a number turned into a constant of ``dtype``."""
    if isinstance(value, fx.Node):
        found: ir.Value = b.values[value]
        return found if dtype is None else b.cast(found, dtype)
    return b.constant(value, dtype)


def _emit(b: Builder, node: fx.Node, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
    dtype, shape = output(node)
    return b.op(name, *inputs, dtype=dtype, shape=shape, attributes=attributes)


def _arithmetic(name: str) -> Lower:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        dtype, _ = output(node)
        left, right = node.args[:2]
        alpha = node.kwargs.get("alpha", 1)
        second = read(b, right, dtype)
        if alpha != 1:
            second = b.op("Mul", second, b.constant(alpha, dtype), dtype=dtype, shape=shape_of(second))
        return _emit(b, node, name, read(b, left, dtype), second)

    return lower


def _comparison(name: str) -> Lower:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        sides = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args[:2]]
        dtype = torch.result_type(*sides)
        return _emit(b, node, name, read(b, node.args[0], dtype), read(b, node.args[1], dtype))

    return lower


def _unary(name: str) -> Lower:
    return lambda b, node: _emit(b, node, name, read(b, node.args[0], output(node)[0]))


for _name, _targets in {
    "Add": (aten.add.Tensor, aten.add.Scalar),
    "Sub": (aten.sub.Tensor, aten.sub.Scalar),
    "Mul": (aten.mul.Tensor, aten.mul.Scalar),
    "Div": (aten.div.Tensor, aten.div.Scalar),
    "Min": (aten.minimum.default,),
    "Max": (aten.maximum.default, aten.clamp_min.default),
    "MatMul": (aten.matmul.default, aten.bmm.default),
}.items():
    lowers(*_targets)(_arithmetic(_name))
for _name, _targets in {
    "Equal": (aten.eq.Tensor, aten.eq.Scalar),
    "Greater": (aten.gt.Tensor, aten.gt.Scalar),
    "GreaterOrEqual": (aten.ge.Tensor, aten.ge.Scalar),
    "Less": (aten.lt.Tensor, aten.lt.Scalar),
    "LessOrEqual": (aten.le.Tensor, aten.le.Scalar),
}.items():
    lowers(*_targets)(_comparison(_name))
for _name, _targets in {
    "Cos": (aten.cos.default,),
    "Sin": (aten.sin.default,),
    "Exp": (aten.exp.default,),
    "Tanh": (aten.tanh.default,),
    "Neg": (aten.neg.default,),
    "Sqrt": (aten.sqrt.default,),
    "Abs": (aten.abs.default,),
    "Relu": (aten.relu.default,),
    "Sigmoid": (aten.sigmoid.default,),
    "Not": (aten.bitwise_not.default, aten.logical_not.default),
}.items():
    lowers(*_targets)(_unary(_name))
for _name, _targets in {
    "Or": (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default),
    "And": (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default),
}.items():
    lowers(*_targets)(_arithmetic(_name))


@lowers(aten.rsub.Scalar)
def _rsub(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    return _emit(b, node, "Sub", read(b, node.args[1], dtype), read(b, node.args[0], dtype))


@lowers(aten.floor_divide.default)
def _floor_divide(b: Builder, node: fx.Node) -> ir.Value:
    """ONNX divides integers towards zero; taking the modulus (of the divisor's sign) off first rounds down."""
    dtype, shape = output(node)
    x, y = read(b, node.args[0], dtype), read(b, node.args[1], dtype)
    if dtype.is_floating_point:
        return _emit(b, node, "Floor", b.op("Div", x, y, dtype=dtype, shape=shape))
    rest = b.op("Mod", x, y, dtype=dtype, shape=shape)
    return _emit(b, node, "Div", b.op("Sub", x, rest, dtype=dtype, shape=shape), y)


@lowers(aten.rsqrt.default)
def _rsqrt(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    return _emit(b, node, "Reciprocal", b.op("Sqrt", read(b, node.args[0], dtype), dtype=dtype, shape=shape))


@lowers(aten.pow.Tensor_Scalar)
def _pow(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    x = read(b, node.args[0], dtype)
    return _emit(b, node, "Mul", x, x) if node.args[1] == 2 else _emit(b, node, "Pow", x, read(b, node.args[1], dtype))


@lowers(aten.silu.default)
def _silu(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    x = read(b, node.args[0])
    return _emit(b, node, "Mul", x, b.op("Sigmoid", x, dtype=dtype, shape=shape))


@lowers(aten.gelu.default)
def _gelu(b: Builder, node: fx.Node) -> ir.Value:
    return _emit(b, node, "Gelu", read(b, node.args[0]), approximate=str(node.kwargs.get("approximate", "none")))


@lowers(aten.clamp.default)
def _clamp(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    low, high = [*node.args[1:], None, None][:2]
    bounds = [None if n is None else b.constant(n, dtype) for n in (low, high)]
    return _emit(b, node, "Clip", read(b, node.args[0]), *bounds)


@lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    condition, yes, no = node.args
    return _emit(b, node, "Where", read(b, condition), read(b, yes, dtype), read(b, no, dtype))


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    x, mask, value = node.args
    return _emit(b, node, "Where", read(b, mask), read(b, value, dtype), read(b, x))


@lowers(aten._to_copy.default, aten.to.dtype)
def _cast(b: Builder, node: fx.Node) -> ir.Value:
    return b.cast(read(b, node.args[0]), output(node)[0])


@lowers(aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default)
def _same(b: Builder, node: fx.Node) -> ir.Value:
    return read(b, node.args[0])


@lowers(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.flatten.using_ints,
)  # fmt: skip
def _reshape(b: Builder, node: fx.Node) -> ir.Value:
    return b.reshape(read(b, node.args[0]), output(node)[1])


@lowers(aten.transpose.int)
def _transpose(b: Builder, node: fx.Node) -> ir.Value:
    x = read(b, node.args[0])
    rank = len(shape_of(x))
    i, j = sorted(int(a) % rank for a in node.args[1:3])  # type: ignore[arg-type]
    if (rank, i, j) == (4, 1, 2):
        return b.swap(x)
    perm = list(range(rank))
    perm[i], perm[j] = j, i
    return _emit(b, node, "Transpose", x, perm=perm)


@lowers(aten.permute.default)
def _permute(b: Builder, node: fx.Node) -> ir.Value:
    rank = len(output(node)[1])
    return _emit(b, node, "Transpose", read(b, node.args[0]), perm=[int(a) % rank for a in node.args[1]])  # type: ignore[union-attr]


@lowers(aten.expand.default)
def _expand(b: Builder, node: fx.Node) -> ir.Value:
    x, shape = read(b, node.args[0]), output(node)[1]
    return x if tuple(shape_of(x)) == shape else _emit(b, node, "Expand", x, b.ints(*shape))


@lowers(aten.cat.default)
def _cat(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    return _emit(b, node, "Concat", *(read(b, part, dtype) for part in node.args[0]), axis=axis)  # type: ignore[union-attr]


@lowers(aten.stack.default)
def _stack(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    axis = (int(node.args[1]) if len(node.args) > 1 else 0) % len(shape)  # type: ignore[arg-type]
    single = [1 if i == axis else n for i, n in enumerate(shape)]
    return _emit(b, node, "Concat", *(b.reshape(read(b, p, dtype), single) for p in node.args[0]), axis=axis)  # type: ignore[union-attr]


@lowers(aten.slice.Tensor)
def _slice(b: Builder, node: fx.Node) -> ir.Value:
    x = read(b, node.args[0])
    axis, start, end, step = [*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1 :]]
    size = shape_of(x)[int(axis)]  # type: ignore[arg-type]
    start, end = (0 if start is None else start), (size if end is None else end)
    # The true end: INT64_MAX makes some parsers compute the length at run time.
    bounds = [min(max(n + size if n < 0 else n, 0), size) for n in (start, end)]  # type: ignore[operator]
    if bounds == [0, size] and step == 1:
        return x
    return _slice_value(b, x, int(axis), bounds[0], bounds[1], int(step))  # type: ignore[arg-type]


def _slice_value(b: Builder, x: ir.Value, axis: int, start: int, end: int, step: int = 1) -> ir.Value:
    shape = shape_of(x)
    axis %= len(shape)
    shape[axis] = math.ceil((end - start) / step)
    inputs = [b.ints(n) for n in (start, end, axis, step)]
    return b.remember(
        ("slice", x, axis, start, end, step), lambda: b.op("Slice", x, *inputs, dtype=type_of(x), shape=shape)
    )


slice_value = _slice_value


@lowers(aten.select.int)
def _select(b: Builder, node: fx.Node) -> ir.Value:
    x, axis, index = read(b, node.args[0]), int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    index %= shape_of(x)[axis]
    return b.reshape(_slice_value(b, x, axis, index, index + 1), output(node)[1])


@lowers(aten.gather.default)
def _gather(b: Builder, node: fx.Node) -> ir.Value:
    x, axis, index = node.args[:3]
    return _emit(b, node, "GatherElements", read(b, x), read(b, index), axis=int(axis))  # type: ignore[arg-type]


@lowers(aten.index_select.default)
def _index_select(b: Builder, node: fx.Node) -> ir.Value:
    x, axis, index = node.args
    return _emit(b, node, "Gather", read(b, x), read(b, index), axis=int(axis))  # type: ignore[arg-type]


@lowers(aten.embedding.default)
def _embedding(b: Builder, node: fx.Node) -> ir.Value:
    return _emit(b, node, "Gather", read(b, node.args[0]), read(b, node.args[1]), axis=0)


@lowers(aten.scatter.src)
def _scatter(b: Builder, node: fx.Node) -> ir.Value:
    x, axis, index, source = node.args
    updates = read(b, source, output(node)[0])
    if shape_of(updates) != (wanted := shape_of(read(b, index))):
        for i, n in enumerate(wanted):
            updates = _slice_value(b, updates, i, 0, n)
    return _emit(b, node, "ScatterElements", read(b, x), read(b, index), updates, axis=int(axis))  # type: ignore[arg-type]


@lowers(aten.scatter.value)
def _scatter_value(b: Builder, node: fx.Node) -> ir.Value:
    x, axis, index, number = node.args
    dtype, at = output(node)[0], read(b, index)
    updates = b.op("Expand", b.constant(number, dtype), b.ints(*shape_of(at)), dtype=dtype, shape=shape_of(at))
    return _emit(b, node, "ScatterElements", read(b, x), at, updates, axis=int(axis))  # type: ignore[arg-type]


@lowers(aten.topk.default)
def _topk(b: Builder, node: fx.Node) -> list[ir.Value]:
    axis, largest = (*node.args[2:4], *(-1, True)[len(node.args) - 2 :])[:2] if len(node.args) > 2 else (-1, True)
    return _top(b, node, read(b, node.args[0]), int(node.args[1]), int(axis), bool(largest))  # type: ignore[arg-type]


@lowers(aten.sort.default, aten.sort.stable)
def _sort(b: Builder, node: fx.Node) -> list[ir.Value]:
    rest = list(node.args[1:]) if node.target is aten.sort.default else []
    axis = int(node.kwargs.get("dim", rest[0] if rest else -1))  # type: ignore[arg-type]
    descending = bool(node.kwargs.get("descending", rest[1] if len(rest) > 1 else False))
    x = read(b, node.args[0])
    return _top(b, node, x, shape_of(x)[axis], axis, descending)


@lowers(aten.argsort.default, aten.argsort.stable)
def _argsort(b: Builder, node: fx.Node) -> ir.Value:
    rest = list(node.args[1:]) if node.target is aten.argsort.default else []
    axis = int(node.kwargs.get("dim", rest[0] if rest else -1))  # type: ignore[arg-type]
    descending = bool(node.kwargs.get("descending", rest[1] if len(rest) > 1 else False))
    x = read(b, node.args[0])
    k = b.ints(shape_of(x)[axis])
    types = [(type_of(x), shape_of(x)), (torch.int64, shape_of(x))]
    return b.ops("TopK", x, k, types=types, attributes={"axis": axis, "largest": descending, "sorted": 1})[1]


def _top(b: Builder, node: fx.Node, x: ir.Value, k: int, axis: int, largest: bool) -> list[ir.Value]:
    types = [(v.dtype, tuple(v.shape)) for v in node.meta["val"]]
    return b.ops("TopK", x, b.ints(k), types=types, attributes={"axis": axis, "largest": largest, "sorted": 1})


@lowers(aten.argmax.default)
def _argmax(b: Builder, node: fx.Node) -> ir.Value:
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    return _emit(b, node, "ArgMax", read(b, node.args[0]), axis=int(node.args[1]), keepdims=keep)  # type: ignore[arg-type]


@lowers(aten.cumsum.default)
def _cumsum(b: Builder, node: fx.Node) -> ir.Value:
    return _emit(b, node, "CumSum", read(b, node.args[0], output(node)[0]), b.ints(int(node.args[1])))  # type: ignore[arg-type]


def _reduction(name: str) -> Lower:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        axes = node.args[1] if len(node.args) > 1 else []
        axes = [axes] if isinstance(axes, int) else list(axes or [])  # type: ignore[arg-type, call-overload]
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        x = read(b, node.args[0], output(node)[0])
        axes = axes or list(range(len(shape_of(x))))
        return _emit(b, node, name, x, b.ints(*axes), keepdims=keep)

    return lower


lowers(aten.mean.dim, aten.mean.default)(_reduction("ReduceMean"))
lowers(aten.sum.dim_IntList)(_reduction("ReduceSum"))
lowers(aten.amax.default)(_reduction("ReduceMax"))
lowers(aten.amin.default)(_reduction("ReduceMin"))


@lowers(aten.linalg_vector_norm.default)
def _norm(b: Builder, node: fx.Node) -> ir.Value:
    order, axes, keep = (*node.args[1:4], *(2, None, False)[len(node.args[1:4]) :])
    x = read(b, node.args[0])
    name = {2: "ReduceL2", 1: "ReduceL1"}[int(order)]  # type: ignore[arg-type]
    dims = list(range(len(shape_of(x)))) if axes is None else list(axes)  # type: ignore[call-overload]
    return _emit(b, node, name, x, b.ints(*dims), keepdims=bool(keep))


@lowers(aten.softmax.int, aten._softmax.default)
def _softmax(b: Builder, node: fx.Node) -> ir.Value:
    return _emit(b, node, "Softmax", read(b, node.args[0], output(node)[0]), axis=int(node.args[1]))  # type: ignore[arg-type]


@lowers(aten.linear.default)
def _linear(b: Builder, node: fx.Node) -> ir.Value:
    """``Gemm`` with the weight as it lies in the file: no transposed copy in memory."""
    dtype, shape = output(node)
    x, weight, *bias = [read(b, a) for a in node.args if a is not None]
    width = shape_of(x)[-1]
    flat = b.reshape(x, [math.prod(shape_of(x)[:-1]), width])
    rows = [shape_of(flat)[0], shape[-1]]
    made = b.op("Gemm", flat, weight, *bias, dtype=dtype, shape=rows, attributes={"transB": 1})
    return b.reshape(made, shape)


@lowers(aten.conv2d.default)
def _conv(b: Builder, node: fx.Node) -> ir.Value:
    x, weight, *rest = node.args
    bias, stride, padding, dilation, groups = [*rest, *(None, 1, 0, 1, 1)[len(rest) :]]
    pair = lambda n: [n, n] if isinstance(n, int) else list(n) * (1 if len(n) == 2 else 2)  # type: ignore[arg-type, call-overload] # noqa: E731
    inputs = [read(b, x), read(b, weight)] + ([read(b, bias)] if bias is not None else [])
    return _emit(
        b, node, "Conv", *inputs,
        strides=pair(stride), pads=pair(padding) * 2, dilations=pair(dilation), group=int(groups),  # type: ignore[arg-type]
    )  # fmt: skip


@lowers(operator.getitem)
def _item(b: Builder, node: fx.Node) -> ir.Value:
    found: ir.Value = b.values[node.args[0]][node.args[1]]  # type: ignore[index]
    return found


@lowers(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.zeros.default, aten.ones.default,
        aten.full.default, aten.scalar_tensor.default)  # fmt: skip
def _constant(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    made: Tensor = node.target(*node.args, **{**node.kwargs, "device": "cpu", "pin_memory": False})  # type: ignore[operator]
    return b.constant(made, dtype)


@lowers(torch.ops.higher_order.scan)
def _scan(b: Builder, node: fx.Node) -> list[ir.Value]:
    """One ONNX ``Scan``; what the body reads besides state and step is captured from the graph around it."""
    from secateur.exporters.onnx import lower_nodes

    combine, initial, steps, captured = node.args
    body: fx.GraphModule = getattr(b.module, str(combine.target))  # type: ignore[union-attr, attr-defined]
    inner = Builder(b, prefix=f"{b.layer or 'stage'}/scan/")
    inner.module = body  # type: ignore[attr-defined]
    inputs: list[ir.Value] = []
    ports = [n for n in body.graph.nodes if n.op == "placeholder"]
    for index, port in enumerate(ports):
        if index >= len(initial) + len(steps):  # type: ignore[arg-type]
            inner.values[port] = read(b, captured[index - len(initial) - len(steps)])  # type: ignore[arg-type, index]
            continue
        dtype, shape = output(port)
        name = f"{inner.prefix}{port.name}"
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(TYPES[dtype]))
        inner.values[port] = value
        inputs.append(value)
    results: Sequence[fx.Node] = body.graph.output_node().args[0]  # type: ignore[assignment]
    lower_nodes(inner, body.graph)
    outputs = []
    for result in results:
        dtype, shape = output(result)
        # A graph output must be the body's own value and no other output's: pass it on by name.
        outputs.append(inner.op("Identity", inner.values[result], dtype=dtype, shape=shape))
    graph = ir.Graph(inputs, outputs, nodes=inner.nodes, name="step")
    types = [(v.dtype, tuple(v.shape)) for v in node.meta["val"]]
    feeds = [read(b, a) for a in (*initial, *steps)]  # type: ignore[misc]
    return b.ops("Scan", *feeds, types=types, attributes={"body": graph, "num_scan_inputs": len(steps)})  # type: ignore[arg-type]
