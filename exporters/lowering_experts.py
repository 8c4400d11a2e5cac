"""Lowering of mixture-of-experts layers to static shapes: every token's every expert, whatever the router says.

Rows are grouped by expert into ``rounds x experts x places``: as many places per expert and round as some headroom
over an even share needs, and as many rounds as the unluckiest expert needs, which may be chosen by every token. A loop
stops after the rounds that hold rows, so that none is dropped and an even load takes one round.

Within a round, ONNX Runtime runs a ``Scan`` over the experts: each step reads one expert's weights where they lie,
without a copy, and only as many rows as a nested ``If`` on their number lets it. TensorRT multiplies all experts at
once: steps of a loop run one after the other there, each far too small for a GPU. For a few tokens it gathers the
weights of the experts they chose instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.compiler.program import args_of
from secateur.exporters.builder import Builder, Lower, shape_of, type_of
from secateur.exporters.lowering import read

_HEADROOM = 2
"""Places per expert of a round, over an even share of the rows."""
_STEP = 16
_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
"""Numbers of rows an expert's products are made for; a step takes the smallest that is enough."""

Apply = Callable[[Builder, "_Layer", ir.Value, ir.Value], ir.Value]
"""Runs every expert: token numbers ``[E,C]`` and how many of each row count ``[E]`` -> rows ``[E,C,D]``."""


@dataclass(frozen=True)
class _Layer:
    """A layer's tensors. ``rows [T+1,D]``: the tokens, and zeros that stand for an empty place."""

    rows: ir.Value
    gate_up: ir.Value
    down: ir.Value
    places: int

    @property
    def experts(self) -> int:
        return shape_of(self.gate_up)[0]

    @property
    def width(self) -> int:
        return shape_of(self.rows)[1]


@dataclass(frozen=True)
class _Groups:
    """Where rows go. ``tokens [R,E,C]``, ``counts [E]``; per chosen expert ``[T,k]`` its round and place in it."""

    tokens: ir.Value
    counts: ir.Value
    rounds: ir.Value
    places: ir.Value


def lower_experts(apply: Apply, gather_few: bool = False) -> Lower:
    """The lowering of ``secateur::experts`` that runs a round by ``apply``.

    ``gather_few`` copies the chosen experts' weights where tokens choose fewer experts than there are.
    """

    def lower(b: Builder, node: fx.Node) -> ir.Value:
        x, indices, weights, gate_up, down = (read(b, a) for a in args_of(node))
        tokens, chosen = shape_of(indices)
        experts, width = shape_of(gate_up)[0], shape_of(x)[1]
        if gather_few and tokens * chosen < experts:
            return _gather_experts(b, x, indices, weights, gate_up, down)
        share = math.ceil(tokens * chosen / experts) * _HEADROOM
        places = min(tokens, math.ceil(share / _STEP) * _STEP)
        rounds = math.ceil(tokens / places)
        rows = _emit(b, "Pad", x, b.ints(0, 0, 1, 0), like=x, shape=[tokens + 1, width])
        layer = _Layer(rows, gate_up, down, places)
        groups = _group(b, indices, experts, places, rounds)
        if rounds == 1:
            made = apply(b, layer, b.reshape(groups.tokens, [experts, places]), groups.counts)
            return _combine(b, made, groups.places, weights)
        return _loop(b, layer, groups, weights, apply, rounds)

    return lower


def _group(b: Builder, indices: ir.Value, experts: int, places: int, rounds: int) -> _Groups:
    """Count, for each chosen expert of each token, the tokens before it that chose the same."""
    tokens, chosen = shape_of(indices)
    whole = [tokens, experts]
    one, nobody = (
        b.op("Expand", b.constant(n, torch.int64), b.ints(*size), dtype=torch.int64, shape=size)
        for n, size in ((1, [tokens, chosen]), (0, whole))
    )
    hits = b.op("ScatterElements", nobody, indices, one, dtype=torch.int64, shape=whole, attributes={"axis": 1})
    before = b.op(
        "CumSum", hits, b.constant(0, torch.int64), dtype=torch.int64, shape=whole, attributes={"exclusive": 1}
    )
    rank = b.op("GatherElements", before, indices, dtype=torch.int64, shape=[tokens, chosen], attributes={"axis": 1})
    counts = b.op("ReduceSum", hits, b.ints(0), dtype=torch.int64, shape=[experts], attributes={"keepdims": 0})
    size = b.constant(places, torch.int64)
    turn = _emit(b, "Div", rank, size, like=rank)
    own = _emit(b, "Add", _emit(b, "Mul", indices, size, like=rank), _emit(b, "Mod", rank, size, like=rank), like=rank)
    at = _emit(b, "Add", own, _emit(b, "Mul", turn, b.constant(experts * places, torch.int64), like=rank), like=rank)
    total = rounds * experts * places
    numbers = b.op(
        "Expand",
        b.constant(np.arange(tokens)[:, None]),
        b.ints(tokens, chosen),
        dtype=torch.int64,
        shape=[tokens, chosen],
    )
    empty = b.op("Expand", b.constant(tokens, torch.int64), b.ints(total), dtype=torch.int64, shape=[total])
    table = b.op(
        "ScatterElements", empty, b.reshape(at, [tokens * chosen]), b.reshape(numbers, [tokens * chosen]),
        dtype=torch.int64, shape=[total], attributes={"axis": 0},
    )  # fmt: skip
    return _Groups(b.reshape(table, [rounds, experts, places]), counts, turn, own)


def _combine(b: Builder, made: ir.Value, places: ir.Value, weights: ir.Value) -> ir.Value:
    """Each token's rows of ``made [E,C,D]``, weighted and added: ``[T,D]``."""
    experts, size, width = shape_of(made)
    tokens, chosen = shape_of(places)
    flat = b.reshape(made, [experts * size, width])
    rows = b.op("Gather", flat, places, dtype=type_of(made), shape=[tokens, chosen, width], attributes={"axis": 0})
    scale = b.reshape(weights, [tokens, 1, chosen])
    return b.reshape(_emit(b, "MatMul", scale, rows, like=made, shape=[tokens, 1, width]), [tokens, width])


def _loop(b: Builder, layer: _Layer, groups: _Groups, weights: ir.Value, apply: Apply, rounds: int) -> ir.Value:
    """Round after round until no expert has rows left, adding up what each gives."""
    shape = [shape_of(weights)[0], layer.width]
    kind = type_of(layer.rows)
    most = b.op("ReduceMax", groups.counts, b.ints(0), dtype=torch.int64, shape=[], attributes={"keepdims": 0})
    zero = b.op("Expand", b.constant(0, _torch(kind)), b.ints(*shape), dtype=kind, shape=shape)
    inner = _inside(b, "round")
    number, going, sum_ = (
        _port(inner, name, of, size)
        for name, of, size in (("number", ir.DataType.INT64, []), ("going", ir.DataType.BOOL, []), ("sum", kind, shape))
    )
    tokens = inner.op(
        "Gather", groups.tokens, number, dtype=torch.int64, shape=shape_of(groups.tokens)[1:], attributes={"axis": 0}
    )
    size = b.constant(layer.places, torch.int64)
    done = _emit(inner, "Mul", number, size, like=number)
    left = _emit(inner, "Sub", groups.counts, done, like=groups.counts)
    mine = inner.op("Equal", groups.rounds, number, dtype=torch.bool, shape=shape_of(weights))
    share = _emit(inner, "Where", mine, weights, b.constant(0, _torch(kind)), like=weights)
    added = _combine(inner, apply(inner, layer, tokens, left), groups.places, share)
    total = _emit(inner, "Add", sum_, added, like=sum_)
    more = inner.op("Less", _emit(inner, "Add", done, size, like=number), most, dtype=torch.bool, shape=[])
    body = ir.Graph([number, going, sum_], [more, total], nodes=inner.nodes, name="round")
    return b.op(
        "Loop",
        b.constant(rounds, torch.int64),
        b.constant(True),
        zero,
        dtype=kind,
        shape=shape,
        attributes={"body": body},
    )


# -- one expert after the other ----------------------------------------------------------------------------


def scan_experts(b: Builder, layer: _Layer, tokens: ir.Value, counts: ir.Value) -> ir.Value:
    """A ``Scan`` whose steps get one expert's weights as slices of the stacked tensors."""
    kind, shape = type_of(layer.rows), [layer.experts, layer.places, layer.width]
    inner = _inside(b, "expert")
    feeds = {"gate_up": layer.gate_up, "down": layer.down, "tokens": tokens, "count": counts}
    ports = {name: _port(inner, name, type_of(v), shape_of(v)[1:]) for name, v in feeds.items()}
    b.turned.update(ports[name] for name, feed in feeds.items() if feed in b.turned)

    def step(branch: Builder, size: int) -> ir.Value:
        """The first ``size`` rows; the places behind them stay zero."""
        if size == 0:
            return branch.op("Expand", b.constant(0, _torch(kind)), b.ints(*shape[1:]), dtype=kind, shape=shape[1:])
        ids = branch.slice(ports["tokens"], 0, 0, size)
        rows = branch.op("Gather", layer.rows, ids, dtype=kind, shape=[size, layer.width], attributes={"axis": 0})
        hidden = _gated(branch, _project(branch, rows, ports["gate_up"]))
        made = _project(branch, hidden, ports["down"])
        if size == layer.places:
            return made
        return _emit(branch, "Pad", made, b.ints(0, 0, layer.places - size, 0), like=made, shape=shape[1:])

    sizes = [0, *(n for n in _SIZES if n < layer.places), layer.places]
    made = _choose(inner, ports["count"], sizes, step, shape[1:], kind)
    body = ir.Graph(list(ports.values()), [made], nodes=inner.nodes, name="expert")
    return b.op(
        "Scan", *feeds.values(), dtype=kind, shape=shape, attributes={"body": body, "num_scan_inputs": len(feeds)}
    )


def _choose(
    b: Builder,
    count: ir.Value,
    sizes: Sequence[int],
    step: Callable[[Builder, int], ir.Value],
    shape: list[int],
    kind: Any,
) -> ir.Value:
    """``step`` for the smallest size that is at least ``count``, by halving; the largest is always enough."""
    if len(sizes) == 1:
        return step(b, sizes[0])
    middle = (len(sizes) - 1) // 2
    fits = b.op("LessOrEqual", count, b.constant(sizes[middle], torch.int64), dtype=torch.bool, shape=[])
    branches = {}
    for name, part in (("then_branch", sizes[: middle + 1]), ("else_branch", sizes[middle + 1 :])):
        inner = _inside(b, name[:4])
        made = _choose(inner, count, part, step, shape, kind)
        branches[name] = ir.Graph([], [made], nodes=inner.nodes, name=name)
    return b.op("If", fits, dtype=kind, shape=shape, attributes=branches)


# -- all experts at once -----------------------------------------------------------------------------------


def batch_experts(b: Builder, layer: _Layer, tokens: ir.Value, counts: ir.Value) -> ir.Value:
    """One product with all experts' weights for their gates, one for what comes after; empty places hold zeros."""
    shape = [layer.experts, layer.places, layer.width]
    rows = b.op("Gather", layer.rows, tokens, dtype=type_of(layer.rows), shape=shape, attributes={"axis": 0})
    return _project(b, _gated(b, _project(b, rows, layer.gate_up)), layer.down)


def _gather_experts(
    b: Builder, x: ir.Value, indices: ir.Value, weights: ir.Value, gate_up: ir.Value, down: ir.Value
) -> ir.Value:
    tokens, chosen = shape_of(indices)
    pairs, width = tokens * chosen, shape_of(x)[1]
    kind = type_of(x)
    picked = b.reshape(indices, [pairs])
    own = []
    for weight in (gate_up, down):
        shape = [pairs, *shape_of(weight)[1:]]
        own.append(b.op("Gather", weight, picked, dtype=kind, shape=shape, attributes={"axis": 0}))
        if weight in b.turned:
            b.turned.add(own[-1])
    owners = b.constant(np.repeat(np.arange(tokens, dtype=np.int64), chosen)[:, None])
    rows = b.op("Gather", x, owners, dtype=kind, shape=[pairs, 1, width], attributes={"axis": 0})
    made = _project(b, _gated(b, _project(b, rows, own[0])), own[1])
    scale = b.reshape(weights, [tokens, 1, chosen])
    sums = _emit(b, "MatMul", scale, b.reshape(made, [tokens, chosen, width]), like=made, shape=[tokens, 1, width])
    return b.reshape(sums, [tokens, width])


# -- pieces ------------------------------------------------------------------------------------------------


def _project(b: Builder, rows: ir.Value, weight: ir.Value) -> ir.Value:
    """``rows @ weight^T``, or ``rows @ weight`` where it lies turned: of a matrix Gemm, of a stack MatMul."""
    turned = weight in b.turned
    *stack, out, width = shape_of(weight)
    if turned:
        out, width = width, out
    shape = [*shape_of(rows)[:-1], out]
    if not stack:
        return b.op("Gemm", rows, weight, dtype=type_of(rows), shape=shape, attributes={"transB": int(not turned)})
    if not turned:
        size, perm = [*stack, width, out], [0, 2, 1]
        weight = b.op("Transpose", weight, dtype=type_of(weight), shape=size, attributes={"perm": perm})
    return b.op("MatMul", rows, weight, dtype=type_of(rows), shape=shape)


def _gated(b: Builder, both: ir.Value) -> ir.Value:
    """``silu(gate) * up`` of ``[...,2F]``, gates first."""
    shape = shape_of(both)
    half, axis = shape[-1] // 2, len(shape) - 1
    gate, up = b.slice(both, axis, 0, half), b.slice(both, axis, half, 2 * half)
    gated = _emit(b, "Mul", gate, _emit(b, "Sigmoid", gate, like=gate), like=gate)
    return _emit(b, "Mul", gated, up, like=gate)


def _emit(b: Builder, name: str, *inputs: ir.Value, like: ir.Value, shape: list[int] | None = None) -> ir.Value:
    return b.op(name, *inputs, dtype=type_of(like), shape=shape_of(like) if shape is None else shape)


def _inside(b: Builder, title: str) -> Builder:
    """A builder for the body of a loop or a branch."""
    return Builder(b.module, b.lowerings, b, prefix=f"{b.prefix}{f'{b.layer}/' if b.layer else ''}{title}/")


def _port(b: Builder, name: str, kind: Any, shape: list[int]) -> ir.Value:
    return ir.Value(name=f"{b.prefix}{name}", shape=ir.Shape(shape), type=ir.TensorType(kind))


def _torch(kind: Any) -> torch.dtype:
    return {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}.get(kind, torch.float32)
