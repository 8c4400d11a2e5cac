"""Lowering of mixture-of-experts layers to static shapes, with every token's every expert whatever the router says.

``lower_scanned`` and ``lower_looped`` are for backends that run one node after the other. Rows are grouped by expert
into rounds of ``experts x places``: as many places as an even share of the rows needs and some headroom, and as many
rounds as the unluckiest expert needs, which may be chosen by every token. A ``Loop`` stops after the rounds that hold
rows: an even load takes one. In a round a ``Scan`` steps from expert to expert. A step gets the expert's weights as
slices of the stacked tensors, without a copy, and a nested ``If`` on the number of its rows lets it compute few more
than it has. OpenVINO 2026.4 imports no ``Scan`` that reads values of the graph around it; in ``plain`` graphs a second
``Loop`` stands there, whose steps copy the weights of the experts that have rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.exporters.builder import Builder, make_port, shape_of, type_of
from secateur.exporters.lowering import read

_HEADROOM = 2
"""Places per expert of a round, over an even share of the rows."""
_STEP = 16
_SIZES = (1, 4, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
"""Numbers of rows an expert's products are made for; a step takes the smallest that is enough."""
_INT = ir.DataType.INT64
_FLOATS = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


@dataclass(frozen=True)
class Ranks:
    """Per chosen expert ``[T,k]`` how many tokens before this one chose it too, and ``counts [E]`` of all who did."""

    rank: ir.Value
    counts: ir.Value


Run = Callable[[Builder, ir.Value, ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]
"""From the builder, the rows of all tokens, ``gate_up``, ``down``, ``tokens [E,C]`` and ``counts [E]`` to the rows
``[E,C,D]`` of those tokens, of which the first ``counts`` of each expert matter."""


def lower_scanned(b: Builder, node: fx.Node) -> ir.Value:
    """Expert by expert, for ONNX Runtime."""
    return _lower(b, node, _scan)


def lower_looped(b: Builder, node: fx.Node) -> ir.Value:
    """Expert by expert, for toolchains that import ``Loop`` and no ``Scan`` that reads values around it."""
    return _lower(b, node, _loop)


def _lower(b: Builder, node: fx.Node, run_experts: Run) -> ir.Value:
    x, indices, weights, gate_up, down = read_experts(b, node)
    tokens, chosen = shape_of(indices)
    experts = shape_of(gate_up)[0]
    share = math.ceil(tokens * chosen / experts) * _HEADROOM
    places = min(tokens, math.ceil(share / _STEP) * _STEP)
    rounds = math.ceil(tokens / places)
    rows, ranks = with_zero_row(b, x), rank_tokens(b, indices, experts)
    size = b.constant(places, torch.int64)
    start = emit_like(b, "Mul", indices, size)
    if rounds == 1:
        own = emit_like(b, "Add", start, ranks.rank)
        table = b.reshape(place_tokens(b, own, experts * places), [experts, places])
        made = run_experts(b, rows, gate_up, down, table, ranks.counts)
        return add_up(b, made, own, weights)
    own = emit_like(b, "Add", start, emit_like(b, "Mod", ranks.rank, size))
    turn = divide(b, ranks.rank, size)
    at = emit_like(b, "Add", own, emit_like(b, "Mul", turn, b.constant(experts * places, torch.int64)))
    table = b.reshape(place_tokens(b, at, rounds * experts * places), [rounds, experts, places])

    def run(inner: Builder, number: ir.Value) -> ir.Value:
        here = inner.op("Gather", table, number, dtype=torch.int64, shape=[experts, places], attributes={"axis": 0})
        left = emit_like(inner, "Sub", ranks.counts, emit_like(inner, "Mul", number, size))
        mine = inner.op("Equal", turn, number, dtype=torch.bool, shape=[tokens, chosen])
        share = inner.op("Where", mine, weights, _zero(b, weights), dtype=type_of(weights), shape=[tokens, chosen])
        return add_up(inner, run_experts(inner, rows, gate_up, down, here, left), own, share)

    most = b.op("ReduceMax", ranks.counts, b.ints(0), dtype=torch.int64, shape=[], attributes={"keepdims": 0})
    full = emit_like(b, "Add", most, b.constant(places - 1, torch.int64))
    return _sum_rounds(b, divide(b, full, size), x, run)


def _sum_rounds(b: Builder, rounds: ir.Value, like: ir.Value, run: Callable[[Builder, ir.Value], ir.Value]) -> ir.Value:
    """The sum of what the rounds give; ``rounds`` is known at run time only, no shape depends on it."""
    kind, shape = type_of(like), shape_of(like)
    inner = _inside(b, "round")
    number, going = (make_port(inner, n, t, []) for n, t in (("number", _INT), ("going", ir.DataType.BOOL)))
    before = make_port(inner, "sum", kind, shape)
    after = emit_like(inner, "Add", before, run(inner, number))
    on = inner.op("Identity", going, dtype=torch.bool, shape=[])
    body = ir.Graph([number, going, before], [on, after], nodes=inner.nodes, name="round")
    zero = b.op("Expand", _zero(b, like), b.ints(*shape), dtype=kind, shape=shape)
    return b.op("Loop", rounds, b.constant(True), zero, dtype=kind, shape=shape, attributes={"body": body})


def _scan(
    b: Builder, rows: ir.Value, gate_up: ir.Value, down: ir.Value, tokens: ir.Value, counts: ir.Value
) -> ir.Value:
    experts, places = shape_of(tokens)
    kind, width = type_of(rows), shape_of(rows)[1]
    inner = _inside(b, "expert")
    feeds = {"gate_up": gate_up, "down": down, "tokens": tokens, "count": counts}
    ports = {n: make_port(inner, n, type_of(v), shape_of(v)[1:]) for n, v in feeds.items()}
    b.turned.update(ports[name] for name, feed in feeds.items() if feed in b.turned)
    made = _step(inner, rows, ports["tokens"], ports["count"], lambda _: (ports["gate_up"], ports["down"]))
    body = ir.Graph(list(ports.values()), [made], nodes=inner.nodes, name="expert")
    attributes = {"body": body, "num_scan_inputs": len(feeds)}
    return b.op("Scan", *feeds.values(), dtype=kind, shape=[experts, places, width], attributes=attributes)


def _loop(
    b: Builder, rows: ir.Value, gate_up: ir.Value, down: ir.Value, tokens: ir.Value, counts: ir.Value
) -> ir.Value:
    experts, places = shape_of(tokens)
    kind, width = type_of(rows), shape_of(rows)[1]
    inner = _inside(b, "expert")
    number, going = (make_port(inner, n, t, []) for n, t in (("number", _INT), ("going", ir.DataType.BOOL)))

    def take(at: Builder, stack: ir.Value) -> ir.Value:
        one = at.op("Gather", stack, number, dtype=type_of(stack), shape=shape_of(stack)[1:], attributes={"axis": 0})
        if stack in b.turned:
            b.turned.add(one)
        return one

    mine, count = take(inner, tokens), take(inner, counts)
    # Weights are taken in the branch that multiplies by them: those of experts without rows are not copied.
    made = _step(inner, rows, mine, count, lambda branch: (take(branch, gate_up), take(branch, down)))
    on = inner.op("Identity", going, dtype=torch.bool, shape=[])
    body = ir.Graph([number, going], [on, made], nodes=inner.nodes, name="expert")
    given = [b.constant(experts, torch.int64), b.constant(True)]
    return b.op("Loop", *given, dtype=kind, shape=[experts, places, width], attributes={"body": body})


def _step(
    b: Builder, rows: ir.Value, tokens: ir.Value, count: ir.Value,
    weights: Callable[[Builder], tuple[ir.Value, ir.Value]],
) -> ir.Value:  # fmt: skip
    """One expert's rows ``[C,D]`` of its ``tokens [C]``, of which the first ``count`` matter; ``weights`` gives
    ``gate_up`` and ``down`` where they are used."""
    (places,), width, kind = shape_of(tokens), shape_of(rows)[1], type_of(rows)

    def step(branch: Builder, size: int) -> ir.Value:
        """The first ``size`` rows; the places behind them stay zero."""
        if size == 0:
            whole = [places, width]
            return branch.op("Expand", _zero(b, rows), b.ints(*whole), dtype=kind, shape=whole)
        ids = branch.slice(tokens, 0, 0, size)
        taken = branch.op("Gather", rows, ids, dtype=kind, shape=[size, width], attributes={"axis": 0})
        made = _run_expert(branch, taken, *weights(branch))
        if size == places:
            return made
        return branch.op("Pad", made, b.ints(0, 0, places - size, 0), dtype=kind, shape=[places, width])

    sizes = [0, *(n for n in _SIZES if n < places), places]
    return _choose(b, count, sizes, step)


def _run_expert(b: Builder, rows: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
    """One expert on ``rows [n,D]``. With the weights on the left of the products, columns for rows, ONNX Runtime packs
    the rows for its kernel and not the weights: of a few rows that is the shorter half of the time."""
    size, width = shape_of(rows)
    if size == 1 or gate_up in b.turned or down in b.turned:
        return project(b, gate(b, project(b, rows, gate_up)), down)
    both = b.op(
        "Gemm", gate_up, rows, dtype=type_of(rows), shape=[shape_of(gate_up)[0], size], attributes={"transB": 1}
    )
    made = b.op("Gemm", down, gate(b, both, axis=0), dtype=type_of(rows), shape=[width, size])
    return b.op("Transpose", made, dtype=type_of(rows), shape=[size, width], attributes={"perm": [1, 0]})


def _choose(b: Builder, count: ir.Value, sizes: Sequence[int], step: Callable[[Builder, int], ir.Value]) -> ir.Value:
    """``step`` for the smallest size that is at least ``count``, by halving; the largest is always enough."""
    if len(sizes) == 1:
        return step(b, sizes[0])
    middle = (len(sizes) - 1) // 2
    fits = b.op("LessOrEqual", count, b.constant(sizes[middle], torch.int64), dtype=torch.bool, shape=[])
    branches = {}
    for name, part in (("then", sizes[: middle + 1]), ("else", sizes[middle + 1 :])):
        inner = _inside(b, name)
        made = _choose(inner, count, part, step)
        branches[f"{name}_branch"] = ir.Graph([], [made], nodes=inner.nodes, name=name)
    return b.op("If", fits, dtype=type_of(made), shape=shape_of(made), attributes=branches)


# -- pieces, for the other form as well (lowering_experts_batched.py) -------------------------------------------


def read_experts(b: Builder, node: fx.Node) -> list[ir.Value]:
    """``x``, ``indices``, ``weights``, ``gate_up`` and ``down`` of a ``secateur::experts`` node."""
    return [read(b, a) for a in b.operands(node).read("x", "indices", "weights", "gate_up", "down")]


def with_zero_row(b: Builder, x: ir.Value) -> ir.Value:
    """``x [T,D]`` with a row of zeros behind it, ``[T+1,D]``: that row stands for an empty place."""
    tokens, width = shape_of(x)
    return b.op("Pad", x, b.ints(0, 0, 1, 0), dtype=type_of(x), shape=[tokens + 1, width])


def rank_tokens(b: Builder, indices: ir.Value, experts: int) -> Ranks:
    """Count how often each expert was chosen, and before each token how often; no token chooses one twice."""
    tokens, chosen = shape_of(indices)
    pairs, whole = [tokens, chosen], [tokens, experts]
    ones, none = (
        b.op("Expand", b.constant(n, torch.int64), b.ints(*size), dtype=torch.int64, shape=size)
        for n, size in ((1, pairs), (0, whole))
    )
    hits = b.op("ScatterElements", none, indices, ones, dtype=torch.int64, shape=whole, attributes={"axis": 1})
    first = b.constant(0, torch.int64)
    before = b.op("CumSum", hits, first, dtype=torch.int64, shape=whole, attributes={"exclusive": 1})
    rank = b.op("GatherElements", before, indices, dtype=torch.int64, shape=pairs, attributes={"axis": 1})
    counts = b.op("ReduceSum", hits, b.ints(0), dtype=torch.int64, shape=[experts], attributes={"keepdims": 0})
    return Ranks(rank, counts)


def place_tokens(b: Builder, at: ir.Value, total: int) -> ir.Value:
    """Which token stands at each of ``total`` places, where ``at [T,k]`` says each token's; T where none does."""
    tokens, chosen = shape_of(at)
    own = b.constant(np.arange(tokens, dtype=np.int64)[:, None])
    numbers = b.op("Expand", own, b.ints(tokens, chosen), dtype=torch.int64, shape=[tokens, chosen])
    empty = b.op("Expand", b.constant(tokens, torch.int64), b.ints(total), dtype=torch.int64, shape=[total])
    flat = [b.reshape(v, [tokens * chosen]) for v in (at, numbers)]
    return b.op("ScatterElements", empty, *flat, dtype=torch.int64, shape=[total], attributes={"axis": 0})


def add_up(b: Builder, made: ir.Value, places: ir.Value, weights: ir.Value) -> ir.Value:
    """The rows of ``made [...,D]`` at each token's ``places [T,k]``, weighted and added: ``[T,D]``."""
    tokens, chosen = shape_of(places)
    *size, width = shape_of(made)
    flat = b.reshape(made, [math.prod(size), width])
    rows = b.op("Gather", flat, places, dtype=type_of(made), shape=[tokens, chosen, width], attributes={"axis": 0})
    return weigh(b, rows, weights)


def weigh(b: Builder, rows: ir.Value, weights: ir.Value) -> ir.Value:
    """``rows [T,k,D]`` times ``weights [T,k]``, added: ``[T,D]``."""
    tokens, chosen, width = shape_of(rows)
    scale = b.reshape(weights, [tokens, 1, chosen])
    return b.reshape(b.op("MatMul", scale, rows, dtype=type_of(rows), shape=[tokens, 1, width]), [tokens, width])


def project(b: Builder, rows: ir.Value, weight: ir.Value) -> ir.Value:
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


def gate(b: Builder, both: ir.Value, axis: int = -1) -> ir.Value:
    """``silu(gate) * up`` of 2F values along an axis, gates first."""
    half = shape_of(both)[axis] // 2
    gates, ups = b.slice(both, axis, 0, half), b.slice(both, axis, half, 2 * half)
    return emit_like(b, "Mul", emit_like(b, "Mul", gates, emit_like(b, "Sigmoid", gates)), ups)


def divide(b: Builder, count: ir.Value, size: ir.Value) -> ir.Value:
    """Whole times ``size`` goes into int64 counts. Without a rest, since OpenVINO 2026.4 rounds to the nearest number
    where it fuses the division with what stands before it."""
    return emit_like(b, "Div", emit_like(b, "Sub", count, emit_like(b, "Mod", count, size)), size)


def emit_like(b: Builder, name: str, first: ir.Value, *others: ir.Value) -> ir.Value:
    """An operator whose result has the first operand's type, and its shape unless the second is larger."""
    shape = max((shape_of(v) for v in (first, *others)), key=math.prod)
    return b.op(name, first, *others, dtype=type_of(first), shape=shape)


def _zero(b: Builder, like: ir.Value) -> ir.Value:
    return b.constant(0, _FLOATS[type_of(like)])


def _inside(b: Builder, title: str) -> Builder:
    """A builder for the body of a loop or a branch."""
    place = f"{b.layer}/" if b.layer else ""
    return Builder(b.module, b.lowerings, b, prefix=f"{b.prefix}{place}{title}/")
