"""One ATen operator, one function: how FX nodes become ONNX nodes. All shapes are static by now."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from secateur.compiler.program import args_of
from secateur.exporters.builder import Builder, Lower, shape_of
from secateur.runtime.errors import SecateurError

aten = torch.ops.aten
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


def fill(given: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    """Arguments with the defaults of those left out."""
    return [*given, *defaults[len(given) :]]


def emit(b: Builder, node: fx.Node, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
    dtype, shape = output(node)
    return b.op(name, *inputs, dtype=dtype, shape=shape, attributes=attributes)


def _arithmetic(name: str) -> Lower:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        dtype, _ = output(node)
        left, right = args_of(node)[:2]
        alpha = node.kwargs.get("alpha", 1)
        second = read(b, right, dtype)
        if alpha != 1:
            second = b.op("Mul", second, b.constant(alpha, dtype), dtype=dtype, shape=shape_of(second))
        return emit(b, node, name, read(b, left, dtype), second)

    return lower


def _comparison(name: str) -> Lower:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        sides = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args_of(node)[:2]]
        dtype = torch.result_type(*sides)
        return emit(b, node, name, read(b, args_of(node)[0], dtype), read(b, args_of(node)[1], dtype))

    return lower


def _unary(name: str) -> Lower:
    return lambda b, node: emit(b, node, name, read(b, args_of(node)[0], output(node)[0]))


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
    "Log": (aten.log.default,),
    "Sqrt": (aten.sqrt.default,),
    "Abs": (aten.abs.default,),
    "Round": (aten.round.default,),  # both round halves to even
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
    return emit(b, node, "Sub", read(b, args_of(node)[1], dtype), read(b, args_of(node)[0], dtype))


@lowers(aten.floor_divide.default)
def _floor_divide(b: Builder, node: fx.Node) -> ir.Value:
    """ONNX divides integers towards zero; taking the modulus (of the divisor's sign) off first rounds down."""
    dtype, shape = output(node)
    x, y = read(b, args_of(node)[0], dtype), read(b, args_of(node)[1], dtype)
    if dtype.is_floating_point:
        return emit(b, node, "Floor", b.op("Div", x, y, dtype=dtype, shape=shape))
    rest = b.op("Mod", x, y, dtype=dtype, shape=shape)
    return emit(b, node, "Div", b.op("Sub", x, rest, dtype=dtype, shape=shape), y)


@lowers(aten.rsqrt.default)
def _rsqrt(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    return emit(b, node, "Reciprocal", b.op("Sqrt", read(b, args_of(node)[0], dtype), dtype=dtype, shape=shape))


@lowers(aten.pow.Tensor_Scalar)
def _pow(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    x = read(b, args_of(node)[0], dtype)
    return (
        emit(b, node, "Mul", x, x)
        if args_of(node)[1] == 2
        else emit(b, node, "Pow", x, read(b, args_of(node)[1], dtype))
    )


@lowers(aten.pow.Tensor_Tensor)
def _power(b: Builder, node: fx.Node) -> ir.Value:
    base, exponent = (read(b, a, output(node)[0]) for a in args_of(node))
    return emit(b, node, "Pow", base, exponent)


@lowers(aten.silu.default)
def _silu(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    x = read(b, args_of(node)[0])
    return emit(b, node, "Mul", x, b.op("Sigmoid", x, dtype=dtype, shape=shape))


@lowers(aten.gelu.default)
def _gelu(b: Builder, node: fx.Node) -> ir.Value:
    return emit(b, node, "Gelu", read(b, args_of(node)[0]), approximate=str(node.kwargs.get("approximate", "none")))


@lowers(aten.clamp.default)
def _clamp(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    low, high = [*args_of(node)[1:], None, None][:2]
    bounds = [None if n is None else b.constant(n, dtype) for n in (low, high)]
    return emit(b, node, "Clip", read(b, args_of(node)[0]), *bounds)


@lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    condition, yes, no = args_of(node)
    return emit(b, node, "Where", read(b, condition), read(b, yes, dtype), read(b, no, dtype))


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    x, mask, value = args_of(node)
    return emit(b, node, "Where", read(b, mask), read(b, value, dtype), read(b, x))


def _reduction(name: str) -> Lower:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        axes = args_of(node)[1] if len(args_of(node)) > 1 else []
        axes = [axes] if isinstance(axes, int) else list(axes or [])
        keep = bool(args_of(node)[2]) if len(args_of(node)) > 2 else False
        x = read(b, args_of(node)[0], output(node)[0])
        axes = axes or list(range(len(shape_of(x))))
        return emit(b, node, name, x, b.ints(*axes), keepdims=keep)

    return lower


lowers(aten.mean.dim, aten.mean.default)(_reduction("ReduceMean"))
lowers(aten.sum.dim_IntList)(_reduction("ReduceSum"))
lowers(aten.amax.default)(_reduction("ReduceMax"))
lowers(aten.amin.default)(_reduction("ReduceMin"))


@lowers(aten.linalg_vector_norm.default)
def _norm(b: Builder, node: fx.Node) -> ir.Value:
    order, axes, keep = fill(args_of(node)[1:4], (2, None, False))
    x = read(b, args_of(node)[0])
    name = {2: "ReduceL2", 1: "ReduceL1"}[int(order)]
    dims = list(range(len(shape_of(x)))) if axes is None else list(axes)
    return emit(b, node, name, x, b.ints(*dims), keepdims=bool(keep))


@lowers(aten.softmax.int, aten._softmax.default)
def _softmax(b: Builder, node: fx.Node) -> ir.Value:
    return emit(b, node, "Softmax", read(b, args_of(node)[0], output(node)[0]), axis=int(args_of(node)[1]))


@lowers(aten.linear.default)
def _linear(b: Builder, node: fx.Node) -> ir.Value:
    """``Gemm`` with the weight as it lies in the file: no transposed copy in memory."""
    dtype, shape = output(node)
    x, weight, *bias = [read(b, a) for a in args_of(node) if a is not None]
    width = shape_of(x)[-1]
    flat = b.reshape(x, [math.prod(shape_of(x)[:-1]), width])
    rows = [shape_of(flat)[0], shape[-1]]
    made = b.op("Gemm", flat, weight, *bias, dtype=dtype, shape=rows, attributes={"transB": 1})
    return b.reshape(made, shape)


@lowers(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _conv(b: Builder, node: fx.Node) -> ir.Value:
    x, weight, *rest = args_of(node)
    bias, stride, padding, dilation, groups = fill(rest, (None, 1, 0, 1, 1))
    rank = len(output(node)[1]) - 2
    each = lambda n: [n] * rank if isinstance(n, int) else list(n) * (1 if len(n) == rank else rank)  # noqa: E731
    inputs = [read(b, x), read(b, weight)] + ([read(b, bias)] if bias is not None else [])
    if int(groups) == 1 and shape_of(inputs[0])[1:] == shape_of(inputs[1])[1:] and not any(each(padding)):
        return _whole_conv(b, node, *inputs)
    return emit(
        b, node, "Conv", *inputs,
        strides=each(stride), pads=each(padding) * 2, dilations=each(dilation), group=int(groups),
    )  # fmt: skip


def _whole_conv(b: Builder, node: fx.Node, x: ir.Value, weight: ir.Value, *bias: ir.Value) -> ir.Value:
    """A kernel that covers all of its input, as of towers that take patches one by one: a product of matrices."""
    dtype, shape = output(node)
    count = math.prod(shape_of(weight)[1:])
    rows, kernels = b.reshape(x, [shape[0], count]), b.reshape(weight, [shape[1], count])
    made = b.op("Gemm", rows, kernels, *bias, dtype=dtype, shape=shape[:2], attributes={"transB": 1})
    return b.reshape(made, shape)


@lowers(aten.avg_pool2d.default)
def _average_pool(b: Builder, node: fx.Node) -> ir.Value:
    """Whole squares side by side, as families put patches together; nothing padded, nothing left over."""
    x, kernel, *rest = args_of(node)
    stride = list(rest[0]) if rest and rest[0] else list(kernel)
    sizes = zip(shape_of(read(b, x))[2:], kernel, strict=True)
    if rest[1:] or list(kernel) != stride or any(size % side for size, side in sizes):
        raise SecateurError(
            f"average pooling with {args_of(node)[1:]} is not supported",
            where="export", fix="pool with a stride of the kernel's size that divides the image",
        )  # fmt: skip
    return emit(b, node, "AveragePool", read(b, x), kernel_shape=list(kernel), strides=stride)
