"""Every value that crosses from before a decoder layer to it and beyond, by what pruning there must do to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from secateur.compiler import ops
from secateur.compiler.deepstack import is_plane
from secateur.passes.edit import Node, ancestors, is_call, layer_index
from secateur.runtime.errors import SecateurError


@dataclass(frozen=True)
class Crossing:
    """Values alive at a site, by what must happen to them."""

    hidden: Node
    tables: tuple[Node, ...]
    """Follow from the positions alone (rotary cos and sin), ``[B,s,...]``."""
    carried: tuple[Node, ...]
    """Other per-token tensors ``[B,s,...]``, planes of DeepStack among them."""
    lengths: tuple[Node, ...]
    users: dict[Node, tuple[Node, ...]]
    """Readers at or after the site."""


def find_crossing(graph: fx.Graph, layers: str, layer: int, where: str) -> Crossing:
    """Classify every value produced before ``layer`` and read by it or later."""
    first = first_node(graph, layers, layer)
    order = {n: i for i, n in enumerate(graph.nodes)}
    users: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if node is first:
            break
        # Stages read what layers do not: only the model's own nodes tell what crosses.
        later = tuple(
            u for u in node.users if order[u] >= order[first] and "layer" in u.meta and not u.meta.get("before_site")
        )
        if later and node.op != "get_attr":
            users[node] = later
    hidden_input = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "hidden")
    flows = {n for n in users if hidden_input in ancestors([n]) and isinstance(n.meta["val"], Tensor)}
    tables: list[Node] = []
    carried: list[Node] = []
    lengths: list[Node] = []
    streams: list[Node] = []
    for node in users:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            lengths.append(node)
        elif not _has_token_axis(node):
            shown = ",".join(str(n) if isinstance(n, int) else "s" for n in value.shape)
            raise SecateurError(
                f"value {node.name} [{shown}] crosses into layer {layer} and its token axis is not dimension 1",
                where=f"insert_decoder_stages: {where}",
                fix="the pass must learn this kind of value before the family can be pruned inside the decoder",
            )
        elif is_plane(node):
            carried.append(node)
        elif node.meta.get("table"):
            tables.append(node)
        elif node in flows and value.is_floating_point():
            # Whole numbers follow from it where an earlier stage chose their rows; they are no stream.
            streams.append(node)
        else:
            (tables if value.is_floating_point() else carried).append(node)
    if len(streams) != 1:
        raise SecateurError(
            f"{len(streams)} hidden streams cross into layer {layer}: {', '.join(n.name for n in streams)}",
            where=f"insert_decoder_stages: {where}",
        )
    return Crossing(streams[0], tuple(tables), tuple(carried), tuple(lengths), users)


def _has_token_axis(node: Node) -> bool:
    shape = node.meta["val"].shape
    return bool(node.meta.get("rows")) or (
        len(shape) >= 2 and not isinstance(shape[1], int) and all(isinstance(n, int) for n in (shape[0], *shape[2:]))
    )


def first_node(graph: fx.Graph, layers: str, layer: int) -> Node:
    for node in graph.nodes:
        index = layer_index(node, layers)
        if index is not None and index >= layer and not node.meta.get("before_site"):
            return node
    raise SecateurError(f"no layer {layer} under {layers}", where="insert_decoder_stages")


def attention_of(graph: fx.Graph, layers: str, layer: int) -> Node:
    return next(n for n in graph.nodes if is_call(n, ops.attention) and layer_index(n, layers) == layer)
