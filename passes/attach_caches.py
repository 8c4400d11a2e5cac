"""Give every decoder layer its cache: buffers come in, rows are written, buffers go out, one capacity per segment.

Where a recipe shrinks caches, a layer before a stage attends to all its rows in prefill, and writes those alone that
every later stage lets through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

import torch

from secateur.compiler import ops
from secateur.compiler.program import Program, Segment, args_of, arrange_operands, operands_of
from secateur.passes.attend_in_windows import lay_out_positions, position_input
from secateur.passes.crossing import find_crossing
from secateur.passes.edit import Node, aten, is_call, layer_index
from secateur.passes.insert_decoder_stages import recompute_tables
from secateur.runtime.errors import UserError


def attach_caches(program: Program, layers: str, segments: Sequence[Segment], batch: int, *, fresh: bool) -> Program:
    """Turn attention into cached attention.

    New inputs per layer i: ``past_key_i``, ``past_value_i`` ``[B,Hkv,C,d]`` with C its segment's capacity; new outputs
    ``present_key.i``, ``present_value.i``. In prefill (``fresh``) rows go to slots 0…, of a segment with ``evicted``
    rows the survivors of all later stages; in decode to the input ``slot_<segment> [B]``. Of a segment whose windows
    count positions, prefill returns those of the cached rows as ``positions.<segment> [B,C]``, and decode reads them.
    """
    module = program.edit()
    graph = module.graph
    anchor = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(anchor):
        starts = _starts(graph, segments, batch, fresh)
    survivors = _find_survivors(graph, segments) if fresh else {}
    presents: list[Node] = []
    names: list[str] = []
    planes: dict[str, Node] = {}
    found = [n for n in graph.nodes if is_call(n, ops.attention)]
    for node in found:
        layer = layer_index(node, layers)
        segment = next(s for s in segments if layer is not None and s.first_layer <= layer < s.last_layer)
        given = operands_of(node)
        k, v, positions = given["k"], given["v"], given["positions"]
        if positions is not None and segment.name not in planes:
            with graph.inserting_before(graph.output_node() if fresh else anchor):
                if fresh:
                    last = next(n for n in graph.find_nodes(op="placeholder") if n.name == "last")
                    plane = lay_out_positions(module, segment, positions, survivors.get(segment.name), last, batch)
                else:
                    plane = graph.placeholder(f"positions_{segment.name}")
                    plane.meta["val"] = torch.empty(batch, segment.capacity, dtype=torch.int64, device="meta")
            planes[segment.name] = plane
        heads, width, kind = k.meta["val"].shape[1], k.meta["val"].shape[3], k.meta["val"].dtype
        with graph.inserting_before(anchor):
            past = [graph.placeholder(f"past_{role}_{layer}") for role in ("key", "value")]
        for port in past:
            port.meta["val"] = torch.empty(batch, heads, segment.capacity, width, dtype=kind, device="meta")
        names += [f"present_key.{layer}", f"present_value.{layer}"]
        start = starts[segment.name]
        if fresh and segment.evicted:
            with graph.inserting_before(graph.output_node()):
                rows = survivors[segment.name]
                written = [
                    _write_survivors(graph, port, new, rows, start) for port, new in zip(past, (k, v), strict=True)
                ]
            for new in written:
                new.meta = {"layer": node.meta.get("layer")}
            presents += written
            continue
        with graph.inserting_before(node):
            known = None if fresh or positions is None else planes[segment.name]
            more = dict(zip(("past_k", "past_v"), past, strict=True), start=start, past_positions=known)
            cached = graph.call_function(ops.cached_attention, _carry_operands(given, more, segment, layer, fresh))
            out, *present = (graph.call_function(getitem, (cached, i)) for i in range(3))
        for new in (cached, out, *present):
            new.meta = {"layer": node.meta.get("layer")}
        out.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        presents += present
    if fresh:
        presents += planes.values()
        names += [f"positions.{name}" for name in planes]
    output = graph.output_node()
    output.args = ((*args_of(output)[0], *presents),)
    for node in graph.find_nodes(op="placeholder"):
        if node.name == "block_ids" and not node.users:
            graph.erase_node(node)
    return program.with_module(module, (*program.outputs, *names))


def _carry_operands(
    given: dict[str, Any], more: Mapping[str, Any], segment: Segment, layer: int | None, fresh: bool
) -> tuple[Any, ...]:
    """Arguments of ``cached_attention`` for an ``attention`` of those operands. Raises UserError for one that has no
    counterpart there."""
    operands = {**given, **more, "fresh": fresh}
    if not operands.pop("causal"):
        raise UserError(
            f"layer {layer} attends to tokens after its own, which a cache of earlier tokens cannot hold",
            where="attach_caches", fix="decoder layers must attend causally",
        )  # fmt: skip
    if not fresh:
        operands["block_ids"] = None  # a new token sees all that came before it: blocks matter in prefill alone
        bias = operands["bias"]
        keys = None if bias is None else bias.meta["val"].shape[-1]
        if keys not in (None, segment.capacity):
            raise UserError(
                f"layer {layer} adds a bias to attention, of {keys} keys, where its cache has {segment.capacity} slots",
                where="attach_caches", fix="models with a bias in their decoder's attention cannot be compiled",
            )  # fmt: skip
    return arrange_operands(ops.cached_attention, operands)


def renumber_decode(program: Program, layers: str, segments: Sequence[Segment]) -> Program:
    """In recipes that number survivors afresh, a new token's position in a pruned segment is its slot there, rows that
    its caches let go of counted in."""
    module = program.edit()
    graph = module.graph
    anchor = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    crossings = {s: find_crossing(graph, layers, s.first_layer, "decode") for s in segments if s.removed}
    for segment, crossing in reversed(crossings.items()):
        slot = _slot_input(graph, segment, _batch(graph), anchor)
        with graph.inserting_before(anchor):
            # What the caches let go of moves a token's slot, not its number among the rows the layers saw.
            number = graph.call_function(aten.add.Tensor, (slot, segment.evicted)) if segment.evicted else slot
            positions = graph.call_function(aten.unsqueeze.default, (number, 1))
        with graph.inserting_before(_last(crossing.tables)):
            twins = recompute_tables(graph, crossing.tables, positions, 1)
        # Windows that count positions count the same.
        counted = {n: positions for n in crossing.carried if n is position_input(graph)}
        for old, new in {**twins, **counted}.items():
            for user in crossing.users[old]:
                user.replace_input_with(old, new)
    return program.with_module(module)


def _find_survivors(graph: torch.fx.Graph, segments: Sequence[Segment]) -> dict[str, Node]:
    """Of every segment with ``evicted`` rows, which of its rows all later stages let through: ``[B,K]`` slots."""
    taken = {n.meta["survivors"]: n for n in graph.nodes if "survivors" in n.meta}
    found: dict[str, Node] = {}
    later: Node | None = None
    with graph.inserting_before(graph.output_node()):
        for segment in reversed(segments):
            if not segment.evicted:
                continue
            rows = taken[segment.last_layer]
            found[segment.name] = rows if later is None else graph.call_function(ops.take_rows, (rows, later))
            later = found[segment.name]
    return found


def _write_survivors(graph: torch.fx.Graph, past: Node, new: Node, rows: Node, start: Node) -> Node:
    """The cache ``past`` with those ``rows`` of ``new [B,Hkv,S,d]`` written from ``start`` on."""
    turned = graph.call_function(aten.transpose.int, (new, 1, 2))
    taken = graph.call_function(ops.take_rows, (turned, rows))
    return graph.call_function(
        ops.write_rows, (past, graph.call_function(aten.transpose.int, (taken, 1, 2)), start, True)
    )


def _starts(graph: torch.fx.Graph, segments: Sequence[Segment], batch: int, fresh: bool) -> dict[str, Node]:
    if not fresh:
        anchor = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        return {s.name: _slot_input(graph, s, batch, anchor) for s in segments}
    zeros = graph.call_function(aten.zeros.default, ([batch],), {"dtype": torch.int64})
    return {s.name: zeros for s in segments}


def _slot_input(graph: torch.fx.Graph, segment: Segment, batch: int, anchor: Node) -> Node:
    name = f"slot_{segment.name}"
    for node in graph.nodes:
        if node.op == "placeholder" and node.name == name:
            return node
    with graph.inserting_before(anchor):
        slot = graph.placeholder(name)
    slot.meta["val"] = torch.empty(batch, dtype=torch.int64, device="meta")
    return slot


def _batch(graph: torch.fx.Graph) -> int:
    hidden = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "hidden")
    return int(hidden.meta["val"].shape[0])


def _last(nodes: Sequence[Node]) -> Node:
    order = {n: i for i, n in enumerate(nodes[0].graph.nodes)}
    last: Node = max(nodes, key=order.__getitem__).next
    return last
