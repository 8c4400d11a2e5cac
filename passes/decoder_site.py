"""A decoder stage while it is inserted: the nodes its signals are made of, and the function itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.compiler import ops
from secateur.compiler.function import trace_function
from secateur.compiler.program import args_of, operands_of, splice
from secateur.passes.attend_in_windows import window_of
from secateur.passes.crossing import Crossing, attention_of, find_crossing
from secateur.passes.edit import Node, aten, check_attention, clone_slice, is_call
from secateur.passes.signals import Raw, SequenceView, list_raws
from secateur.passes.sites import locate, reduce_sequence
from secateur.passes.stage import StageFunction


@dataclass
class DecoderSite:
    """One stage being inserted: the nodes its signals are made of, and the spliced function."""

    module: fx.GraphModule
    layers: str
    stage: StageFunction
    crossing: Crossing
    last: Node
    length: int
    extra_rows: int
    block_ids: Node | None = None
    question: Node | None = None
    positions: Node | None = None
    """Of the rows that stand at the site ``[B,L]``, where layers attend through windows."""

    def __post_init__(self) -> None:
        self.graph = self.module.graph
        self.layer = self.stage.planned.site.layer or 0
        self.raw: dict[str, Node] = {}
        self.feed: dict[str, Tensor] = {}
        self.scale: dict[str, float] = {}
        self.window: dict[str, int] = {}
        self.slots: dict[str, Node] = {}

    def locate(self, prunable: Node) -> None:
        """Slots of the prunable tokens and of the others."""
        planned = self.stage.planned
        total = planned.groups * planned.length_in
        batch = int(prunable.meta["val"].shape[0])
        flags = torch.ones(batch, self.length, dtype=torch.bool)
        found = trace_function(
            f"{planned.name}.locate", lambda flags: locate(flags, total), {"flags": flags}, ("columns", "texts")
        )
        columns, texts = splice(self.module, found, {"flags": prunable})
        last = self.graph.call_function(aten.unsqueeze.default, (self.last, 1))
        last.meta["val"] = torch.empty(batch, 1, dtype=torch.int64, device="meta")
        self.slots = {"visual": columns, "text": texts, "last": last}

    def tap(self) -> tuple[Node, Node] | None:
        """Find or make the nodes of every raw tensor. When layer k's own keys were computed for all rows, returns
        (its key projection, the copy), so that the layer takes rows of the copy instead of computing them twice."""
        reusable = None
        by_place: dict[str, list[Raw]] = {}
        for raw in list_raws(self.stage):
            by_place.setdefault(raw.where, []).append(raw)
        for where, raws in by_place.items():
            if where == "":
                self._tap_streams(raws)
            elif where == "previous":
                self._tap_previous(raws)
            else:
                reusable = self._tap_again(where, raws) or reusable
        return reusable

    def _tap_streams(self, raws: Sequence[Raw]) -> None:
        width = self.crossing.hidden.meta["val"].shape[-1]
        for raw in raws:
            if raw.kind == "normed":
                norm = args_of(self.graph.output_node())[0][0]
                assert is_call(norm, ops.rms_norm), "the decoder ends with a norm"
                (node,) = clone_slice([norm], {args_of(norm)[0]: self.crossing.hidden}, before_site=True)
            else:
                node = _branch(self.graph, f"{self.layers}.{self.layer - 1}", raw.kind)
            self._add(raw, node, (self.length, width))

    def _tap_previous(self, raws: Sequence[Raw]) -> None:
        attention = attention_of(self.graph, self.layers, self.layer - 1)
        for raw in raws:
            node = _projected(attention, raw.kind)
            if raw.rows != "all":
                turned = self.graph.call_function(aten.transpose.int, (node, 1, 2))
                taken = self.graph.call_function(ops.take_rows, (turned, self.slots[raw.rows]))
                node = self.graph.call_function(aten.transpose.int, (taken, 1, 2))
            self._add_heads(raw, node, attention)

    def _tap_again(self, where: str, raws: Sequence[Raw]) -> tuple[Node, Node] | None:
        """Projections of the layer about to run ("next"), or of the one before it once more ("own"), on the stream."""
        attention = attention_of(self.graph, self.layers, self.layer if where == "next" else self.layer - 1)
        entered = (
            self.crossing
            if where == "next"
            else find_crossing(self.graph, self.layers, self.layer - 1, self.stage.planned.name)
        )
        whole = {entered.hidden: self.crossing.hidden, **{n: n for n in (*entered.tables, *entered.carried)}}
        for raw in (r for r in raws if r.rows != "all"):
            count = int(self.slots[raw.rows].meta["val"].shape[1])
            feed: dict[Node, Any] = {
                old: self.graph.call_function(ops.take_rows, (new, self.slots[raw.rows])) for old, new in whole.items()
            }
            feed |= dict.fromkeys(entered.lengths, count)
            (node,) = clone_slice([_projected(attention, raw.kind)], feed, before_site=True)
            self._add_heads(raw, node, attention)
        full = [r for r in raws if r.rows == "all"]
        if not full:
            return None
        projection = _projection(operands_of(attention)["k"]) if any(r.kind == "key" for r in full) else None
        # A value fed to itself marks where the copy ends.
        feed = {**whole, **{n: n for n in entered.lengths}}
        targets = [_projected(attention, r.kind) for r in full] + ([projection] if projection is not None else [])
        copies = clone_slice(targets, feed, everything=True, before_site=True)
        for raw, node in zip(full, copies, strict=False):
            self._add_heads(raw, node, attention)
        return (projection, copies[-1]) if where == "next" and projection is not None else None

    def _add_heads(self, raw: Raw, node: Node, attention: Node) -> None:
        kind = raw.kind.rpartition("_")[2]
        if kind == "query":
            check_attention(attention, ("softcap", "bias"), f"a score that reads {raw.name}")
        source = operands_of(attention)[kind[0]]
        heads, width = _head_shape(source)
        count = self.length if raw.rows == "all" else int(self.slots[raw.rows].meta["val"].shape[1])
        self._add(raw, node, (heads, count, width))
        self.scale[raw.name] = float(operands_of(attention)["scale"])
        if (window := window_of(attention)) is not None:
            self.window[raw.name] = window

    def _add(self, raw: Raw, node: Node, shape: tuple[int, ...]) -> None:
        stream = self.crossing.hidden.meta["val"]
        self.raw[raw.name] = node
        self.feed[raw.name] = torch.zeros(stream.shape[0], *shape, dtype=stream.dtype)

    def splice(
        self, prunable: Node, state: dict[str, Node], tracked: list[str], entered: int
    ) -> tuple[Node, Node, Node, Node, dict[str, Node]]:
        """The stage itself: rows, kept, hidden, prunable and the state for later stages."""
        stage, hidden = self.stage, self.crossing.hidden
        batch, width = hidden.meta["val"].shape[0], hidden.meta["val"].shape[-1]
        planned = stage.planned
        count = planned.groups * planned.length_in
        feed: dict[str, Tensor] = {
            "hidden": torch.zeros(batch, self.length, width, dtype=hidden.meta["val"].dtype),
            "prunable": torch.ones(batch, self.length, dtype=torch.bool),
            "last": torch.zeros(batch, dtype=torch.int64),
            "columns": torch.zeros(batch, count, dtype=torch.int64),
            "texts": torch.zeros(batch, self.length - count, dtype=torch.int64),
        }
        ports: dict[str, Node] = {
            "hidden": hidden, "prunable": prunable, "last": self.last,
            "columns": self.slots["visual"], "texts": self.slots["text"],
        }  # fmt: skip
        if self.block_ids is not None:
            feed["block_ids"] = torch.zeros(batch, self.length, dtype=torch.int64)
            ports["block_ids"] = self.block_ids
        if self.question is not None and "text_rows" in stage.signals:
            feed["question"], ports["question"] = torch.zeros(batch, dtype=torch.int64), self.question
        if self.window and self.positions is not None:
            feed["positions"] = torch.zeros(batch, self.length, dtype=torch.int64)
            ports["positions"] = self.positions
        fixed = len(feed)
        for name, node in state.items():
            feed[name] = torch.zeros(batch, count, dtype=torch.int64 if name == "source" else torch.float32)
            ports[name] = node
        feed |= self.feed
        ports |= self.raw
        names = list(feed)
        passed = [n for n in tracked if n in state or (n == "carried" and stage.bound.score is not None)]
        if planned.length_out == 0:
            passed = []

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(names, values, strict=True))
            held = {n: given[n] for n in names[fixed : fixed + len(state)]}
            raw = {n: given[n] for n in names[fixed + len(state) :]}
            seen = SequenceView(
                given["hidden"],
                given["last"],
                given["columns"],
                given["texts"],
                raw,
                self.scale,
                held,
                entered,
                self.extra_rows,
                given.get("block_ids"),
                given.get("question"),
                self.window,
                given.get("positions"),
            )
            reduced = reduce_sequence(stage, seen, given["prunable"], tracked)
            left = [reduced.state[n] for n in passed]
            if planned.observes:
                return tuple(left)
            return reduced.rows, reduced.kept, reduced.hidden, reduced.prunable, *left

        outputs = [] if planned.observes else ["rows", "kept", "hidden", "prunable"]
        if not outputs and not passed:
            return self.slots["visual"], self.slots["visual"], hidden, prunable, state
        traced = trace_function(planned.name, run, feed, (*outputs, *passed))
        made = splice(self.module, traced, ports)
        after = dict(zip(passed, made[len(outputs) :], strict=True))
        if planned.observes:
            return self.slots["visual"], self.slots["visual"], hidden, prunable, after
        rows, kept, new_hidden, new_prunable = made[:4]
        new_hidden.meta |= {"rows": True, "exposes": f"hidden.{planned.name}"}
        return rows, kept, new_hidden, new_prunable, after


def _projected(attention: Node, kind: str) -> Node:
    """An attention node's query, key or value, before rotation where ``kind`` starts with "plain_"."""
    node: Node = operands_of(attention)[kind.rpartition("_")[2][0]]
    if kind.startswith("plain_") and is_call(node, ops.rotary):
        node = args_of(node)[0]
    return node


def _branch(graph: fx.Graph, layer: str, kind: str) -> Node:
    """What a layer's attention or MLP reads, or what it adds to the stream: ``[B,s,D]``."""
    part = f"{layer}.self_attn" if kind.startswith("attention") else f"{layer}.mlp"
    inside = {n for n in graph.nodes if f"{n.meta.get('layer', '')}.".startswith(f"{part}.")
              and not n.meta.get("before_site")}  # fmt: skip
    if kind.endswith("_out"):
        found = {_behind_norm(n) for n in inside if any(u not in inside and "layer" in u.meta for u in n.users)}
    else:
        norms = {n for i in inside for n in i.all_input_nodes if n not in inside and n.op == "call_function"}
        found = {n for n in norms if str(n.meta.get("layer", "")).startswith(f"{layer}.")}
    assert len(found) == 1, f"{part} has {len(found)} values of kind {kind}"
    return found.pop()


def _behind_norm(node: Node) -> Node:
    """What a branch adds to the stream: in layers with norms behind their branches as well, what a norm returns."""
    norms = [u for u in node.users if is_call(u, ops.rms_norm) and "layer" in u.meta and not u.meta.get("before_site")]
    return norms[0] if norms else node


def _projection(key: Node) -> Node | None:
    """The linear projection ``[B,s,Hkv*d]`` the keys come from, through rotary, norm, transpose and view."""
    node = key
    while is_call(node, ops.rotary, ops.rms_norm, aten.transpose.int, aten.reshape.default):
        node = args_of(node)[0]
    return node if is_call(node, aten.linear.default) else None


def _head_shape(node: Node) -> tuple[int, int]:
    """(heads, width) of a ``[B,H,·,d]`` node; nodes made during this pass carry no value, their source does."""
    while "val" not in node.meta:
        node = args_of(node)[0]
    shape = node.meta["val"].shape
    return int(shape[1]), int(shape[-1])
