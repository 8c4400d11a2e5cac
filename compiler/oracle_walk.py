"""The eager oracle inside the decoder: hooks before every layer run the stages and shorten what follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.compiler.oracle_stages import begin_state, find_slots, shorten, tell_later
from secateur.compiler.oracle_windows import Windows
from secateur.compiler.recording import Record
from secateur.passes.signals import Raw, SequenceView, list_raws, sequence_signals
from secateur.passes.stage import StageFunction

if TYPE_CHECKING:
    from secateur.compiler.oracle import Oracle, RowRun


class Walk:
    """Prefill through the decoder: hooks before every layer take rows out and hand on shorter tables."""

    def __init__(
        self, oracle: Oracle, row: RowRun, record: Record, forced: Mapping[str, Tensor], prunable: Tensor, cache: Any,
        positions: Tensor,
    ) -> None:  # fmt: skip
        self.oracle, self.row, self.record, self.forced, self.cache = oracle, row, record, forced, cache
        self.prunable = prunable
        self.numbers = positions
        """Position ids of the rows that are left ``[L']``, or ``[3,L']``."""
        self.windows = Windows(oracle.layers)
        self.whole: Tensor | None = None
        """The prompt's mask without a window ``[1,1,N,N]``, where it is not causal."""
        self.block_ids: Tensor | None = None
        self.question: Tensor | None = None
        self.slots: Tensor | None = None
        """Which of the prompt's slots are left, ``[L']``; None: all."""
        self.tables: list[tuple[Tensor, ...]] = []
        """Every layer's own rotary tables so far, of all the prompt's slots."""
        stages = oracle.job.decoder_stages
        self.stages = {s.planned.site.layer: (i, s) for i, s in enumerate(stages)}
        self.rows_seen: list[int] = []
        """Of every layer so far, how many rows of the prompt it saw."""
        self.entered = int(prunable.sum())
        self.state = begin_state(1, self.entered)
        if oracle.carried is not None:
            self.state["carried"] = oracle.carried
        self.branches: dict[str, Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        decoder = self.oracle.decoder
        if self.row.planes:
            add = decoder._deepstack_process
            decoder._deepstack_process = lambda hidden, visual, plane: add(hidden, *self._follow(visual, plane))
        hooks = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.oracle.layers]
        for layer in self.oracle.layers:
            parts: Any = layer
            # In layers with norms behind their branches as well, those are what adds to the stream.
            both = hasattr(parts, "post_feedforward_layernorm")
            for name, module in (
                ("attention_in", parts.input_layernorm),
                ("attention_out", parts.post_attention_layernorm if both else parts.self_attn),
                ("mlp_in", parts.pre_feedforward_layernorm if both else parts.post_attention_layernorm),
                ("mlp_out", parts.post_feedforward_layernorm if both else parts.mlp),
            ):
                hooks.append(module.register_forward_hook(self._remember(name)))
        try:
            yield
        finally:
            if self.row.planes:
                del decoder._deepstack_process
            for hook in hooks:
                hook.remove()

    def _follow(self, visual: Tensor, plane: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the rows that are left are visual ``[1,L]``, and theirs ``[V,D]`` of a plane."""
        slots = torch.arange(visual.shape[1]) if self.slots is None else self.slots
        left = visual[:, slots]
        return left, plane[(visual[0].cumsum(0) - 1)[slots[left[0]]]]

    def _remember(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.branches[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, index = args[0], self.oracle.layers.index(module)
        self.tables.append(kwargs["position_embeddings"])
        if index in self.stages:
            hidden = self._reduce(*self.stages[index], hidden)
        self.rows_seen.append(hidden.shape[1])
        kwargs["position_embeddings"] = self._tables(index, hidden)
        whole, numbers = self.whole, self.numbers if self.numbers.dim() == 1 else torch.arange(hidden.shape[1])
        if whole is not None and self.slots is not None:
            whole = whole[:, :, self.slots][:, :, :, self.slots]
        mask = self.windows.narrow(index, whole, numbers)
        given = kwargs.get("attention_mask")
        known = mask is not None or self.windows.size(index) is not None
        assert given is None or known, "one unpadded row needs no mask"
        if self.slots is not None or not torch.equal(numbers, torch.arange(len(numbers))):
            # The model's own mask is right for whole rows alone.
            kwargs["attention_mask"] = mask
        return (hidden, *args[1:]), kwargs

    def _tables(self, index: int, hidden: Tensor) -> tuple[Tensor, ...]:
        """The rotary tables of a layer for the rows that are left, ``hidden [1,L',D]``."""
        if self.slots is None:
            return self.tables[index]
        if self.oracle.job.plan.recipe.positions == "compact":
            count = torch.arange(hidden.shape[1])[None]
            return self.oracle.rotate(self.oracle.layers[index], hidden, count)
        return tuple(table[:, self.slots] for table in self.tables[index])

    def _reduce(self, place: int, stage: StageFunction, hidden: Tensor) -> Tensor:
        stages = self.oracle.job.decoder_stages
        if place and stage.planned.part != stages[place - 1].planned.part:
            self.state.pop("carried", None)
        planned = stage.planned
        last = torch.tensor([hidden.shape[1] - 1])
        columns, texts = find_slots(self.prunable[0])
        if planned.length_out == 0:
            self.row.kept[planned.name] = columns[:0]
            return self._leave(stage, hidden[:, texts], texts, torch.zeros(1, len(texts), dtype=torch.bool))
        slots = {"last": last, "text": texts, "visual": columns}
        raw, scale = self._raw(stage, hidden, slots)
        blocks = self.block_ids if self.block_ids is None or self.slots is None else self.block_ids[:, self.slots]
        seen = SequenceView(hidden, last, columns[None], texts[None], raw, scale, self.state, self.entered,
                            self.oracle.job.source.vision.extra_rows, blocks, self.question,
                            self._windows_of(stage), self.numbers[None])  # fmt: skip
        signals = sequence_signals(stage, seen)
        self.oracle.note(self.row, stage, signals)
        given = None
        if planned.name in self.forced:
            given = self.forced[planned.name].reshape(planned.groups, -1)
            given = given - torch.arange(planned.groups)[:, None] * planned.length_in
        chosen, carry = stage.run(signals, given)
        self.state = {n: told.reshape(1, -1) for n, told in tell_later(self.state, carry, chosen).items()}
        if planned.observes:
            return hidden
        left = shorten(hidden[0], self.prunable[0], chosen)
        self.row.kept[planned.name] = left.kept
        return self._leave(stage, left.hidden[None], left.slots, left.prunable[None])

    def _leave(self, stage: StageFunction, hidden: Tensor, rows: Tensor, prunable: Tensor) -> Tensor:
        """Go on with ``hidden [1,L',D]``, which are ``rows [L']`` of those that entered the stage."""
        self.row.hidden[stage.planned.name] = hidden[0]
        self.prunable = prunable
        fresh = stage.planned.positions == "compact"
        self.numbers = torch.arange(len(rows)) if fresh else self.numbers[..., rows]
        if self.oracle.job.plan.recipe.cache == "shrink":
            self.windows.keep(stage.planned.site.layer or 0, rows)
            for before in self.cache.layers[: stage.planned.site.layer]:
                before.keys, before.values = (heads[:, :, rows] for heads in (before.keys, before.values))
        self.slots = rows if self.slots is None else self.slots[rows]
        return hidden

    def _windows_of(self, stage: StageFunction) -> dict[str, int]:
        """The windows of the layers whose attention a stage's signals are made of."""
        index = stage.planned.site.layer or 0
        sizes = {raw.name: self.windows.size(index - (raw.where != "next")) for raw in list_raws(stage) if raw.where}
        return {name: size for name, size in sizes.items() if size is not None}

    def _raw(
        self, stage: StageFunction, hidden: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The raw tensors of a stage's signals, from what the layers computed or by running one of them again."""
        found, scales = {}, {}
        index = stage.planned.site.layer or 0
        kept_branches = dict(self.branches)
        for raw in list_raws(stage):
            if raw.kind == "normed":
                found[raw.name] = self.oracle.decoder.norm(hidden)
            elif not raw.where:
                found[raw.name] = kept_branches[raw.kind]
            else:
                found[raw.name], scales[raw.name] = self._heads(raw, index, hidden, slots)
        return found, scales

    def _heads(self, raw: Raw, index: int, hidden: Tensor, slots: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        number = index if raw.where == "next" else index - 1
        layer: Any = self.oracle.layers[number]
        tables = self._tables(number, hidden)
        if raw.where != "previous":
            # Run the layer's own attention on these rows for its projections; the output is dropped.
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden), position_embeddings=tables, attention_mask=None
            )
        taken, scale = self.record.taken[layer.self_attn]
        kind = raw.kind.rpartition("_")[2]
        heads = taken[kind]
        if raw.kind.startswith("plain_"):
            heads = _turn_back(heads, *tables)
        return (heads if raw.rows == "all" else heads[:, :, slots[raw.rows]]), scale


def _turn_back(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo a rotary embedding: rotation by the opposite angle. ``heads [B,H,S,d]``, tables ``[B,S,d]``, which some
    kinds of rope scale."""
    first, second = heads.chunk(2, -1)
    turned = heads * cos[:, None] - torch.cat((-second, first), -1) * sin[:, None]
    return turned / (cos * cos + sin * sin)[:, None]
