"""What attention may see, as booleans computed in the graph: causality, blocks of an image, sliding windows."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.exporters.builder import TYPES, Builder, shape_of
from secateur.exporters.lowering import list_names, read


class Limits(NamedTuple):
    """What an attention node says beside causality. ``window`` counts in ``positions [B,S]`` of the queries and
    ``past_positions [B,C]`` of the cache's slots, or in slots."""

    window: int | None
    block_ids: ir.Value | None = None
    positions: ir.Value | None = None
    past_positions: ir.Value | None = None

    @property
    def causal_alone(self) -> bool:
        return self.window is None and self.block_ids is None


def read_limits(b: Builder, node: fx.Node, *, fresh: bool) -> Limits:
    """Of an attention node with or without a cache; what its schema does not have is None. Blocks are of fresh rows
    alone, positions of the past of others, and whichever is given where it means nothing is left for the refusal."""
    known = [n for n in Limits._fields if n in list_names(node) and n != ("past_positions" if fresh else "block_ids")]
    found = dict(zip(known, b.operands(node).read(*known), strict=True))
    if not fresh and found["window"] is not None and (found["positions"] is None) != (found["past_positions"] is None):
        raise b.refuse(node, "positions", "give positions of new rows and of the past, or none")
    window = found.pop("window")
    return Limits(window, **{name: None if value is None else read(b, value) for name, value in found.items()})


def see_fresh(b: Builder, limits: Limits, batch: int, length: int) -> ir.Value:
    """bool ``[B,1,S,S]``, or ``[1,1,S,S]`` where it is the same in all rows: what each of S fresh rows may attend to:
    rows up to its own, and those of its block, as far as its window reaches."""

    def make() -> ir.Value:
        whole, square = [batch, 1, length, length], [1, 1, length, length]
        blocks = None if limits.block_ids is None else _both(b, limits.block_ids, batch, length)
        slots = np.arange(length, dtype=np.int64)
        own, key = b.constant(slots.reshape(1, 1, length, 1)), b.constant(slots.reshape(1, 1, 1, length))
        if blocks is None:
            seen = _flags(b, "LessOrEqual", key, own, square)
        else:
            row, column = blocks
            blocked = _flags(b, "GreaterOrEqual", column, b.constant(np.array(0, np.int64)), [batch, 1, 1, length])
            same = _flags(b, "And", _flags(b, "Equal", row, column, whole), blocked, whole)
            seen = _flags(b, "Or", _flags(b, "LessOrEqual", key, own, square), same, whole)
        if limits.window is None:
            return seen
        if limits.positions is not None:
            own, key = _both(b, limits.positions, batch, length)
        return _reach(b, seen, key, own, limits.window)

    return b.remember(("fresh", *limits, length), make)


def see_cached(b: Builder, start: ir.Value, capacity: int, limits: Limits) -> ir.Value:
    """bool ``[B,1,1,C]``: slots a new token at slot ``start [B]`` may attend to."""

    def make() -> ir.Value:
        batch = shape_of(start)[0]
        slots = b.constant(np.arange(capacity, dtype=np.int64).reshape(1, 1, 1, capacity))
        own = b.reshape(start, [batch, 1, 1, 1])
        seen = _flags(b, "LessOrEqual", slots, own, [batch, 1, 1, capacity])
        if limits.window is None:
            return seen
        # Positions of new tokens follow each other as their slots do; of the prompt's, slots alone are too lenient.
        seen = _reach(b, seen, slots, own, limits.window)
        if limits.positions is None or limits.past_positions is None:
            return seen
        known = b.reshape(limits.past_positions, [batch, 1, 1, capacity])
        return _reach(b, seen, known, b.reshape(limits.positions, [batch, 1, 1, 1]), limits.window)

    return b.remember(("cached", start, capacity, *limits), make)


def add_mask(
    b: Builder, seen: ir.Value | None, dtype: torch.dtype | ir.DataType, bias: ir.Value | None = None
) -> ir.Value:
    """What is added to products before the softmax: ``bias``, or 0 without one, where ``seen``, and elsewhere a number
    that hides. One of the two may be left out."""
    if seen is None:
        assert bias is not None
        return b.cast(bias, dtype)

    def make() -> ir.Value:
        kind = TYPES[dtype] if isinstance(dtype, torch.dtype) else dtype
        zero, lowest = (b.constant(np.array(n, kind.numpy())) for n in (0, ml_dtypes.finfo(kind.numpy()).min))
        shown = zero if bias is None else b.cast(bias, kind)
        shape = [max(sizes) for sizes in zip(shape_of(seen), shape_of(shown) or [1] * 4, strict=True)]
        return b.op("Where", seen, shown, lowest, dtype=kind, shape=shape)

    return b.remember(("added", seen, dtype, bias), make)


def _flags(b: Builder, name: str, left: ir.Value, right: ir.Value, shape: list[int]) -> ir.Value:
    return b.op(name, left, right, dtype=torch.bool, shape=shape)


def _both(b: Builder, rows: ir.Value, batch: int, length: int) -> tuple[ir.Value, ir.Value]:
    """``[B,S]`` as a column of queries and as a row of keys."""
    return b.reshape(rows, [batch, 1, length, 1]), b.reshape(rows, [batch, 1, 1, length])


def _reach(b: Builder, seen: ir.Value, key: ir.Value, own: ir.Value, window: int) -> ir.Value:
    """``seen`` without keys that lie ``window`` or more before their query."""
    edge = b.op("Sub", own, b.constant(np.array(window, np.int64)), dtype=torch.int64, shape=shape_of(own))
    shape = [max(sizes) for sizes in zip(shape_of(key), shape_of(own), strict=True)]
    near = _flags(b, "Greater", key, edge, shape)
    return _flags(b, "And", seen, near, [max(sizes) for sizes in zip(shape_of(seen), shape, strict=True)])
