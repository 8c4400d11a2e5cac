"""Fold rotary embedding into one ``secateur::rotary`` node.

Done on the traced graph, before any row is taken out of it: the pruned layers then carry the folded form as
well, which an optimiser that looks for cos/sin computed in place does not find there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import fx

from secateur.compiler import ops
from secateur.compiler.program import Program, args_of
from secateur.passes.edit import Node, aten, erase_dead, is_call, replace_node, shape_of
from secateur.passes.straighten_heads import call


def fold_rotary(program: Program) -> Program:
    """``x * cos[:, None] + cat(-x[h:], x[:h]) * sin[:, None]``, ``h = d/2``, ``x [B,H,S,d]``, ``cos [B,S,d]``.

    Towers that take all rows at once have ``x [S,H,d]`` and ``cos [S,d]``, ``cos[:, None]`` as well: they are turned
    before and behind.
    """
    module = program.edit()
    for node in list(module.graph.nodes):
        if (found := _match(node)) is None:
            continue
        with module.graph.inserting_before(node):
            folded = _turned(module.graph, node, *found) if len(shape_of(node)) == 3 else None
            folded = folded or module.graph.call_function(ops.rotary, found)
        folded.meta = dict(node.meta)
        replace_node(node, folded)
    erase_dead(module)
    return program.with_module(module)


def _turned(graph: fx.Graph, node: Node, x: Node, cos: Node, sin: Node) -> Node:
    """The rotary of ``x [S,H,d]``, in the same shape."""

    make = partial(call, graph, node)
    heads = make(aten.transpose.int, make(aten.unsqueeze.default, x, 0), 1, 2)
    tables = [make(aten.unsqueeze.default, table, 0) for table in (cos, sin)]
    return make(aten.select.int, make(aten.transpose.int, make(ops.rotary, heads, *tables), 1, 2), 0, 0)


def _match(node: Node) -> tuple[Node, Node, Node] | None:
    if not is_call(node, aten.add.Tensor):
        return None
    straight, turned = args_of(node)[:2]
    if not is_call(straight, aten.mul.Tensor) or not is_call(turned, aten.mul.Tensor):
        return None
    (x, cos), (rotated, sin) = args_of(straight)[:2], args_of(turned)[:2]
    if not (_unsqueezed(cos) and _unsqueezed(sin) and is_call(rotated, aten.cat.default)):
        return None
    half = shape_of(x)[-1] // 2
    parts, axis = args_of(rotated)[0], args_of(rotated)[1]
    if axis != -1 or len(parts) != 2 or not is_call(parts[0], aten.neg.default):
        return None
    upper, lower = args_of(parts[0])[0], parts[1]
    if _slice(upper) == (x, half, 2 * half) and _slice(lower) == (x, 0, half):
        return x, args_of(cos)[0], args_of(sin)[0]
    return None


def _unsqueezed(value: Any) -> bool:
    return is_call(value, aten.unsqueeze.default) and args_of(value)[1] in (1, 1 - len(shape_of(value)))


def _slice(value: Any) -> tuple[Node, int, int] | None:
    """(source, start, end) of a slice of the last dimension."""
    if not is_call(value, aten.slice.Tensor):
        return None
    source, axis, start, end = args_of(value)[:4]
    last = len(shape_of(source)) - 1
    return (source, start, min(end, shape_of(source)[last])) if axis in (last, -1) else None
