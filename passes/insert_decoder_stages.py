"""Insert the stages that stand before decoder layers.

At a site before layer k every value that crosses from before k to k-and-after is found: the hidden stream, the
rotary tables, the symbolic length. The stage is spliced in, each crossing tensor has its rows taken, and the length is
read off the shorter stream. A crossing value the pass does not know is an error that names the node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from secateur.compiler import ops
from secateur.compiler.deepstack import is_plane
from secateur.compiler.function import trace_function
from secateur.compiler.plan_recipe import PlannedStage
from secateur.compiler.program import Program, Segment, args_of, splice
from secateur.compiler.recipe import Cache
from secateur.passes.attend_in_windows import has_windows, position_input
from secateur.passes.crossing import find_crossing, first_node
from secateur.passes.decoder_site import DecoderSite
from secateur.passes.edit import Node, aten, clone_slice, is_call
from secateur.passes.signals import STATE
from secateur.passes.sites import start_state
from secateur.passes.stage import StageFunction


def _applies_again(stages: Sequence[StageFunction], planned: PlannedStage) -> bool:
    """Whether a stage before the next layer re-applies the projections of the layer ``planned`` stands before."""
    return any(
        s.planned.site.layer == (planned.site.layer or 0) + 1
        and any(options.get("projections") == "own" for options in s.signal_options.values())
        for s in stages
    )


def split_segments(
    stages: Sequence[PlannedStage], layers: int, sequence: int, new_tokens: int, cache: Cache = "ragged"
) -> tuple[Segment, ...]:
    """The runs of decoder layers of one length: ``[0,k0) [k0,k1) … [kn,L)``; a site at layer 0 leaves no first run."""
    found: list[Segment] = []
    first, removed = 0, 0
    gone = sum(s.groups * (s.length_in - s.length_out) for s in stages) if cache == "shrink" else 0
    for stage in (*(s for s in stages if not s.observes), None):
        last = layers if stage is None else stage.site.layer or 0
        if last > first:
            length, evicted = sequence - removed, max(0, gone - removed)
            capacity = length - evicted + new_tokens
            found.append(Segment(f"s{len(found)}", first, last, length, capacity, removed, evicted))
        if stage is not None:
            first, removed = last, removed + stage.groups * (stage.length_in - stage.length_out)
    return tuple(found)


def insert_decoder_stages(
    program: Program,
    stages: Sequence[StageFunction],
    layers: str,
    batch: int,
    sequence: int,
    carries: bool = False,
    extra_rows: int = 0,
    between: bool = False,
    by_length: bool = False,
) -> Program:
    """The decoder with its stages, for prefill.

    New inputs: ``prunable [B,N]`` bool, ``last [B]`` int64 slot of the last real token and, where ``carries`` says so,
    ``carried [B,V]`` float32 from the vision program; with ``between`` ``question [B]`` int64, the real rows behind the
    last image, where a stage asks for those. New outputs: ``last`` as seen by the last segment, and
    ``kept.stage<i> [B,K]`` of every stage that chooses. ``extra_rows`` stand behind every image, and with ``between``
    others between its tokens. With ``by_length`` rotary frequencies follow the largest number of a row: pads have
    that of its last token. The rows a stage takes are marked ``survivors`` with its layer.
    """
    module = program.edit()
    graph = module.graph
    anchor = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    entered = stages[0].planned.groups * stages[0].planned.length_in if stages else 0
    with graph.inserting_before(anchor):
        prunable, last = graph.placeholder("prunable"), graph.placeholder("last")
        state: dict[str, Node] = {}
        if carries:
            state["carried"] = graph.placeholder("carried")
            state["carried"].meta["val"] = torch.empty(batch, entered, device="meta")
        prunable.meta["val"] = torch.empty(batch, sequence, dtype=torch.bool, device="meta")
        last.meta["val"] = torch.empty(batch, dtype=torch.int64, device="meta")
        wanted = track_state(stages, 0)
        if wanted and (names := list(start_state(wanted, 1, 1))):
            made = trace_function(
                "state", lambda last: tuple(start_state(wanted, batch, entered).values()),
                {"last": torch.zeros(batch, dtype=torch.int64)}, names,
            )  # fmt: skip
            state |= dict(zip(names, splice(module, made, {"last": last}), strict=True))
    question: Node | None = None
    if between and any("text_rows" in stage.signals for stage in stages):
        with graph.inserting_before(anchor):
            question = graph.placeholder("question")
        question.meta["val"] = torch.empty(batch, dtype=torch.int64, device="meta")
    kept: dict[str, Node] = {}
    length = sequence
    block_ids = next((n for n in graph.find_nodes(op="placeholder") if n.name == "block_ids"), None)
    positions = position_input(graph) if has_windows(graph) else None
    for index, stage in enumerate(stages):
        planned = stage.planned
        if index and planned.part != stages[index - 1].planned.part:
            state.pop("carried", None)
        crossing = find_crossing(graph, layers, planned.site.layer or 0, planned.name)
        with graph.inserting_before(first_node(graph, layers, planned.site.layer or 0)):
            site = DecoderSite(
                module, layers, stage, crossing, last, length, extra_rows, block_ids, question, positions
            )
            site.locate(prunable)
            reusable = site.tap()
            rows, chosen, hidden, prunable, state = site.splice(
                prunable, {n: v for n, v in state.items() if n in stage.signals or n in track_state(stages, index + 1)},
                track_state(stages, index + 1), entered,
            )  # fmt: skip
            if planned.observes:
                continue
            rows.meta["survivors"] = planned.site.layer
            if planned.length_out:
                kept[planned.name] = chosen
            removed = planned.groups * (planned.length_in - planned.length_out)
            length -= removed
            last = graph.call_function(aten.sub.Tensor, (last, removed))
            size = graph.call_function(aten.sym_size.int, (hidden, 1))
            size.meta["val"] = length
            carried = {crossing.hidden: hidden, **dict.fromkeys(crossing.lengths, size)}
            carried |= {n: _take(graph, n, rows, length) for n in crossing.carried}
            block_ids = None if block_ids is None else carried[block_ids]
            if positions is not None:
                before = positions
                if planned.positions == "original":
                    positions = carried.get(before) or _take(graph, before, rows, length)
                else:
                    positions = _count(graph, batch, length)
                    positions.meta |= {"val": _take_value(before, length), "rows": True}
                carried[before] = positions
            if planned.positions == "original":
                for table in crossing.tables:
                    carried[table] = _take(graph, table, rows, length)
                    carried[table].meta["table"] = table.meta.get("table", table)
            else:
                numbers = _count(graph, batch, length)
                if by_length:
                    end = graph.call_function(aten.unsqueeze.default, (last, 1))
                    numbers = graph.call_function(aten.minimum.default, (numbers, end))
                carried |= recompute_tables(graph, crossing.tables, numbers, length)
            # A merge changes the rows the keys follow from; a later stage that applies this layer's projections
            # again needs them to follow from the layer's input.
            if reusable is not None and planned.merge is None and not _applies_again(stages, planned):
                projected, twin = reusable
                crossing.users[projected] = tuple(projected.users)
                carried[projected] = _take(graph, twin, rows, length)
        for old, new in carried.items():
            for user in crossing.users.get(old, ()):
                user.replace_input_with(old, new)
    output = graph.output_node()
    output.args = ((*args_of(output)[0], last, *kept.values()),)
    return program.with_module(module, (*program.outputs, "last", *(f"kept.{name}" for name in kept)))


def track_state(stages: Sequence[StageFunction], index: int) -> list[str]:
    """The state (``signals.STATE``) that stages from ``index`` on ask for."""
    return [name for name in STATE if any(name in s.signals for s in stages[index:])]


def _take(graph: fx.Graph, node: Node, rows: Node, length: int) -> Node:
    taken = graph.call_function(ops.take_rows, (node, rows))
    taken.meta = {"val": _take_value(node, length), "rows": True, "plane": is_plane(node)}
    return taken


def _take_value(node: Node, length: int) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty((value.shape[0], length, *value.shape[2:]), dtype=value.dtype, device="meta")


def _count(graph: fx.Graph, batch: int, length: int) -> Node:
    """The numbers 0..length-1 for every row: ``[B,length]``."""
    count = graph.call_function(aten.arange.default, (length,), {"dtype": torch.int64})
    grid = graph.call_function(aten.unsqueeze.default, (count, 0))
    return graph.call_function(aten.expand.default, (grid, [batch, length]))


def recompute_tables(graph: fx.Graph, tables: Sequence[Node], positions: Node, length: int) -> dict[Node, Node]:
    """Rotary tables for other positions ``[B,length]``: table -> its twin."""
    root = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "position_ids")
    if root.meta["val"].dim() == 3:
        batch = root.meta["val"].shape[1]
        positions = graph.call_function(aten.expand.default, (positions, [3, batch, length]))
    sizes = {n: length for n in graph.nodes if is_call(n, aten.sym_size.int)}
    sources = [t.meta.get("table", t) for t in tables]
    made = clone_slice(sources, {root: positions, **sizes}) if sources else []
    for source, new in zip(sources, made, strict=True):
        new.meta = {**source.meta, "rows": True, "table": source}
    return dict(zip(tables, made, strict=True))
