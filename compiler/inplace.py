"""Arithmetic that is written in place, written as values where nothing else can tell.

The exporter's own way, ``run_decompositions``, costs more than the export itself. A router of experts divides what it
has just computed in place, in each of 48 layers, and no other value shares memory with that.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from secateur.compiler.program import args_of

aten = torch.ops.aten
_PLAIN = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
}


def write_values(graph: fx.Graph) -> None:
    """Replace writes into tensors of which there are no views; all other writes are left as they are."""
    for node in list(graph.nodes):
        if node.target not in _PLAIN or not _keeps_dtype(node) or not _is_alone(written := args_of(node)[0]):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(_PLAIN[node.target], node.args, node.kwargs)
        made.meta = dict(node.meta)
        behind = False
        for later in graph.nodes:
            behind = behind or later is node
            if behind and later is not node:
                later.replace_input_with(written, made)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _keeps_dtype(node: fx.Node) -> bool:
    """A write casts to the dtype of what it writes into, its plain operator to the wider of both."""
    into, other = args_of(node)[:2]
    value = other.meta["val"] if isinstance(other, fx.Node) else None
    return isinstance(value, Tensor) and bool(value.dtype == into.meta["val"].dtype)


def _is_alone(node: fx.Node) -> bool:
    """Whether an operator made this tensor anew, and nothing that reads it may return a part of its memory."""
    source, twins = node, [node]
    if node.target is operator.getitem:
        source = args_of(node)[0]
        twins = [user for user in source.users if args_of(user)[1:] == args_of(node)[1:]]
    return len(twins) == 1 and not _may_share(source) and not any(_may_share(user) for user in node.users)


def _may_share(node: fx.Node) -> bool:
    """Whether what a node returns may be memory of what it gets. A write returns what it wrote into: no other value."""
    target = node.target
    if node.op == "output":
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)
