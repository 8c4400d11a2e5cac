"""Undo what the exporter makes of a tensor that is written in place: the new value of a part instead of the whole."""

from __future__ import annotations

from secateur.compiler.program import Program, args_of
from secateur.passes.edit import Node, aten, erase_dead, is_call, replace_node, shape_of


def fold_scatters(program: Program) -> Program:
    """``copy(x, y)`` of one shape is ``y``; ``select(select_scatter(x, y, d, i), d, j)`` is ``y`` where i = j, else
    ``select(x, d, j)``. Writes into a slice stay."""
    module = program.edit()
    for node in list(module.graph.nodes):
        if is_call(node, aten.copy.default) and _alike(*args_of(node)[:2]):
            replace_node(node, args_of(node)[1])
        elif is_call(node, aten.select.int):
            source, axis, index = args_of(node)
            while is_call(source, aten.select_scatter.default) and args_of(source)[2] == axis:
                whole, part, _, place = args_of(source)
                if place == index:
                    replace_node(node, part)
                    break
                source = whole
            else:
                node.args = (source, axis, index)
    erase_dead(module)
    return program.with_module(module)


def _alike(x: Node, y: Node) -> bool:
    return x.meta["val"].dtype == y.meta["val"].dtype and shape_of(x) == shape_of(y)
