"""The eager oracle: the unmodified Hugging Face model with a recipe's stages run under hooks.

Rows are run one by one at their own length: no tracing, no padding, no caches of fixed size. What a stage leaves, what
it tells later ones, segments and blocks are read a second time here (:mod:`secateur.compiler.oracle_stages`). With the
compiled graph it shares the plan (which stages, at which layers, how many tokens), the stages' own functions, and what
makes signals of a layer's projections (``passes/signals.py``, ``passes/tile_rows.py``). Each of these is held against
a reading that is not ours, or not of this code: ``tests/unit/test_shared_symbols.py`` lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compiler.families.family import VisionFacts
from secateur.compiler.image_sizes import encode_sizes
from secateur.compiler.oracle_stages import (
    State,
    Thinned,
    begin_state,
    count_in_row,
    number_blocks,
    tell_later,
    thin_rows,
)
from secateur.compiler.oracle_walk import Walk
from secateur.compiler.prompt_order import from_prompt, to_prompt
from secateur.compiler.pruned import Job
from secateur.compiler.recording import Record, load_recording_model, recording
from secateur.compiler.tile_slots import follow_kept, lay_out_rows, slots_left
from secateur.passes.check_stages import tower_layers
from secateur.passes.signals import PatchView, list_tower_raws, make_probes, patch_signals, tower_raw
from secateur.passes.stage import StageFunction
from secateur.passes.tile_rows import TileMap


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
    sizes: list[RowRun] = field(default_factory=list)
    """Where images are of several sizes, what was seen of each before the decoder."""
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    planes: list[Tensor] = field(default_factory=list)
    """Features of inner tower layers that the decoder adds (DeepStack), each ``[F,D]`` as ``features``."""
    keys: list[Tensor] = field(default_factory=list)
    """Per layer ``[Hkv,L,d]``, prompt rows and those of decode."""
    values: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """``[vocab]`` after the prompt and after each token that was decoded."""
    omits: frozenset[str] = frozenset()
    """What the run does not give though others may: names of :meth:`tensors`, or what stands before their point, and
    ``kept.<stage>``."""

    def tensors(self) -> dict[str, Tensor]:
        """Every number that can be compared: ``features``, ``hidden.<stage>``, ``key.<layer>``, ``value.<layer>``,
        ``logits.<step>``. A list without entries counts as something empty under its own name."""
        found = {"features": self.features} | {f"hidden.{stage}": rows for stage, rows in self.hidden.items()}
        for what, each in (("key", self.keys), ("value", self.values), ("logits", self.logits)):
            found |= {f"{what}.{index}": one for index, one in enumerate(each)} or {what: torch.empty(0)}
        return found


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
        self.carries = job.carries
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
        with recording(self.model) as record:
            row.features = self.encode(pixel_values, row, forced, record)
            if self.job.source.audio is not None:
                assert input_features is not None, "this geometry has sound"
                row.features = self._hear(input_features, row, record)
            ids = torch.tensor([list(input_ids)])
            image = ids == self.job.source.config.image_token_id
            # A placeholder's id may be at or beyond the embedding's size; transformers' own models mask it as well.
            hidden = self.embedding(ids.masked_fill(image, self.job.source.pad_token))
            hidden[image] = row.features
            positions, behind = self._positions(ids[0], image[0], row)
            prunable = mark_prunable(self.job, image, row.kept)
            from transformers import DynamicCache

            # Made without the configuration it forgets nothing, not even what windows have passed.
            cache: Any = DynamicCache()
            walk = Walk(self, row, record, forced, prunable, cache, positions)
            if self.job.source.vision.tiles is not None:  # counted in the whole prompt
                walk.question = torch.tensor([image.shape[1] - 1 - int(image[0].nonzero()[-1])])
            mask = None
            if self.family.image_masks is not None:
                mask = self.family.image_masks(self.decoder.config, hidden, positions[None], cache, image)
                walk.block_ids, walk.whole = number_blocks(image[0])[None], mask["full_attention"]
            with walk.hooked():
                planes: dict[str, Any] = {"visual_pos_masks": image, "deepstack_visual_embeds": row.planes}
                out = self.decoder(
                    inputs_embeds=hidden, position_ids=positions[..., None, :], past_key_values=cache, use_cache=True,
                    attention_mask=mask, **(planes if row.planes else {}),
                ).last_hidden_state  # fmt: skip
            row.logits.append(self.head(out[0, -1]).float())
            removed = [len(input_ids) - rows for rows in walk.rows_seen]
            for step in range(len(forced_tokens) + greedy):
                token = forced_tokens[step] if step < len(forced_tokens) else int(row.logits[-1].argmax())
                at = len(input_ids) + step
                step_positions = torch.tensor([[behind + step]])
                numbers = self._numbers(removed, at, behind + step)
                with self._decode_positions(removed, at), walk.windows.decoding(numbers):
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

    def encode(self, pixel_values: Tensor, row: RowRun, forced: Mapping[str, Tensor], record: Record) -> Tensor:
        """The features of a row's images ``[F,D]``, with the stages of the vision side run under hooks."""
        facts, stages = self.job.source.vision, self.job.vision_stages
        if facts.sizes:
            return encode_sizes(self, pixel_values, row, forced, record)
        state = begin_state(stages[0].planned.groups, stages[0].planned.length_in) if stages else {}
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
            if name in forced:
                chosen = from_prompt(self.job, index, forced[name])
                given = chosen.reshape(stage.planned.groups, left)
                given = given - torch.arange(stage.planned.groups)[:, None] * stage.planned.length_in
            thin = self._thin(row, stage, tokens, facts, self.tower, self.family.vision_attention, state, extra, record,
                              given)  # fmt: skip
            state.update(thin.state)
            if not stage.planned.observes:
                row.kept[name] = to_prompt(self.job, index, count_in_row(thin.map.keep, stage.planned.length_in))
                planes[:] = [thin_rows(plane, thin.map) for plane in planes]
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
        if self.carries:
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
        rows: Tensor = features.reshape(-1, features.shape[-1])
        return rows

    def _hear(self, input_features: Tensor, row: RowRun, record: Record) -> Tensor:
        """What is seen and heard ``[F,D]`` in the prompt's order, with the stages behind the audio tower run."""
        job, tower, facts = self.job, self.family.audio, self.job.source.audio
        assert tower is not None
        assert facts is not None
        record.calls.clear()
        heard = tower.reference(self.model, input_features, facts)
        layers = list(self.model.get_submodule(tower.tower.layers).children())
        state: dict[str, Tensor] = {}
        for stage in job.audio_stages:
            state = state or begin_state(stage.planned.groups, stage.planned.length_in)
            thin = self._thin(row, stage, heard, facts, layers, tower.tower.attention, state, {}, record, None)
            state.update(thin.state)
        order = torch.tensor(job.media_order)
        if job.carries and self.carried is not None:
            self.carried = torch.cat([self.carried, state["carried"].reshape(1, -1)], 1)[:, order]
        tokens = heard.reshape(-1, heard.shape[-1])
        row.planes = [torch.cat([plane, torch.zeros_like(tokens)])[order] for plane in row.planes]
        return torch.cat([row.features, tokens])[order]

    def _thin(
        self, row: RowRun, stage: StageFunction, tokens: Tensor, facts: VisionFacts, tower: Sequence[Any],
        attention: str, state: State, extra: Mapping[str, Tensor], record: Record, given: Tensor | None,
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
        whole = facts.resizes_picture
        tiles = None if len(tokens) == stage.planned.groups and not whole else TileMap.of(facts)
        seen = PatchView(tokens, raw, scale, facts.has_cls, state, extra, facts.grid, facts.merge,
                         facts.patch_order, None if tiles is None else tiles.join, whole)  # fmt: skip
        signals = patch_signals(stage, seen, layers)
        self.note(row, stage, signals)
        chosen, carry = stage.run(signals, given)
        left = tokens if stage.planned.observes else thin_rows(seen.rows, chosen)
        return Thinned(left, chosen, tell_later(state, carry, chosen))

    def note(self, row: RowRun, stage: StageFunction, signals: dict[str, Tensor]) -> None:
        """Write down what entered a stage, and its scores."""
        if stage.bound.score is not None:
            row.score[stage.planned.name] = stage.score(signals)
        if self.keep_signals:
            row.signals[stage.planned.name] = signals

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

    def _numbers(self, removed: Sequence[int], slot: int, position: int) -> list[int]:
        """What a new token is numbered in every layer, of which each did not see so many rows of the prompt."""
        fresh = self.job.plan.recipe.positions == "compact"
        return [slot - count if fresh and count else position for count in removed]

    @contextmanager
    def _decode_positions(self, removed: Sequence[int], slot: int) -> Iterator[None]:
        """Under fresh numbering a new token stands, in a pruned segment, at its slot there."""
        if self.job.plan.recipe.positions == "original":
            yield
            return

        def renumber(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if count := removed[self.layers.index(module)]:
                position = torch.tensor([[slot - count]])
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
