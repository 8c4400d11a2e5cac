"""One ATen operator, one function: how FX nodes become ONNX nodes. All shapes are static by now."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def list_names(node: fx.Node) -> list[str]:
    """The names of the operator's operands, in order."""
    return [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]  # an operator of ATen


def emit(b: Builder, node: fx.Node, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
    dtype, shape = output(node)
    return b.op(name, *inputs, dtype=dtype, shape=shape, attributes=attributes)


def _arithmetic(name: str) -> Lower:
    """Of two operands, of which the second may be multiplied by ``alpha`` first; ``name`` of booleans or numbers."""

    def lower(b: Builder, node: fx.Node) -> ir.Value:
        dtype, _ = output(node)
        given = b.operands(node)
        left, right = (read(b, given[key], dtype) for key in list_names(node)[:2])
        if "alpha" in list_names(node) and (alpha := given["alpha"]) != 1:
            right = b.op("Mul", right, b.constant(alpha, dtype), dtype=dtype, shape=shape_of(right))
        return emit(b, node, name, left, right)

    return lower


def _logic(name: str) -> Lower:
    """Of booleans ``name``, of integers its bitwise form."""
    return lambda b, node: _arithmetic(name if output(node)[0] is torch.bool else f"Bitwise{name}")(b, node)


def _comparison(name: str) -> Lower:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        sides = b.operands(node).read(*list_names(node))
        dtype = torch.result_type(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in sides))
        if dtype is torch.bool and name != "Equal":  # ONNX orders numbers alone
            dtype = torch.int32
        return emit(b, node, name, *(read(b, side, dtype) for side in sides))

    return lower


def _unary(name: str) -> Lower:
    return lambda b, node: emit(b, node, name, read(b, b.operands(node)["self"], output(node)[0]))


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
    "Sigmoid": (aten.sigmoid.default,),
    "Not": (aten.logical_not.default,),
}.items():
    lowers(*_targets)(_unary(_name))
for _name, _targets in {
    "Or": (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default),
    "And": (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default),
}.items():
    lowers(*_targets)(_logic(_name))


@lowers(aten.relu.default)
def _relu(b: Builder, node: fx.Node) -> ir.Value:
    """ONNX Runtime has Relu of floats alone."""
    if output(node)[0].is_floating_point:
        return _unary("Relu")(b, node)
    return emit(b, node, "Max", read(b, b.operands(node)["self"]), b.constant(0, output(node)[0]))


@lowers(aten.bitwise_not.default)
def _bitwise_not(b: Builder, node: fx.Node) -> ir.Value:
    return _unary("Not" if output(node)[0] is torch.bool else "BitwiseNot")(b, node)


@lowers(aten.round.default)
def _round(b: Builder, node: fx.Node) -> ir.Value:
    """Both round halves to even; ONNX rounds floats alone."""
    if not output(node)[0].is_floating_point:
        return read(b, b.operands(node)["self"])
    return _unary("Round")(b, node)


@lowers(aten.rsub.Scalar)
def _rsub(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    x, other, alpha = b.operands(node).read("self", "other", "alpha")
    taken = read(b, x, dtype)
    if alpha != 1:
        taken = b.op("Mul", taken, b.constant(alpha, dtype), dtype=dtype, shape=shape)
    return emit(b, node, "Sub", read(b, other, dtype), taken)


@lowers(aten.floor_divide.default)
def _floor_divide(b: Builder, node: fx.Node) -> ir.Value:
    """ONNX divides integers towards zero; taking the modulus (of the divisor's sign) off first rounds down."""
    dtype, shape = output(node)
    x, y = (read(b, a, dtype) for a in b.operands(node).read("self", "other"))
    if dtype.is_floating_point:
        return emit(b, node, "Floor", b.op("Div", x, y, dtype=dtype, shape=shape))
    rest = b.op("Mod", x, y, dtype=dtype, shape=shape)
    return emit(b, node, "Div", b.op("Sub", x, rest, dtype=dtype, shape=shape), y)


@lowers(aten.rsqrt.default)
def _rsqrt(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    x = read(b, b.operands(node)["self"], dtype)
    return emit(b, node, "Reciprocal", b.op("Sqrt", x, dtype=dtype, shape=shape))


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
def _pow(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    base, exponent = b.operands(node).read("self", "exponent")
    x = read(b, base, dtype)
    if not isinstance(exponent, fx.Node) and exponent == 2:
        return emit(b, node, "Mul", x, x)
    return emit(b, node, "Pow", x, read(b, exponent, dtype))


@lowers(aten.silu.default)
def _silu(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    x = read(b, b.operands(node)["self"])
    return emit(b, node, "Mul", x, b.op("Sigmoid", x, dtype=dtype, shape=shape))


@lowers(aten.gelu.default)
def _gelu(b: Builder, node: fx.Node) -> ir.Value:
    x, approximate = b.operands(node).read("self", "approximate")
    return emit(b, node, "Gelu", read(b, x), approximate=str(approximate))


@lowers(aten.clamp.default)
def _clamp(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    x, low, high = b.operands(node).read("self", "min", "max")
    bounds = [None if n is None else b.constant(n, dtype) for n in (low, high)]
    return emit(b, node, "Clip", read(b, x, dtype), *bounds)


@lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    condition, yes, no = b.operands(node).read("condition", "self", "other")
    return emit(b, node, "Where", read(b, condition), read(b, yes, dtype), read(b, no, dtype))


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    x, mask, value = b.operands(node).read("self", "mask", "value")
    return emit(b, node, "Where", read(b, mask), read(b, value, dtype), read(b, x))


def _reduction(name: str) -> Lower:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        given = b.operands(node)
        given.leave("dtype")  # torch reduces in the result's dtype, and so is x read
        x, whole = read(b, given["self"], output(node)[0]), "dim" not in list_names(node)
        axes, keep = ([], False) if whole else given.read("dim", "keepdim")
        axes = [axes] if isinstance(axes, int) else list(axes or [])
        return emit(b, node, name, x, b.ints(*(axes or range(len(shape_of(x))))), keepdims=bool(keep))

    return lower


lowers(aten.mean.dim, aten.mean.default)(_reduction("ReduceMean"))
lowers(aten.sum.dim_IntList)(_reduction("ReduceSum"))
lowers(aten.amax.default)(_reduction("ReduceMax"))
lowers(aten.amin.default)(_reduction("ReduceMin"))


@lowers(aten.linalg_vector_norm.default)
def _norm(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave("dtype")  # as in the other reductions
    order, axes, keep = given.read("ord", "dim", "keepdim")
    x = read(b, given["self"], output(node)[0])
    if (name := {2.0: "ReduceL2", 1.0: "ReduceL1"}.get(float(order))) is None:
        raise b.refuse(node, "ord", "take a norm of order 1 or 2")
    dims = list(range(len(shape_of(x)))) if axes is None else list(axes)
    return emit(b, node, name, x, b.ints(*dims), keepdims=bool(keep))


@lowers(aten.softmax.int, aten._softmax.default)
def _softmax(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave("dtype", "half_to_float")  # the result's dtype, in which x is read
    return emit(b, node, "Softmax", read(b, given["self"], output(node)[0]), axis=int(given["dim"]))


@lowers(aten.linear.default)
def _linear(b: Builder, node: fx.Node) -> ir.Value:
    """``Gemm`` with the weight as it lies in the file: no transposed copy in memory."""
    dtype, shape = output(node)
    x, weight, *bias = [read(b, a) for a in b.operands(node).read("input", "weight", "bias") if a is not None]
    width = shape_of(x)[-1]
    flat = b.reshape(x, [math.prod(shape_of(x)[:-1]), width])
    rows = [shape_of(flat)[0], shape[-1]]
    made = b.op("Gemm", flat, weight, *bias, dtype=dtype, shape=rows, attributes={"transB": 1})
    return b.reshape(made, shape)


@lowers(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _conv(b: Builder, node: fx.Node) -> ir.Value:
    x, weight, *bias = (read(b, a) for a in b.operands(node).read("input", "weight", "bias") if a is not None)
    stride, padding, dilation, groups = b.operands(node).read("stride", "padding", "dilation", "groups")
    rank = len(shape_of(weight)) - 2
    each = lambda n: [n] * rank if isinstance(n, int) else list(n) * (1 if len(n) == rank else rank)  # noqa: E731
    if len(shape_of(x)) != rank + 2:
        raise b.refuse(node, "input", f"give the input a batch: {rank + 2} dimensions")
    if int(groups) == 1 and shape_of(x)[1:] == shape_of(weight)[1:] and not any(each(padding)):
        return _whole_conv(b, node, x, weight, *bias)
    return emit(
        b, node, "Conv", x, weight, *bias,
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
    given = b.operands(node)
    given.leave("ceil_mode", "count_include_pad")  # of what is padded or left over
    x, kernel, stride, padding, divisor = given.read("self", "kernel_size", "stride", "padding", "divisor_override")
    kernel, stride, padding = (list(n) * (2 if len(n) == 1 else 1) for n in (kernel, stride or kernel, padding))
    *outer, height, width = shape_of(read(b, x))
    left_over = height % kernel[0], width % kernel[1]
    if len(outer) != 2 or any(padding) or any(left_over) or divisor is not None or kernel != stride:
        raise SecateurError(
            f"average pooling with {args_of(node)[1:]} is not supported",
            where="export", fix="pool with a stride of the kernel's size that divides the image",
        )  # fmt: skip
    return emit(b, node, "AveragePool", read(b, x), kernel_shape=kernel, strides=stride)
