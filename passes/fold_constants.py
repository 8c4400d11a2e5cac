"""Compute at compile time what depends on no input and no weight: tables of positions, masks, orders of rows.

What then turns out to change nothing goes: rows taken in their own order, products with ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.compiler.program import Program, args_of, attach
from secateur.passes.edit import Node, aten, erase_dead, is_call, replace_node, shape_of

LARGEST = 1 << 26
"""Bytes above which a value is left for the programs to compute."""


def fold_constants(program: Program) -> Program:
    """Only where shapes are static and values on the CPU; the meaning stays the same."""
    module = program.edit()
    known: dict[Node, Any] = {}
    first: dict[str, Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and "weight" not in node.meta and isinstance(node.meta.get("val"), Tensor):
            known[node] = getattr(module, str(node.target))
        elif _foldable(node, known):
            # Every layer of a tower makes the same of the same tables.
            same = first.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
            if same is not node:
                replace_node(node, same)
            else:
                known[node] = _run(node, known)
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node not in known:
            continue
        if not isinstance(known[node], Tensor) or all(user in known for user in node.users):
            continue
        with module.graph.inserting_before(node):
            hint = f"folded_{node.name}"
            constant = attach(module, known[node].contiguous().clone(), {"val": node.meta["val"]}, hint)
        known[constant] = known[node]
        replace_node(node, constant)
    for node in list(module.graph.nodes):
        if (source := _unchanged(node, known)) is not None:
            replace_node(node, source)
    erase_dead(module)
    return program.with_module(module)


def _foldable(node: Node, known: dict[Node, Any]) -> bool:
    if node.op != "call_function" or any(source not in known for source in node.all_input_nodes):
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    values = node.meta.get("val")
    values = values if isinstance(values, (list, tuple)) else [values]
    if not all(isinstance(v, Tensor) and all(isinstance(n, int) for n in v.shape) for v in values):
        return False
    return all(v.numel() * v.element_size() <= LARGEST for v in values)


def _run(node: Node, known: dict[Node, Any]) -> Any:
    args = torch.fx.map_arg(node.args, lambda n: known[n])
    kwargs = {**torch.fx.map_arg(node.kwargs, lambda n: known[n])}
    if "device" in kwargs:
        kwargs["device"] = None
    target: Any = node.target
    return target(*args, **kwargs)


def _unchanged(node: Node, known: dict[Node, Any]) -> Node | None:
    """What the node returns as it is."""
    if is_call(node, aten.index_select.default):
        source, axis, index = args_of(node)
        size = shape_of(source)[axis]
        return source if _counts(known.get(index), size) else None
    if is_call(node, aten.index.Tensor) and len(args_of(node)[1]) == 1:
        source, (index,) = args_of(node)
        return source if _counts(known.get(index), shape_of(source)[0]) else None
    if is_call(node, aten.mul.Tensor):
        source, ones = args_of(node)
        value = known.get(ones) if isinstance(ones, Node) else None
        alike = isinstance(source, Node) and source.meta["val"].dtype == node.meta["val"].dtype
        if value is not None and alike and shape_of(source) == shape_of(node) and bool((value == 1).all()):
            return source
    return None


def _counts(index: Any, size: int) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.int64 and torch.equal(index, torch.arange(size))
