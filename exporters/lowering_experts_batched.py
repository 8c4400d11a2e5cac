"""Lowering of mixture-of-experts layers for GPUs: static shapes, no loop, every token's every expert.

A loop would run its steps one after the other, each far too small for a GPU. And with a ``Loop`` over rounds between
its layers, a decoder's attention got no kernel from TensorRT-RTX 1.7 and the build failed, whatever ended the loop. So
all rows are multiplied at once, in one of three ways by their number. Fewer choices than experts: each gathers its
expert's weights. Few rows: every expert has a place for each, and its weights are read where they lie. Many: rows are
sorted into blocks of one expert each, at most ``T*k/size + E`` of them however uneven the load, and each block gathers
its expert's weights. Places that stay empty are computed along: the price of a fixed shape.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.exporters.builder import Builder, shape_of, type_of
from secateur.exporters.lowering_experts import (
    Ranks,
    add_up,
    divide,
    emit_like,
    gate,
    place_tokens,
    project,
    rank_tokens,
    read_experts,
    weigh,
    with_zero_row,
)  # fmt: skip

_SMALLEST, _LARGEST = 64, 512
"""Rows of a block: the power of two above an even share, within these bounds."""


def lower_batched(b: Builder, node: fx.Node) -> ir.Value:
    """All experts at once."""
    x, indices, weights, gate_up, down = read_experts(b, node)
    tokens, chosen = shape_of(indices)
    experts = shape_of(gate_up)[0]
    if tokens * chosen < experts:
        return _gather_weights(b, x, indices, weights, gate_up, down)
    size = _SMALLEST
    while size < min(tokens * chosen / experts, _LARGEST):
        size *= 2
    ranks = rank_tokens(b, indices, experts)
    if tokens <= size:
        at = emit_like(b, "Add", emit_like(b, "Mul", indices, b.constant(tokens, torch.int64)), ranks.rank)
        made = _apply(b, _take(b, x, at, [experts, tokens]), gate_up, down)
    else:
        at, owners = _sort(b, indices, ranks, experts, size)
        rows = _take(b, x, at, [shape_of(owners)[0], size])
        made = _apply(b, rows, *(_pick(b, weight, owners) for weight in (gate_up, down)))
    return add_up(b, made, at, weights)


def _gather_weights(
    b: Builder, x: ir.Value, indices: ir.Value, weights: ir.Value, gate_up: ir.Value, down: ir.Value
) -> ir.Value:
    tokens, chosen = shape_of(indices)
    pairs, width = tokens * chosen, shape_of(x)[1]
    own = b.constant(np.repeat(np.arange(tokens, dtype=np.int64), chosen)[:, None])
    rows = b.op("Gather", x, own, dtype=type_of(x), shape=[pairs, 1, width], attributes={"axis": 0})
    owners = b.reshape(indices, [pairs])
    made = _apply(b, rows, *(_pick(b, weight, owners) for weight in (gate_up, down)))
    return weigh(b, b.reshape(made, [tokens, chosen, width]), weights)


def _sort(b: Builder, indices: ir.Value, ranks: Ranks, experts: int, size: int) -> tuple[ir.Value, ir.Value]:
    """Places ``[T,k]`` in blocks that each belong to one expert, and the blocks' experts."""
    tokens, chosen = shape_of(indices)
    blocks = tokens * chosen // size + experts
    rows = b.constant(size, torch.int64)
    full = divide(b, emit_like(b, "Add", ranks.counts, b.constant(size - 1, torch.int64)), rows)
    ends = b.op("CumSum", full, b.constant(0, torch.int64), dtype=torch.int64, shape=[experts])
    starts = emit_like(b, "Mul", emit_like(b, "Sub", ends, full), rows)
    first = b.op("Gather", starts, indices, dtype=torch.int64, shape=[tokens, chosen], attributes={"axis": 0})
    # A block's expert is the number of experts whose blocks end before it; blocks behind the last stay empty.
    numbers = b.constant(np.arange(blocks, dtype=np.int64)[:, None])
    over = b.op("LessOrEqual", b.reshape(ends, [1, experts]), numbers, dtype=torch.bool, shape=[blocks, experts])
    past = b.cast(over, torch.int64)
    owners = b.op("ReduceSum", past, b.ints(1), dtype=torch.int64, shape=[blocks], attributes={"keepdims": 0})
    return emit_like(b, "Add", first, ranks.rank), emit_like(b, "Min", owners, b.constant(experts - 1, torch.int64))


def _take(b: Builder, x: ir.Value, at: ir.Value, groups: list[int]) -> ir.Value:
    """The rows of ``x [T,D]`` at the places of ``groups``, zeros where a place is empty."""
    table = b.reshape(place_tokens(b, at, groups[0] * groups[1]), groups)
    shape = [*groups, shape_of(x)[1]]
    return b.op("Gather", with_zero_row(b, x), table, dtype=type_of(x), shape=shape, attributes={"axis": 0})


def _pick(b: Builder, weight: ir.Value, owners: ir.Value) -> ir.Value:
    shape = [*shape_of(owners), *shape_of(weight)[1:]]
    picked = b.op("Gather", weight, owners, dtype=type_of(weight), shape=shape, attributes={"axis": 0})
    if weight in b.turned:
        b.turned.add(picked)
    return picked


def _apply(b: Builder, rows: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
    return project(b, gate(b, project(b, rows, gate_up)), down)
