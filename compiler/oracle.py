"""The eager oracle: the unmodified Hugging Face model with a recipe's stages run under hooks.

It shares the stage functions with the compiled graph and nothing else: no tracing, no passes, no padding, no
caches of fixed size. Rows are run one by one at their own length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compiler.families.family import VisionFacts
from secateur.compiler.pruned import Job
from secateur.compiler.tile_slots import follow_kept, lay_out_rows, slots_left
from secateur.compiler.trace import Source
from secateur.passes.check_stages import tower_layers
from secateur.passes.insert_decoder_stages import split_segments, track_state
from secateur.passes.join_phases import number_blocks
from secateur.passes.signals import (
    PatchView,
    Raw,
    SequenceView,
    list_raws,
    list_tower_raws,
    make_probes,
    take_head_rows,
    tower_raw,
)
from secateur.passes.sites import Seen, Thinned, locate, reduce_patches, reduce_sequence, start_state
from secateur.passes.stage import StageFunction
from secateur.passes.tile_rows import TileMap

RECORDING = "secateur_recording"


@dataclass
class RowRun:
    """What the oracle saw for one row. Tensors are on the CPU, without a batch dimension."""

    kept: dict[str, Tensor] = field(default_factory=dict)
    """Stage -> indices into the tokens that entered it, ``[K]``."""
    score: dict[str, Tensor] = field(default_factory=dict)
    """Stage -> score per entering token ``[G,N]``, where the recipe has one; float32."""
    signals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Stage -> everything its functions read, by signal; only where the run was asked to keep it."""
    hidden: dict[str, Tensor] = field(default_factory=dict)
    """Decoder stage -> rows it left ``[L',D]``."""
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    planes: list[Tensor] = field(default_factory=list)
    """Features of inner tower layers that the decoder adds (DeepStack), each ``[F,D]`` as ``features``."""
    keys: list[Tensor] = field(default_factory=list)
    """Per layer ``[Hkv,L,d]``, prompt rows and those of decode."""
    values: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """``[vocab]`` after the prompt and after each token that was decoded."""


class Oracle:
    """Runs rows of a job's recipe on a Hugging Face model in fp32."""

    def __init__(self, job: Job, model: nn.Module | None = None) -> None:
        self.job = job
        self.model = load_recording_model(job.source) if model is None else model
        self.family = family = job.source.family
        self.decoder: Any = self.model.get_submodule(family.decoder)
        self.layers = list(self.model.get_submodule(family.decoder_layers).children())
        self.tower = list(self.model.get_submodule(family.vision_layers).children())
        self.head = self.model.get_submodule(family.head)
        self.embedding = self.model.get_submodule(family.embedding)
        self.projector = self.model.get_submodule(family.projector)
        self.entry = self.model.get_submodule(family.tower.entry)
        self.carried: Tensor | None = None
        """What the vision side's last score carries into the decoder, ``[1,V]``, of the row that runs."""
        self.keep_signals = False

    @torch.no_grad()
    def run(
        self,
        input_ids: Sequence[int],
        pixel_values: Tensor,
        forced_tokens: Sequence[int] = (),
        forced_kept: Mapping[str, Tensor] | None = None,
        keep_signals: bool = False,
        greedy: int = 0,
        input_features: Tensor | None = None,
    ) -> RowRun:
        """One row. ``input_ids`` as prefill receives it (P + E placeholders per item, no padding); pixels
        ``[n,3,H,W]`` or whatever the tower reads, ``input_features`` what the tower reads that hears.

        ``forced_tokens`` are decoded one after the other; ``forced_kept`` replaces the choice of
        stages, ``[groups*K]`` each. Behind the forced tokens come ``greedy`` more, each the likeliest.
        """
        row = RowRun()
        self.keep_signals, self.carried = keep_signals, None
        forced = forced_kept or {}
        with _recording(self.model) as record:
            row.features = self._encode(pixel_values, row, forced, record)
            if self.job.source.audio is not None:
                assert input_features is not None, "this geometry has sound"
                row.features = self._hear(input_features, row, record)
            ids = torch.tensor([list(input_ids)])
            image = ids == self.job.source.config.image_token_id
            hidden = self.embedding(ids)
            hidden[image] = row.features
            positions, behind = self._positions(ids[0], image[0], row)
            prunable = mark_prunable(self.job, image, row.kept)
            from transformers import DynamicCache

            cache: Any = DynamicCache(config=self.decoder.config)
            walk = _Walk(self, row, record, forced, prunable, cache)
            if self.job.source.vision.tiles is not None:  # counted in the whole prompt
                walk.question = torch.tensor([image.shape[1] - 1 - int(image[0].nonzero()[-1])])
            mask = None
            if self.family.image_masks is not None:
                mask = self.family.image_masks(self.decoder.config, hidden, positions[None], cache, image)
                walk.block_ids = number_blocks(image)
            with walk.hooked():
                planes: dict[str, Any] = {"visual_pos_masks": image, "deepstack_visual_embeds": row.planes}
                out = self.decoder(
                    inputs_embeds=hidden, position_ids=positions[..., None, :], past_key_values=cache, use_cache=True,
                    attention_mask=mask, **(planes if row.planes else {}),
                ).last_hidden_state  # fmt: skip
            row.logits.append(self.head(out[0, -1]).float())
            removed = {s.first_layer: s.removed for s in walk.segments}
            for step in range(len(forced_tokens) + greedy):
                token = forced_tokens[step] if step < len(forced_tokens) else int(row.logits[-1].argmax())
                at = len(input_ids) + step
                step_positions = torch.tensor([[behind + step]])
                with self._decode_positions(removed, at):
                    out = self.decoder(
                        input_ids=torch.tensor([[token]]),
                        position_ids=step_positions,
                        past_key_values=cache,
                        use_cache=True,
                    ).last_hidden_state
                row.logits.append(self.head(out[0, -1]).float())
        row.keys = [layer.keys[0] for layer in cache.layers]
        row.values = [layer.values[0] for layer in cache.layers]
        return row

    def _encode(self, pixel_values: Tensor, row: RowRun, forced: Mapping[str, Tensor], record: _Record) -> Tensor:
        """The features of a row's images ``[F,D]``, with the stages of the vision side run under hooks."""
        facts, stages = self.job.source.vision, self.job.vision_stages
        state: dict[str, Tensor] = {}
        entering: dict[str, Tensor] = {}
        planes: list[Tensor] = []

        def reduce(index: int, tokens: Tensor, cls: bool) -> Tensor:
            stage = stages[index]
            head, tokens = tokens[:, : int(cls)], tokens[:, int(cls) :]
            extra = {}
            if "projector_inputs" in stage.signals:
                extra["projector_inputs"] = entering["projector"]
            if "probe_slopes" in stage.signals:
                options = stage.signal_options["probe_slopes"]
                probes = make_probes(entering["projector"], options["directions"], options["step"], options["seed"])
                project = self.job.source.family.project
                extra["probes"] = project(self.projector, probes) if project else self.projector.forward(probes)
            if index and stage.planned.part != stages[index - 1].planned.part:
                state.pop("carried", None)
            name, left = stage.planned.name, stage.planned.length_out
            given = None
            offset = torch.arange(stage.planned.groups)[:, None] * stage.planned.length_in
            if name in forced:
                chosen = from_prompt(self.job, index, forced[name])
                given = chosen.reshape(stage.planned.groups, left) - offset
            watch: list[Seen] = []
            tracked = [*track_state(stages, index + 1), "carried"]
            thin = self._thin(stage, tokens, facts, self.tower, self.family.vision_attention, state, extra, record,
                              tracked, given, watch)  # fmt: skip
            state.update(thin.state)
            self._note(row, stage, to_prompt(self.job, index, (thin.kept + offset).flatten()), watch)
            if not stage.planned.observes:
                planes[:] = [thin.thin(plane) for plane in planes]
            return torch.cat([head, thin.tokens], 1) if cls else thin.tokens

        if facts.projector_merges:
            assert self.family.vision_reference is not None
            record.calls.clear()
            features, *planes[:] = self.family.vision_reference(self.model, pixel_values, facts)
            for index in range(len(stages)):
                features = reduce(index, features, False)
        else:
            with ExitStack() as stack:
                for index, stage in enumerate(stages):
                    kind = stage.planned.site.kind
                    if kind == "vision.layer":
                        hook = self.tower[stage.planned.site.layer].register_forward_pre_hook(
                            lambda module, args, index=index: (reduce(index, args[0], facts.has_cls), *args[1:])
                        )
                    elif kind == "vision.out":
                        hook = self.entry.register_forward_pre_hook(
                            lambda module, args, index=index: (reduce(index, args[0], False), *args[1:])
                        )
                    else:
                        hook = self.projector.register_forward_hook(
                            lambda module, args, output, index=index: reduce(index, output, False)
                        )
                    stack.callback(hook.remove)
                watching = self.entry.register_forward_pre_hook(
                    lambda module, args: entering.__setitem__("projector", args[0])
                )
                stack.callback(watching.remove)
                features, _ = self.family.vision_forward(self.model, pixel_values, facts, {})
        if self.job.carries:
            self.carried = state["carried"].reshape(1, -1)
        if self.family.extra_rows:
            added = self.model.get_parameter(self.family.extra_rows)
            features = features.reshape(facts.items, -1, features.shape[-1])
            behind = added.reshape(-1, features.shape[-1])
            if facts.tiles is not None and self.job.removes_before_decoder:
                features = lay_out_rows(facts, follow_kept(facts, row.kept), features, behind[0])
            else:
                features = torch.cat([features, behind.expand(facts.items, -1, -1)], 1)
                if facts.tiles is not None:  # the row that was put last has the index -1
                    features = features[:, list(facts.tiles.order)]
        row.planes = [plane.reshape(-1, plane.shape[-1]) for plane in planes]
        return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]

    def _hear(self, input_features: Tensor, row: RowRun, record: _Record) -> Tensor:
        """What is seen and heard ``[F,D]`` in the prompt's order, with the stages behind the audio tower run."""
        job, tower, facts = self.job, self.family.audio, self.job.source.audio
        assert tower is not None
        assert facts is not None
        record.calls.clear()
        heard = tower.reference(self.model, input_features, facts)
        layers = list(self.model.get_submodule(tower.tower.layers).children())
        state: dict[str, Tensor] = {}
        for stage in job.audio_stages:
            watch: list[Seen] = []
            thin = self._thin(stage, heard, facts, layers, tower.tower.attention, state, {}, record, ["carried"], None,
                              watch)  # fmt: skip
            state.update(thin.state)
            self._note(row, stage, thin.kept.flatten(), watch)
        order = torch.tensor(job.media_order)
        if job.carries and self.carried is not None:
            self.carried = torch.cat([self.carried, state["carried"].reshape(1, -1)], 1)[:, order]
        tokens = heard.reshape(-1, heard.shape[-1])
        row.planes = [torch.cat([plane, torch.zeros_like(tokens)])[order] for plane in row.planes]
        return torch.cat([row.features, tokens])[order]

    def _thin(
        self, stage: StageFunction, tokens: Tensor, facts: VisionFacts, tower: Sequence[Any], attention: str,
        state: Mapping[str, Tensor], extra: Mapping[str, Tensor], record: _Record, tracked: Sequence[str],
        given: Tensor | None, watch: list[Seen],
    ) -> Thinned:  # fmt: skip
        """Run a stage behind or between the layers of a tower on ``tokens [M,N,D]``."""
        layers = tower_layers(stage, facts)
        raw, scale = {}, 1.0
        for kind, layer in list_tower_raws(stage, layers):
            module = tower[layer].get_submodule(attention)
            if facts.packed:  # each run of rows was a call of its own
                calls = [heads[kind] for heads, _ in record.calls[module]]
                raw[tower_raw(kind, layer)], scale = torch.cat(calls), record.taken[module][1]
            else:
                heads, scale = record.taken[module]
                raw[tower_raw(kind, layer)] = heads[kind]
        groups, length = stage.planned.groups, stage.planned.length_in
        begun = start_state([n for n in stage.signals if n not in state], groups, length)
        tiles = None if len(tokens) == groups else TileMap.of(facts)
        seen = PatchView(tokens, raw, scale, facts.has_cls, {**begun, **state}, extra, facts.grid, facts.merge,
                         facts.patch_order, None if tiles is None else tiles.join)  # fmt: skip
        return reduce_patches(stage, seen, layers, tracked, given, watch)

    def _note(self, row: RowRun, stage: StageFunction, kept: Tensor, watch: Sequence[Seen]) -> None:
        """Write down what a stage saw and chose."""
        name = stage.planned.name
        if not stage.planned.observes:
            row.kept[name] = kept
        for seen in watch:
            if seen.score is not None:
                row.score[name] = seen.score
            if self.keep_signals:
                row.signals[name] = seen.signals

    def _positions(self, ids: Tensor, image: Tensor, row: RowRun) -> tuple[Tensor, int]:
        """Position ids of a row's slots ``[N]`` or ``[3,N]``, and that of the first new token."""
        fresh = self.job.removes_before_decoder and not self.job.original_positions
        if self.job.source.media is not None and not fresh:
            return self._positions_of_places(ids, image, row)
        if fresh or not self.job.original_positions:
            return torch.arange(len(image)), len(image)
        return self._positions_of_patches(image, row), len(image) + self.job.position_offset

    def _positions_of_places(self, ids: Tensor, image: Tensor, row: RowRun) -> tuple[Tensor, int]:
        """What transformers itself numbers the unpruned prompt with, at the survivors' places."""
        job, media = self.job, self.job.source.media
        assert media is not None
        assert self.family.reference_positions is not None
        kinds = [heard for heard, count in media.runs for _ in range(count)]
        places = torch.arange(len(kinds))
        for stage in job.vision_stages:
            if stage.planned.name in row.kept:
                places = places[row.kept[stage.planned.name]]
        sizes = job.items_left
        whole: list[int] = []
        slots: list[int] = []
        first = at = index = used = 0
        while at < len(ids):
            if not image[at]:
                slots.append(len(whole))
                whole.append(int(ids[at]))
                at += 1
                continue
            item = media.items[index]
            for place in places[used : used + sizes[index]].tolist():
                slots.append(len(whole) + place - first)
            tokens = job.source.media_tokens(item.kind)
            whole += [tokens[kind] for kind in kinds[first : first + item.tokens]]
            first, at, used, index = first + item.tokens, at + sizes[index], used + sizes[index], index + 1
        numbered = self.family.reference_positions(self.model, torch.tensor([whole]), job.source, job.geometry)
        return numbered[:, slots], int(numbered.max()) + 1

    def _positions_of_patches(self, image: Tensor, row: RowRun) -> Tensor:
        """Position ids of a row's slots, counted one by one."""
        facts = self.job.source.vision
        per_item, whole = self.job.features_per_item, facts.tokens_per_item + facts.extra_rows
        kept = torch.arange(facts.tokens_per_row)
        for stage in self.job.vision_stages:
            if stage.planned.name in row.kept:
                kept = kept[row.kept[stage.planned.name]]
        lines = None if facts.tiles is None else slots_left(facts, kept)
        text, seen, positions = 0, 0, []
        for flag in image.tolist():
            if not flag:
                positions.append(text + seen // per_item * whole)
                text += 1
                continue
            number, place = divmod(seen, per_item)
            if lines is not None:
                patch = lines[number][place]
            elif place < self.job.kept_per_item:
                patch = int(kept[number * self.job.kept_per_item + place]) - number * facts.tokens_per_item
            else:
                patch = facts.tokens_per_item + place - self.job.kept_per_item
            positions.append(text + number * whole + patch)
            seen += 1
        return torch.tensor(positions)

    @contextmanager
    def _decode_positions(self, removed: Mapping[int, int], slot: int) -> Iterator[None]:
        """Under fresh numbering a new token stands, in a pruned segment, at its slot there."""
        if self.job.plan.recipe.positions == "original":
            yield
            return

        def renumber(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            first = max(k for k in removed if k <= self.layers.index(module))
            if removed[first]:
                position = torch.tensor([[slot - removed[first]]])
                kwargs["position_embeddings"] = self.rotate(module, args[0], position)
            return args, kwargs

        hooks = [layer.register_forward_pre_hook(renumber, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def rotate(self, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """The rotary tables of a layer at other positions ``[1,L]``; layers of a type may have their own."""
        kind = getattr(layer.self_attn, "layer_type", None)
        own = len(getattr(self.decoder.rotary_emb, "layer_types", ())) > 0
        tables: tuple[Tensor, ...] = self.decoder.rotary_emb(hidden, positions, *([kind] if own else []))
        return tables


def to_prompt(job: Job, index: int, kept: Tensor) -> Tensor:
    """What vision stage ``index`` kept, counted as a bundle with sound counts it (passes/join_encoders.py)."""
    if job.source.audio is None or job.source.media is None or job.vision_stages[index].planned.observes:
        return kept
    before, after = _orders(job, index)
    seen = len(before) - job.source.audio_tokens
    left = len(kept)
    return torch.tensor([before.index(int(kept[token]) if token < left else seen + token - left) for token in after])


def from_prompt(job: Job, index: int, kept: Tensor) -> Tensor:
    """The other way round."""
    if job.source.audio is None or job.source.media is None:
        return kept
    before, _ = _orders(job, index)
    seen = len(before) - job.source.audio_tokens
    return torch.tensor([token for token in (before[int(place)] for place in kept) if token < seen])


def _orders(job: Job, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    planned, media = job.vision_stages[index].planned, job.source.media
    assert media is not None
    whole = job.source.vision.tokens_per_image
    return media.order(whole, planned.length_in), media.order(whole, planned.length_out)


def mark_prunable(job: Job, image: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """Of one row's image slots ``[1,N]`` bool, those of patches; the rest belong to extra rows. ``kept`` by stage."""
    prunable, extra = image.clone(), job.source.vision.extra_rows
    if extra:
        slots = image[0].nonzero()[:, 0].reshape(job.source.vision.items, -1)
        tiles = job.source.vision.tiles
        if tiles is None:
            prunable[0, slots[:, -extra:].flatten()] = False
            return prunable
        before = {s.planned.name: kept[s.planned.name] for s in job.vision_stages if s.planned.name in kept}
        left = slots_left(job.source.vision, follow_kept(job.source.vision, before))
        added = torch.tensor([[tiles.order[slot] < 0 for slot in image] for image in left])
        prunable[0, slots[added]] = False
    return prunable


class _Walk:
    """Prefill through the decoder: hooks before every layer take rows out and hand on shorter tables."""

    def __init__(
        self, oracle: Oracle, row: RowRun, record: _Record, forced: Mapping[str, Tensor], prunable: Tensor, cache: Any
    ) -> None:
        self.oracle, self.row, self.record, self.forced, self.cache = oracle, row, record, forced, cache
        self.prunable = prunable
        self.block_ids: Tensor | None = None
        self.question: Tensor | None = None
        self.slots: Tensor | None = None
        """Which of the prompt's slots are left, ``[L']``; None: all."""
        self.tables: list[tuple[Tensor, ...]] = []
        """Every layer's own rotary tables so far, of all the prompt's slots."""
        stages = oracle.job.decoder_stages
        self.stages = {s.planned.site.layer: (i, s) for i, s in enumerate(stages)}
        self.segments = split_segments([s.planned for s in stages], len(oracle.layers), prunable.shape[1], 0)
        self.entered = int(prunable.sum())
        self.state = start_state(track_state(stages, 0), 1, self.entered)
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
        mask = kwargs.get("attention_mask")
        assert mask is None or self.block_ids is not None, "one unpadded row needs no mask"
        if index in self.stages:
            hidden = self._reduce(*self.stages[index], hidden)
        kwargs["position_embeddings"] = self._tables(index, hidden)
        if mask is not None and self.slots is not None:
            kwargs["attention_mask"] = mask[:, :, self.slots][:, :, :, self.slots]
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
        last = torch.tensor([hidden.shape[1] - 1])
        columns, texts = locate(self.prunable, int(self.prunable.sum()))
        raw, scale = self._raw(stage, hidden, {"last": last[:, None], "text": texts, "visual": columns})
        blocks = self.block_ids if self.block_ids is None or self.slots is None else self.block_ids[:, self.slots]
        seen = SequenceView(hidden, last, columns, texts, raw, scale, self.state, self.entered,
                            self.oracle.job.source.vision.extra_rows, blocks, self.question)  # fmt: skip
        name = stage.planned.name
        given = self.forced[name][None] if name in self.forced else None
        watch: list[Seen] = []
        reduced = reduce_sequence(stage, seen, self.prunable, track_state(stages, place + 1), given, watch)
        self.state = reduced.state
        self.oracle._note(self.row, stage, reduced.kept[0], watch)
        if stage.planned.observes:
            return hidden
        self.row.hidden[name] = reduced.hidden[0]
        self.prunable = reduced.prunable
        if self.oracle.job.plan.recipe.cache == "shrink":
            for before in self.cache.layers[: stage.planned.site.layer]:
                before.keys, before.values = (heads[:, :, reduced.rows[0]] for heads in (before.keys, before.values))
        self.slots = reduced.rows[0] if self.slots is None else self.slots[reduced.rows[0]]
        return reduced.hidden

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
        return (heads if raw.rows == "all" else take_head_rows(heads, slots[raw.rows])), scale


def _turn_back(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo a rotary embedding: rotation by the opposite angle. ``heads [B,H,S,d]``, tables ``[B,S,d]``."""
    first, second = heads.chunk(2, -1)
    return heads * cos[:, None] - torch.cat((-second, first), -1) * sin[:, None]


class _Record:
    """Rotated queries, rotated keys and values of the last call of every attention module, and its scale."""

    def __init__(self) -> None:
        self.taken: dict[nn.Module, tuple[dict[str, Tensor], float]] = {}
        self.calls: dict[nn.Module, list[tuple[dict[str, Tensor], float]]] = {}
        """All calls, of a tower that attends run by run."""


def load_recording_model(source: Source) -> nn.Module:
    """The checkpoint in fp32, with transformers' sdpa attention wrapped so that queries and keys can be seen."""
    import transformers
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.utils import logging as hf_logging

    AttentionInterface.register(RECORDING, _attend_and_record)
    AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model = getattr(transformers, source.family.auto_class).from_pretrained(
            Path(source.path), config=deepcopy(source.config), dtype=torch.float32, attn_implementation=RECORDING,
            local_files_only=True,
        )  # fmt: skip
    finally:
        if bar:
            hf_logging.enable_progress_bar()
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def _recording(model: nn.Module) -> Iterator[_Record]:
    global _active
    _active = _Record()
    try:
        yield _active
    finally:
        _active = None


_active: _Record | None = None


def _attend_and_record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _active is not None:
        scale = kw.get("scaling")
        heads = {"query": query, "key": key, "value": value}
        _active.taken[module] = heads, float(query.shape[-1] ** -0.5 if scale is None else scale)
        if not getattr(module, "is_causal", True):
            _active.calls.setdefault(module, []).append(_active.taken[module])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kw)
