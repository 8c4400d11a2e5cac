"""Small moves on FX graphs that several passes share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from secateur.compiler.program import operands_of
from secateur.runtime.errors import UserError

aten = torch.ops.aten
Node = fx.Node


def is_call(value: Any, *targets: Any) -> bool:
    """Whether ``value`` is a node that calls one of ``targets``."""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def replace_node(node: Node, value: Node) -> None:
    """Let the users of ``node`` read ``value`` and erase it."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def erase_dead(module: fx.GraphModule) -> None:
    """Erase nodes nobody reads; inputs stay. Tensors and submodules without a reader go as well."""
    for node in reversed(list(module.graph.nodes)):
        if node.op not in ("output", "placeholder") and not node.users:
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_buffers() if n not in used and "." not in n]:
        delattr(module, name)


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and everything they read, directly or not."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def clone_slice(
    targets: Iterable[Node], feed: Mapping[Node, Any], *, everything: bool = False, **meta: Any
) -> list[Any]:
    """Copy what ``targets`` read, back to the nodes in ``feed``, which are replaced by their values.

    The copies go to the graph's insertion point and carry ``meta`` besides their own; placeholders and ``get_attr``
    nodes are shared, and so is what does not depend on ``feed``. ``everything`` copies also where a value
    is fed to itself.
    """
    targets = list(targets)
    graph = targets[0].graph
    needed = _slice_until(targets, set(feed))
    values: dict[Node, Any] = dict(feed)
    fresh = set(feed) if everything else {n for n, v in feed.items() if v is not n}
    for node in list(graph.nodes):
        if node not in needed:
            continue
        if any(a in fresh for a in node.all_input_nodes):
            values[node] = graph.node_copy(node, lambda n: values[n])
            values[node].meta = {**node.meta, **meta}
            fresh.add(node)
        else:
            values[node] = node
    return [values[t] for t in targets]


def _slice_until(targets: Iterable[Node], stop: set[Node]) -> set[Node]:
    """``ancestors`` that does not go past ``stop``, which it leaves out."""
    found: set[Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in found and node not in stop:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def layer_index(node: Node, layers: str) -> int | None:
    """The 0-based index when ``node`` belongs to a layer of the list at module path ``layers``."""
    path = str(node.meta.get("layer", ""))
    if not path.startswith(f"{layers}."):
        return None
    return int(path[len(layers) + 1 :].partition(".")[0])


def check_attention(attention: Node, banned: Iterable[str], doing: str) -> None:
    """Raises UserError where an attention node has one of those operands, which ``doing`` does not know of."""
    for name, value in operands_of(attention).items():
        if name in banned and value is not None:
            raise UserError(
                f"{doing} does not know the {name} of attention",
                where=str(attention.meta.get("layer", attention.name)),
                fix="choose a recipe without such a stage for this model",
            )


def shape_of(node: Node) -> tuple[int, ...]:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return tuple(value.shape)
