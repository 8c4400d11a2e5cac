"""Write the heads of towers that take all their rows at once the way those of other models are written.

Such a tower stacks query, key and value of ``[S,3,H,d]`` in front and hands ``[H,S,d]`` on as ``[1,H,S,d]``. Taken
apart where they lie, and turned last, they reach attention without a move in memory.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from secateur.compiler.program import Program, args_of
from secateur.passes.edit import Node, aten, erase_dead, is_call, replace_node, shape_of


def straighten_heads(program: Program) -> Program:
    """``unbind(permute(x))`` -> ``select(x)``; ``unsqueeze(transpose(x, 0, 1), 0)`` -> ``transpose`` behind it."""
    module = program.edit()
    for node in list(module.graph.nodes):
        if is_call(node, operator.getitem) and (found := _picked(node)) is not None:
            with module.graph.inserting_before(node):
                replace_node(node, call(module.graph, node, aten.select.int, *found))
        elif is_call(node, aten.unsqueeze.default) and (source := _turned(node)) is not None:
            with module.graph.inserting_before(node):
                whole = call(module.graph, node, aten.unsqueeze.default, source, 0)
                replace_node(node, call(module.graph, node, aten.transpose.int, whole, 1, 2))
    erase_dead(module)
    return program.with_module(module)


def call(graph: fx.Graph, like: Node, target: Any, *args: Any) -> Node:
    """A node in the layer of ``like``."""
    made = graph.call_function(target, args)
    made.meta = {**like.meta, "val": target(*(a.meta["val"] if isinstance(a, Node) else a for a in args))}
    return made


def _picked(node: Node) -> tuple[Node, int, int] | None:
    """(x, axis, index) when the node is a part of ``unbind(permute(x), 0)`` and the other axes keep their order."""
    whole, index = args_of(node)
    if not is_call(whole, aten.unbind.int) or (*args_of(whole)[1:], 0)[0] != 0:
        return None
    turned = args_of(whole)[0]
    if not is_call(turned, aten.permute.default):
        return None
    source, order = args_of(turned)
    first, *rest = (axis % len(order) for axis in order)
    return (source, first, index) if rest == sorted(rest) else None


def _turned(node: Node) -> Node | None:
    """x when the node is ``unsqueeze(transpose(x, 0, 1), 0)``, ``x`` of three dimensions."""
    source, axis = args_of(node)
    if axis != 0 or not is_call(source, aten.transpose.int) or len(shape_of(source)) != 3:
        return None
    return args_of(source)[0] if sorted(a % 3 for a in args_of(source)[1:]) == [0, 1] else None
