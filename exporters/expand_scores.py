"""Write the operators of :mod:`secateur.compiler.score_ops` out in their plain form, where a backend has no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from secateur.compiler import score_ops
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program, operands_of, splice


def expand_scores(program: Program, stays: Callable[[fx.Node], bool] = lambda node: False) -> Program:
    """The program with every such node replaced by what its plain form traces to, but those that ``stays`` names."""
    nodes = [n for n in program.graph.nodes if n.target in score_ops.PLAIN and not stays(n)]
    if not nodes:
        return program
    chosen = {n.name for n in nodes}
    module = program.edit()
    for node in [n for n in module.graph.nodes if n.name in chosen]:
        traced, feed = _trace(node)
        with module.graph.inserting_before(node):
            (value,) = splice(module, traced, feed)
        node.replace_all_uses_with(value)
        module.graph.erase_node(node)
    return program.with_module(module)


def _trace(node: fx.Node) -> tuple[Program, dict[str, fx.Node]]:
    """The plain form with the node's settings, and which value of the graph each of its inputs is."""
    plain, given = score_ops.PLAIN[node.target], tuple(operands_of(node).values())
    places = {f"given{i}": i for i, a in enumerate(given) if isinstance(a, fx.Node)}

    def run(*tensors: Tensor) -> Tensor:
        arguments: list[Any] = list(given)
        for place, tensor in zip(places.values(), tensors, strict=True):
            arguments[place] = tensor
        return plain(*arguments)

    values = {name: given[i].meta["val"] for name, i in places.items()}
    zeros = {name: torch.zeros(tuple(v.shape), dtype=v.dtype) for name, v in values.items()}
    traced = trace_function(node.name, run, zeros, ("out",))
    for leftover in reversed(list(traced.graph.nodes)):  # the exporter's own checks, which nobody reads
        if leftover.op == "call_function" and not leftover.users:
            traced.graph.erase_node(leftover)
    return traced, {name: given[i] for name, i in places.items()}
