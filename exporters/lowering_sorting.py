"""Lowering of selection and sorting to TopK, and, where a backend's TopK is too short, to runs that are merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.exporters.builder import Builder, Lower, shape_of, type_of
from secateur.exporters.lint_operators import TOPK_LIMIT
from secateur.exporters.lowering import LOWERINGS, aten, read

__all__ = ["WITHIN_LIMIT"]

Top = Callable[[Builder, ir.Value, int, int, bool], list[ir.Value]]
"""Values and places of the first k along an axis, highest (True) or lowest first; of equal ones the earlier first."""


def _top_at_once(b: Builder, x: ir.Value, k: int, axis: int, largest: bool) -> list[ir.Value]:
    shape = shape_of(x)
    shape[axis] = k
    types: list[tuple[Any, list[int]]] = [(type_of(x), shape), (torch.int64, shape)]
    return b.ops("TopK", x, b.ints(k), types=types, attributes={"axis": axis, "largest": largest, "sorted": 1})


def _top_within_limit(b: Builder, x: ir.Value, k: int, axis: int, largest: bool) -> list[ir.Value]:
    """As TopK, which TensorRT has up to ``TOPK_LIMIT``; NaN has no place in the longer order."""
    if k <= TOPK_LIMIT:
        return _top_at_once(b, x, k, axis, largest)
    shape = shape_of(x)
    axis %= len(shape)
    last = len(shape) - 1
    turn = [last if i == axis else axis if i == last else i for i in range(len(shape))]
    if axis != last:
        x = _transpose(b, x, turn)
    turned = shape_of(x)
    rows = b.reshape(x, [math.prod(turned[:-1]), turned[-1]])
    found = [b.reshape(part, [*turned[:-1], k]) for part in _merge_runs(b, rows, k, largest)]
    return found if axis == last else [_transpose(b, part, turn) for part in found]


def _transpose(b: Builder, x: ir.Value, perm: list[int]) -> ir.Value:
    shape = [shape_of(x)[i] for i in perm]
    return b.op("Transpose", x, dtype=type_of(x), shape=shape, attributes={"perm": perm})


def _merge_runs(b: Builder, x: ir.Value, k: int, largest: bool) -> list[ir.Value]:
    """The first k of ``x [G,N]``: runs short enough for TopK, then each entry's place among all of them.

    An entry's place is its place in its own run and, for every other run, the number of entries before it there, found
    by halving: N * runs * log2(run) steps instead of the N * N of counting comparisons. Of equal entries those of
    earlier runs come first, as inside a run.
    """
    groups, count = shape_of(x)
    runs = math.ceil(count / TOPK_LIMIT)
    length = math.ceil(count / runs)
    lengths = [min(length, count - run * length) for run in range(runs)]
    value, source, tables = _sort_runs(b, x, lengths, largest)
    each = np.arange(count)
    run, own = b.constant(np.arange(runs).reshape(1, runs, 1)), b.constant((each // length).reshape(1, 1, count))
    earlier = b.op("Less", run, own, dtype=torch.bool, shape=[1, runs, count])
    ahead = _count_ahead(b, tables, b.reshape(value, [groups, 1, count]), earlier, largest)
    # What fills a run up may equal the last entries.
    wide = [groups, runs, count]
    ahead = b.op("Min", ahead, b.constant(np.array(lengths).reshape(1, runs, 1)), dtype=torch.int64, shape=wide)
    itself = b.op("Equal", run, own, dtype=torch.bool, shape=[1, runs, count])
    inside = b.constant((each % length).reshape(1, 1, count))
    ahead = b.op("Where", itself, inside, ahead, dtype=torch.int64, shape=wide)
    place = b.op("ReduceSum", ahead, b.ints(1), dtype=torch.int64, shape=[groups, count], attributes={"keepdims": 0})
    return [b.slice(_write_at(b, place, part), 1, 0, k) for part in (value, source)]


def _sort_runs(b: Builder, x: ir.Value, lengths: list[int], largest: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Entries ``[G,N]`` run by run in order, where each stood, and the runs ``[G,R,W]`` filled up behind; W is one less
    than a power of two."""
    groups, width = shape_of(x)[0], 2 ** lengths[0].bit_length() - 1
    values, sources, tables, at = [], [], [], 0
    for size in dict.fromkeys(lengths):  # the last run may be shorter
        runs = lengths.count(size)
        some = b.reshape(b.slice(x, 1, at, at + runs * size), [groups, runs, size])
        value, source = _top_at_once(b, some, size, 2, largest)
        start = b.constant(at + np.arange(runs).reshape(1, runs, 1) * size)
        source = b.op("Add", source, start, dtype=torch.int64, shape=[groups, runs, size])
        behind = np.full([groups, runs, width - size], _extreme(type_of(x), lowest=largest), type_of(x).numpy())
        tables.append(_join(b, [value, b.constant(behind)], 2))
        values.append(b.reshape(value, [groups, runs * size]))
        sources.append(b.reshape(source, [groups, runs * size]))
        at += runs * size
    return _join(b, values, 1), _join(b, sources, 1), _join(b, tables, 1)


def _count_ahead(b: Builder, tables: ir.Value, entry: ir.Value, earlier: ir.Value, largest: bool) -> ir.Value:
    """How many of each run of ``tables [G,R,W]`` come before each ``entry [G,1,N]``: ``[G,R,N]``.

    ``earlier [1,R,N]`` says that the run is before the entry's own, so that equal ones count.
    """
    (groups, runs, width), count = shape_of(tables), shape_of(entry)[2]
    wide = [groups, runs, count]
    found: ir.Value | None = None
    for bit in reversed(range(width.bit_length())):
        step = 2**bit
        if found is None:
            other = b.slice(tables, 2, step - 1, step)
        else:
            probe = b.op("Add", found, b.ints(step - 1), dtype=torch.int64, shape=wide)
            other = b.op("GatherElements", tables, probe, dtype=type_of(tables), shape=wide, attributes={"axis": 2})
        before = b.op("Greater" if largest else "Less", other, entry, dtype=torch.bool, shape=wide)
        level = b.op("Equal", other, entry, dtype=torch.bool, shape=wide)
        level = b.op("And", level, earlier, dtype=torch.bool, shape=wide)
        before = b.op("Or", before, level, dtype=torch.bool, shape=wide)
        gain = b.op("Where", before, b.ints(step), b.ints(0), dtype=torch.int64, shape=wide)
        found = gain if found is None else b.op("Add", found, gain, dtype=torch.int64, shape=wide)
    assert found is not None
    return found


def _extreme(kind: ir.DataType, *, lowest: bool) -> float | int:
    if kind.is_floating_point():
        return -math.inf if lowest else math.inf
    bounds = np.iinfo(kind.numpy())
    return bounds.min if lowest else bounds.max


def _join(b: Builder, parts: list[ir.Value], axis: int) -> ir.Value:
    if len(parts) == 1:
        return parts[0]
    shape = shape_of(parts[0])
    shape[axis] = sum(shape_of(part)[axis] for part in parts)
    return b.op("Concat", *parts, dtype=type_of(parts[0]), shape=shape, attributes={"axis": axis})


def _write_at(b: Builder, place: ir.Value, x: ir.Value) -> ir.Value:
    """``x`` in the order of ``place``, in which every number stands once, so that nothing of what lay there is left."""
    return b.op("ScatterElements", x, place, x, dtype=type_of(x), shape=shape_of(x), attributes={"axis": 1})


def _lowerings(top: Top) -> Mapping[Any, Lower]:
    def top_k(b: Builder, node: fx.Node) -> list[ir.Value]:
        given = b.operands(node)
        given.leave("sorted")  # TopK sorts always; unsorted, any order is right
        x, k, axis, largest = given.read("self", "k", "dim", "largest")
        return top(b, read(b, x), int(k), int(axis), bool(largest))

    def sort(b: Builder, node: fx.Node) -> list[ir.Value]:
        given = b.operands(node)
        given.leave("stable")  # of equal ones TopK has the earlier first
        value, axis, descending = given.read("self", "dim", "descending")
        x = read(b, value)
        return top(b, x, shape_of(x)[int(axis)], int(axis), bool(descending))

    def argsort(b: Builder, node: fx.Node) -> ir.Value:
        return sort(b, node)[1]

    return {
        aten.topk.default: top_k,
        **dict.fromkeys((aten.sort.default, aten.sort.stable), sort),
        **dict.fromkeys((aten.argsort.default, aten.argsort.stable), argsort),
    }


LOWERINGS.update(_lowerings(_top_at_once))
WITHIN_LIMIT = _lowerings(_top_within_limit)
"""For TensorRT."""
