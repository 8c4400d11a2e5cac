"""Lowering of what moves rows about: shapes, slices, gathers."""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from secateur.compiler.program import args_of
from secateur.exporters.builder import Builder, shape_of
from secateur.exporters.lowering import LOWERINGS, aten, emit, list_names, lowers, output, read
from secateur.runtime.errors import SecateurError

__all__ = ["LOWERINGS"]  # with the functions below registered


_MEMORY = ("layout", "device", "pin_memory", "non_blocking", "memory_format", "copy")
"""Operands that say where and how a tensor is stored, which a graph of values does not know."""


@lowers(aten._to_copy.default, aten.to.dtype)
def _cast(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave("dtype", *_MEMORY)  # the result has that dtype
    return b.cast(read(b, given["self"]), output(node)[0])


@lowers(
    aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default
)
def _same(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave(*_MEMORY)
    return read(b, given["self"])


@lowers(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.flatten.using_ints,
)  # fmt: skip
def _reshape(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave("shape", "size", "dim", "start_dim", "end_dim")  # the result has that shape
    return b.reshape(read(b, given["self"]), output(node)[1])


@lowers(aten.transpose.int)
def _transpose(b: Builder, node: fx.Node) -> ir.Value:
    value, *axes = b.operands(node).read("self", "dim0", "dim1")
    x = read(b, value)
    rank = len(shape_of(x))
    i, j = sorted(int(a) % rank for a in axes)
    if (rank, i, j) == (4, 1, 2):
        return b.swap(x)
    perm = list(range(rank))
    perm[i], perm[j] = j, i
    return emit(b, node, "Transpose", x, perm=perm)


@lowers(aten.t.default)
def _turn(b: Builder, node: fx.Node) -> ir.Value:
    x = read(b, b.operands(node)["self"])
    return emit(b, node, "Transpose", x, perm=[1, 0]) if len(shape_of(x)) == 2 else x


@lowers(aten.permute.default)
def _permute(b: Builder, node: fx.Node) -> ir.Value:
    x, dims = b.operands(node).read("self", "dims")
    rank = len(output(node)[1])
    return emit(b, node, "Transpose", read(b, x), perm=[int(a) % rank for a in dims])


@lowers(aten.expand.default, aten.expand_as.default)
def _expand(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave("size", "other", "implicit")  # the result has that shape
    return b.expand(read(b, given["self"]), output(node)[1])


@lowers(aten.cat.default)
def _cat(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    tensors, axis = b.operands(node).read("tensors", "dim")
    return emit(b, node, "Concat", *(read(b, part, dtype) for part in tensors), axis=int(axis))


@lowers(aten.stack.default)
def _stack(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    tensors, axis = b.operands(node).read("tensors", "dim")
    axis = int(axis) % len(shape)
    single = [1 if i == axis else n for i, n in enumerate(shape)]
    return emit(b, node, "Concat", *(b.reshape(read(b, p, dtype), single) for p in tensors), axis=axis)


@lowers(aten.slice.Tensor)
def _slice(b: Builder, node: fx.Node) -> ir.Value:
    value, axis, start, end, step = b.operands(node).read("self", "dim", "start", "end", "step")
    x = read(b, value)
    size = shape_of(x)[int(axis)]
    start, end = (0 if start is None else start), (size if end is None else end)
    # The true end: INT64_MAX makes some parsers compute the length at run time.
    bounds = [min(max(n + size if n < 0 else n, 0), size) for n in (start, end)]
    if bounds == [0, size] and step == 1:
        return x
    return b.slice(x, int(axis), bounds[0], bounds[1], int(step))


@lowers(aten.select.int)
def _select(b: Builder, node: fx.Node) -> ir.Value:
    value, axis, index = b.operands(node).read("self", "dim", "index")
    x = read(b, value)
    index = int(index) % shape_of(x)[int(axis)]
    return b.reshape(b.slice(x, int(axis), index, index + 1), output(node)[1])


@lowers(aten.slice_scatter.default)
def _slice_scatter(b: Builder, node: fx.Node) -> ir.Value:
    """Each place from the whole or from what is written into it, which lies behind the whole."""
    whole, written, axis, start, end, step = b.operands(node).read("self", "src", "dim", "start", "end", "step")
    x, part = read(b, whole), read(b, written)
    dtype, shape = output(node)
    axis = int(axis) % len(shape)
    places = list(range(shape[axis]))
    for index, place in enumerate(range(*slice(start, end, step).indices(shape[axis]))):
        places[place] = shape[axis] + index
    widened = [n + shape_of(part)[i] * (i == axis) for i, n in enumerate(shape)]
    both = b.op("Concat", x, part, dtype=dtype, shape=widened, attributes={"axis": axis})
    return emit(b, node, "Gather", both, b.ints(*places), axis=axis)


@lowers(aten.gather.default)
def _gather(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave("sparse_grad")
    value, axis, index = given.read("self", "dim", "index")
    x, at = read(b, value), read(b, index)
    axis = int(axis) % max(len(shape_of(x)), 1)
    for i, n in enumerate(shape_of(at)):  # ONNX wants them of one size along every other axis
        if i != axis and n != shape_of(x)[i]:
            x = b.slice(x, i, 0, n)
    return emit(b, node, "GatherElements", x, at, axis=axis)


@lowers(aten.index_select.default)
def _index_select(b: Builder, node: fx.Node) -> ir.Value:
    x, axis, index = b.operands(node).read("self", "dim", "index")
    return emit(b, node, "Gather", read(b, x), read(b, index), axis=int(axis))


@lowers(aten.index.Tensor)
def _index(b: Builder, node: fx.Node) -> ir.Value:
    """Rows along one axis; the axes before it are whole."""
    x, places = b.operands(node).read("self", "indices")
    axis = len(places) - 1
    if any(place is not None for place in places[:axis]) or places[axis].meta["val"].dtype is not torch.int64:
        raise SecateurError(
            "no ONNX lowering for an index of several axes, or of another type than int64",
            where=f"export: node {node.name} in {b.layer or 'a stage'}", fix="index one axis with int64 places",
        )  # fmt: skip
    return emit(b, node, "Gather", read(b, x), read(b, places[axis]), axis=axis)


@lowers(aten.split_with_sizes.default, aten.split.Tensor)
def _split(b: Builder, node: fx.Node) -> list[ir.Value]:
    given = b.operands(node)
    given.leave("split_size", "split_sizes")  # the results have those sizes
    x, axis = read(b, given["self"]), int(given["dim"])
    sizes = [int(part.shape[axis]) for part in node.meta["val"]]
    ends = list(itertools.accumulate(sizes))
    return [b.slice(x, axis, end - n, end) for n, end in zip(sizes, ends, strict=True)]


@lowers(aten.unbind.int)
def _unbind(b: Builder, node: fx.Node) -> list[ir.Value]:
    value, axis = b.operands(node).read("self", "dim")
    x = read(b, value)
    shape = shape_of(x)
    axis = int(axis) % len(shape)
    rest = shape[:axis] + shape[axis + 1 :]
    return [b.reshape(b.slice(x, axis, i, i + 1), rest) for i in range(shape[axis])]


@lowers(aten.embedding.default)
def _embedding(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave("padding_idx", "scale_grad_by_freq", "sparse")  # of gradients
    weight, indices = given.read("weight", "indices")
    return emit(b, node, "Gather", read(b, weight), read(b, indices), axis=0)


@lowers(aten.scatter.src)
def _scatter(b: Builder, node: fx.Node) -> ir.Value:
    x, axis, index, source = b.operands(node).read("self", "dim", "index", "src")
    updates = read(b, source, output(node)[0])
    if shape_of(updates) != (wanted := shape_of(read(b, index))):
        for i, n in enumerate(wanted):
            updates = b.slice(updates, i, 0, n)
    return emit(b, node, "ScatterElements", read(b, x), read(b, index), updates, axis=int(axis))


@lowers(aten.scatter.value)
def _scatter_value(b: Builder, node: fx.Node) -> ir.Value:
    x, axis, index, number = b.operands(node).read("self", "dim", "index", "value")
    dtype, at = output(node)[0], read(b, index)
    updates = b.expand(b.constant(number, dtype), shape_of(at))
    return emit(b, node, "ScatterElements", read(b, x), at, updates, axis=int(axis))


@lowers(aten.argmax.default)
def _argmax(b: Builder, node: fx.Node) -> ir.Value:
    value, axis, keep = b.operands(node).read("self", "dim", "keepdim")
    x = read(b, value)
    if axis is not None:
        return emit(b, node, "ArgMax", x, axis=int(axis), keepdims=bool(keep))
    flat = b.reshape(x, [math.prod(shape_of(x))])
    found = b.op("ArgMax", flat, dtype=torch.int64, shape=[1], attributes={"axis": 0, "keepdims": 1})
    return b.reshape(found, output(node)[1])


@lowers(aten.cumsum.default)
def _cumsum(b: Builder, node: fx.Node) -> ir.Value:
    given = b.operands(node)
    given.leave("dtype")  # torch adds in the result's dtype, and so is x read
    axis = b.constant(int(given["dim"]), torch.int64)  # a scalar: the specification knows no axis of shape [1]
    return emit(b, node, "CumSum", read(b, given["self"], output(node)[0]), axis)


@lowers(operator.getitem)
def _item(b: Builder, node: fx.Node) -> ir.Value:
    found: ir.Value = b.values[args_of(node)[0]][args_of(node)[1]]
    return found


@lowers(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.zeros.default, aten.ones.default,
        aten.full.default, aten.scalar_tensor.default)  # fmt: skip
def _constant(b: Builder, node: fx.Node) -> ir.Value:
    dtype, _ = output(node)
    make: Any = node.target
    b.operands(node).leave(*list_names(node))  # torch itself makes it of all of them
    made: Tensor = make(*args_of(node), **{**node.kwargs, "device": "cpu", "pin_memory": False})
    return b.constant(made, dtype)


@lowers(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default)
def _constant_like(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    given = b.operands(node)
    given.leave("self", "size", "dtype", *_MEMORY)  # the result has that shape and dtype
    ones = node.target is aten.ones_like.default
    number = given["fill_value"] if node.target is aten.full_like.default else int(ones)
    return b.constant(torch.full(shape, number, dtype=dtype))
