"""Insert the stages that stand before decoder layers.

At a site before layer k every value that crosses from before k to k-and-after is found: the hidden stream, the
rotary tables, the symbolic length. The stage is spliced in, each crossing tensor has its rows taken, and the length is
read off the shorter stream. A crossing value the pass does not know is an error that names the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from secateur.compiler import ops
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program, Segment, args_of, splice
from secateur.compiler.recipe import PlannedStage
from secateur.passes.edit import Node, ancestors, aten, clone_slice, is_call, layer_index
from secateur.passes.sites import reduce_sequence
from secateur.passes.stage import StageFunction
from secateur.runtime.errors import SecateurError


@dataclass(frozen=True)
class Crossing:
    """Values alive at a site, by what must happen to them."""

    hidden: Node
    tables: tuple[Node, ...]
    """Follow from the positions alone (rotary cos and sin), ``[B,s,...]``."""
    carried: tuple[Node, ...]
    """Other per-token tensors ``[B,s,...]``."""
    lengths: tuple[Node, ...]
    users: dict[Node, tuple[Node, ...]]
    """Readers at or after the site."""


def _applies_again(stages: Sequence[StageFunction], planned: PlannedStage) -> bool:
    """Whether a stage before the next layer re-applies the projections of the layer ``planned`` stands before."""
    return any(
        s.planned.site.layer == (planned.site.layer or 0) + 1
        and any(options.get("projections") == "own" for options in s.signal_options.values())
        for s in stages
    )


def split_segments(stages: Sequence[PlannedStage], layers: int, sequence: int, new_tokens: int) -> tuple[Segment, ...]:
    """The runs of decoder layers of one length: ``[0,k0) [k0,k1) … [kn,L)``; a site at layer 0 leaves no first run."""
    found: list[Segment] = []
    first, removed = 0, 0
    for stage in (*stages, None):
        last = layers if stage is None else stage.site.layer or 0
        if last > first:
            length = sequence - removed
            found.append(Segment(f"s{len(found)}", first, last, length, length + new_tokens, removed))
        if stage is not None:
            first, removed = last, removed + stage.groups * (stage.length_in - stage.length_out)
    return tuple(found)


def insert_decoder_stages(
    program: Program, stages: Sequence[StageFunction], layers: str, batch: int, sequence: int
) -> Program:
    """The decoder with its stages, for prefill.

    New inputs: ``prunable [B,N]`` bool, ``last [B]`` int64 slot of the last real token. New outputs:
    ``last`` as seen by the last segment, and ``kept.stage<i> [B,K]``.
    """
    module = program.edit()
    graph = module.graph
    anchor = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(anchor):
        prunable, last = graph.placeholder("prunable"), graph.placeholder("last")
    prunable.meta["val"] = torch.empty(batch, sequence, dtype=torch.bool, device="meta")
    last.meta["val"] = torch.empty(batch, dtype=torch.int64, device="meta")
    kept: dict[str, Node] = {}
    length = sequence
    for stage in stages:
        planned = stage.planned
        crossing = find_crossing(graph, layers, planned.site.layer or 0, planned.name)
        with graph.inserting_before(_first_node(graph, layers, planned.site.layer or 0)):
            taps, reusable = _tap(graph, layers, stage, crossing, last, length)
            rows, kept[planned.name], hidden, prunable = _splice_stage(
                module, stage, crossing.hidden, prunable, last, taps, length
            )
            removed = planned.groups * (planned.length_in - planned.length_out)
            length -= removed
            last = graph.call_function(aten.sub.Tensor, (last, removed))
            size = graph.call_function(aten.sym_size.int, (hidden, 1))
            size.meta["val"] = length
            carried = {crossing.hidden: hidden, **dict.fromkeys(crossing.lengths, size)}
            carried |= {n: _take(graph, n, rows, length) for n in crossing.carried}
            if planned.positions == "original":
                for table in crossing.tables:
                    carried[table] = _take(graph, table, rows, length)
                    carried[table].meta["table"] = table.meta.get("table", table)
            else:
                carried |= _renumber(graph, crossing.tables, batch, length)
            # A merge changes the rows the keys follow from; a later stage that applies this layer's projections
            # again needs them to follow from the layer's input.
            if reusable is not None and planned.merge is None and not _applies_again(stages, planned):
                projected, twin = reusable
                crossing.users[projected] = tuple(projected.users)
                carried[projected] = _take(graph, twin, rows, length)
        for old, new in carried.items():
            for user in crossing.users[old]:
                user.replace_input_with(old, new)
    output = graph.output_node()
    output.args = ((*args_of(output)[0], last, *kept.values()),)
    return program.with_module(module, (*program.outputs, "last", *(f"kept.{name}" for name in kept)))


def find_crossing(graph: fx.Graph, layers: str, layer: int, where: str) -> Crossing:
    """Classify every value produced before ``layer`` and read by it or later."""
    first = _first_node(graph, layers, layer)
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
        elif node.meta.get("table"):
            tables.append(node)
        elif node in flows:
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


def _first_node(graph: fx.Graph, layers: str, layer: int) -> Node:
    for node in graph.nodes:
        index = layer_index(node, layers)
        if index is not None and index >= layer and not node.meta.get("before_site"):
            return node
    raise SecateurError(f"no layer {layer} under {layers}", where="insert_decoder_stages")


def _attention_of(graph: fx.Graph, layers: str, layer: int) -> Node:
    return next(n for n in graph.nodes if is_call(n, ops.attention) and layer_index(n, layers) == layer)


def _tap(
    graph: fx.Graph, layers: str, stage: StageFunction, crossing: Crossing, last: Node, length: int
) -> tuple[dict[str, tuple[Node, Node, float]], tuple[Node, Node] | None]:
    """Query row, keys and scale per attention signal; and, when layer k's own keys were computed for all rows,
    (its key projection, the copy) so that the layer takes rows of the copy instead of computing them twice."""
    taps: dict[str, tuple[Node, Node, float]] = {}
    reusable = None
    site = stage.planned.site.layer or 0
    for name in (s for s in stage.signals if s != "tokens"):
        source = stage.signal_options[name]["projections"]
        attention = _attention_of(graph, layers, site if source == "next" else site - 1)
        index = graph.call_function(aten.unsqueeze.default, (last, 1))
        if source == "previous":
            query, key = args_of(attention)[0], args_of(attention)[1]
            turned = graph.call_function(aten.transpose.int, (query, 1, 2))
            row = graph.call_function(ops.take_rows, (turned, index))
            taps[name] = graph.call_function(aten.transpose.int, (row, 1, 2)), key, args_of(attention)[3]
            continue
        entered = crossing if source == "next" else find_crossing(graph, layers, site - 1, stage.planned.name)
        streams = {entered.hidden: crossing.hidden}
        one = dict.fromkeys(entered.lengths, 1)
        last_row = {
            old: graph.call_function(ops.take_rows, (new, index))
            for old, new in {**streams, **{n: n for n in (*entered.tables, *entered.carried)}}.items()
        }
        (query,) = clone_slice([args_of(attention)[0]], {**last_row, **one}, before_site=True)
        projection = _projection(args_of(attention)[1])
        # A value fed to itself marks where the copy ends.
        same = {**streams, **{n: n for n in (*entered.tables, *entered.carried, *entered.lengths)}}
        wanted = [args_of(attention)[1], *([projection] if projection else [])]
        copies = clone_slice(wanted, same, everything=True, before_site=True)
        taps[name] = query, copies[0], args_of(attention)[3]
        if source == "next" and projection is not None:
            reusable = projection, copies[1]
    return taps, reusable


def _projection(key: Node) -> Node | None:
    """The linear projection ``[B,s,Hkv*d]`` the keys come from, through rotary, norm, transpose and view."""
    node = key
    while is_call(node, ops.rotary, ops.rms_norm, aten.transpose.int, aten.reshape.default):
        node = args_of(node)[0]
    return node if is_call(node, aten.linear.default) else None


def _splice_stage(
    module: fx.GraphModule,
    stage: StageFunction,
    hidden: Node,
    prunable: Node,
    last: Node,
    taps: dict[str, tuple[Node, Node, float]],
    length: int,
) -> tuple[Node, Node, Node, Node]:
    batch, width = hidden.meta["val"].shape[0], hidden.meta["val"].shape[-1]
    kind = hidden.meta["val"].dtype
    feed: dict[str, Tensor] = {
        "hidden": torch.zeros(batch, length, width, dtype=kind),
        "prunable": torch.ones(batch, length, dtype=torch.bool),
        "last": torch.zeros(batch, dtype=torch.int64),
    }
    ports: dict[str, Node] = {"hidden": hidden, "prunable": prunable, "last": last}
    for name, (query, key, _) in taps.items():
        heads, keys = _head_shape(query), _head_shape(key)
        feed[f"{name}_query"] = torch.zeros(batch, heads[0], 1, heads[1], dtype=kind)
        feed[f"{name}_key"] = torch.zeros(batch, keys[0], length, keys[1], dtype=kind)
        ports |= {f"{name}_query": query, f"{name}_key": key}
    scales = {name: float(scale) for name, (_, _, scale) in taps.items()}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        pairs = {n: (values[3 + 2 * i], values[4 + 2 * i], s) for i, (n, s) in enumerate(scales.items())}
        return tuple(reduce_sequence(stage, values[0], values[1], values[2], pairs))

    traced = trace_function(stage.planned.name, run, feed, ("rows", "kept", "hidden", "prunable"))
    rows, kept, new_hidden, new_prunable = splice(module, traced, ports)
    new_hidden.meta |= {"rows": True, "exposes": f"hidden.{stage.planned.name}"}
    return rows, kept, new_hidden, new_prunable


def _head_shape(node: Node) -> tuple[int, int]:
    """(heads, width) of a ``[B,H,·,d]`` node; nodes made during this pass carry no value, their source does."""
    while "val" not in node.meta:
        node = args_of(node)[0]
    shape = node.meta["val"].shape
    return int(shape[1]), int(shape[-1])


def _take(graph: fx.Graph, node: Node, rows: Node, length: int) -> Node:
    taken = graph.call_function(ops.take_rows, (node, rows))
    value = node.meta["val"]
    taken.meta = {"val": torch.empty((value.shape[0], length, *value.shape[2:]), dtype=value.dtype, device="meta")}
    taken.meta["rows"] = True
    return taken


def _renumber(graph: fx.Graph, tables: Sequence[Node], batch: int, length: int) -> dict[Node, Node]:
    """The tables for positions 0..length-1: survivors are numbered afresh."""
    count = graph.call_function(aten.arange.default, (length,), {"dtype": torch.int64})
    grid = graph.call_function(aten.unsqueeze.default, (count, 0))
    return recompute_tables(graph, tables, graph.call_function(aten.expand.default, (grid, [batch, length])), length)


def recompute_tables(graph: fx.Graph, tables: Sequence[Node], positions: Node, length: int) -> dict[Node, Node]:
    """Rotary tables for other positions ``[B,length]``: table -> its twin."""
    root = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "position_ids")
    sizes = {n: length for n in graph.nodes if is_call(n, aten.sym_size.int)}
    sources = [t.meta.get("table", t) for t in tables]
    made = clone_slice(sources, {root: positions, **sizes}) if sources else []
    for source, new in zip(sources, made, strict=True):
        new.meta = {**source.meta, "rows": True, "table": source}
    return dict(zip(tables, made, strict=True))
