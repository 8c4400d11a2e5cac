"""Floating-point operations of a program: 2 per multiply-accumulate, matrix products and attention only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from secateur.compiler import ops, score_ops
from secateur.compiler.program import Program, args_of

aten = torch.ops.aten


def count_flops(program: Program) -> int:
    """FLOPs of one run at the program's static shapes, whole batch, scoring and selection included.

    Causal attention over S fresh rows counts half of ``S x S``. A decode step counts attention over the whole
    capacity of the cache: that is what the fullest step costs. Where the tokens of an image attend to each other in
    both directions, it counts no more than half either. Element-wise work is left out, as is usual.
    """
    return _count(program.module)


def _count(module: fx.GraphModule) -> int:
    total = 0
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is torch.ops.higher_order.scan:
            body, _, steps = args_of(node)[:3]
            total += _count(getattr(module, body.target)) * _shape(steps[0])[0]
        elif (cost := _COSTS.get(node.target)) is not None:
            total += cost(node)
    return total


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _linear(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(args_of(node)[0])[-1]


def _conv(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node)) * math.prod(_shape(args_of(node)[1])[1:])


def _attention(node: fx.Node) -> int:
    batch, heads, queries, width = _shape(args_of(node)[0])
    pairs = queries * _shape(args_of(node)[1])[2]
    return 4 * batch * heads * width * pairs // (2 if args_of(node)[4] else 1)


def _cached_attention(node: fx.Node) -> int:
    batch, heads, queries, width = _shape(args_of(node)[0])
    if args_of(node)[6]:
        return 4 * batch * heads * width * queries * queries // 2
    return 4 * batch * heads * width * queries * _shape(args_of(node)[3])[2]


def _experts(node: fx.Node) -> int:
    """Three products of a row by ``D x F`` for each expert a token chose; the others cost nothing."""
    _, indices, _, gate_up, down = (_shape(a) for a in args_of(node))
    return 2 * math.prod(indices) * (math.prod(gate_up[1:]) + math.prod(down[1:]))


def _received_attention(node: fx.Node) -> int:
    """As its plain form: all products of queries and keys and, where padding is left out, the mean as one more of their
    map. Two kernels instead compute the products twice and no map; what a graph costs shall not depend on its backend.
    """
    batch, heads, rows, width = _shape(args_of(node)[0])
    pairs = batch * heads * rows * _shape(args_of(node)[1])[2]
    return 2 * pairs * (width + (len(args_of(node)) > 4 and args_of(node)[4] is not None))


_COSTS = {
    aten.linear.default: _linear,
    aten.matmul.default: _linear,
    aten.bmm.default: _linear,
    aten.conv2d.default: _conv,
    ops.attention: _attention,
    ops.cached_attention: _cached_attention,
    ops.experts: _experts,
    score_ops.received_attention: _received_attention,
}
