"""The eager oracle: the unmodified Hugging Face model with a recipe's stages run under hooks.

It shares the stage functions with the compiled graph and nothing else: no tracing, no passes, no padding, no
caches of fixed size. Rows are run one by one at their own length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compiler.pruned import Job
from secateur.compiler.trace import Source
from secateur.passes.insert_decoder_stages import split_segments
from secateur.passes.sites import collect_vision_signals, reduce_features, reduce_sequence
from secateur.passes.stage import StageFunction

RECORDING = "secateur_recording"


@dataclass
class RowRun:
    """What the oracle saw for one row. Tensors are on the CPU, without a batch dimension."""

    kept: dict[str, Tensor] = field(default_factory=dict)
    """Stage -> indices into the tokens that entered it, ``[K]``."""
    score: dict[str, Tensor] = field(default_factory=dict)
    """Stage -> score per entering token ``[N]``, where the recipe has one; float32."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Stage -> prunable rows that entered it ``[N,D]``, where the stage reads them."""
    hidden: dict[str, Tensor] = field(default_factory=dict)
    """Decoder stage -> rows it left ``[L',D]``."""
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: list[Tensor] = field(default_factory=list)
    """Per layer ``[Hkv,L,d]``, prompt rows and those of decode."""
    values: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """``[vocab]`` after the prompt and after each forced token."""


class Oracle:
    """Runs rows of a job's recipe on a Hugging Face model in fp32."""

    def __init__(self, job: Job, model: nn.Module | None = None) -> None:
        self.job = job
        self.model = load_recording_model(job.source) if model is None else model
        family = job.source.family
        self.decoder: Any = self.model.get_submodule(family.decoder)
        self.layers = list(self.model.get_submodule(family.decoder_layers).children())
        self.tower = list(self.model.get_submodule(family.vision_layers).children())
        self.head = self.model.get_submodule(family.head)
        self.embedding = self.model.get_submodule(family.embedding)
        self.projector = self.model.get_submodule(family.projector)

    @torch.no_grad()
    def run(
        self,
        input_ids: Sequence[int],
        pixel_values: Tensor,
        forced_tokens: Sequence[int] = (),
        forced_kept: Mapping[str, Tensor] | None = None,
    ) -> RowRun:
        """One row. ``input_ids`` as prefill receives it (P placeholders per image, no padding); pixels ``[n,3,H,W]``.

        ``forced_tokens`` are decoded one after the other; ``forced_kept`` replaces the choice of
        stages, ``[groups*K]`` each.
        """
        row = RowRun()
        forced = forced_kept or {}
        with _recording(self.model) as record:
            row.features = self._encode(pixel_values, row, forced, record)
            ids = torch.tensor([list(input_ids)])
            prunable = ids == self.job.source.config.image_token_id
            hidden = self.embedding(ids)
            hidden[prunable] = row.features
            positions = self._positions(prunable[0], row)[None]
            from transformers import DynamicCache

            cache: Any = DynamicCache(config=self.decoder.config)
            walk = _Walk(self, row, record, forced, prunable)
            with walk.hooked():
                out = self.decoder(
                    inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=True
                ).last_hidden_state
            row.logits.append(self.head(out[0, -1]).float())
            removed = {s.first_layer: s.removed for s in walk.segments}
            for step, token in enumerate(forced_tokens):
                at = len(input_ids) + step
                step_positions = torch.tensor([[at + self.job.position_offset]])
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
        facts = self.job.source.vision

        def reduce(stage: StageFunction, tokens: Tensor) -> Tensor:
            tower: Any = self.tower[facts.feature_layer]
            taps = {s: record.taken[tower.self_attn] for s in stage.signals if s != "tokens"}
            name, left = stage.planned.name, stage.planned.length_out
            given = None
            if name in forced:
                offset = torch.arange(tokens.shape[0])[:, None] * stage.planned.length_in
                given = forced[name].reshape(tokens.shape[0], left) - offset
            reduced, keep = reduce_features(stage, tokens, taps, given)
            offset = torch.arange(tokens.shape[0])[:, None] * stage.planned.length_in
            row.kept[name] = (keep + offset).flatten()
            row.tokens[name] = tokens.float()
            if stage.bound.score is not None:
                row.score[name] = stage.score(collect_vision_signals(stage, tokens, taps))
            return reduced

        with ExitStack() as stack:
            for stage in self.job.vision_stages:
                if stage.planned.site.kind == "vision.out":
                    hook = self.projector.register_forward_pre_hook(
                        lambda module, args, stage=stage: (reduce(stage, args[0]), *args[1:])
                    )
                else:
                    hook = self.projector.register_forward_hook(
                        lambda module, args, output, stage=stage: reduce(stage, output)
                    )
                stack.callback(hook.remove)
            features, _ = self.job.source.family.vision_forward(self.model, pixel_values)
        return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]

    def _positions(self, prunable: Tensor, row: RowRun) -> Tensor:
        """Position ids of a row's slots, counted one by one."""
        if not self.job.original_positions:
            return torch.arange(len(prunable))
        per_image, whole = self.job.kept_per_image, self.job.source.vision.tokens_per_image
        kept = torch.arange(whole * self.job.geometry.images)
        for stage in self.job.vision_stages:
            kept = kept[row.kept[stage.planned.name]]
        text, seen, positions = 0, 0, []
        for flag in prunable.tolist():
            if flag:
                positions.append(text + int(kept[seen]))
                seen += 1
            else:
                positions.append(text + seen // per_image * whole)
                text += 1
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
                kwargs["position_embeddings"] = self.decoder.rotary_emb(args[0], position)
            return args, kwargs

        hooks = [layer.register_forward_pre_hook(renumber, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Walk:
    """Prefill through the decoder: hooks before every layer take rows out and hand on shorter tables."""

    def __init__(
        self, oracle: Oracle, row: RowRun, record: _Record, forced: Mapping[str, Tensor], prunable: Tensor
    ) -> None:
        self.oracle, self.row, self.record, self.forced = oracle, row, record, forced
        self.prunable = prunable
        self.tables: tuple[Tensor, ...] | None = None
        self.stages = {s.planned.site.layer: s for s in oracle.job.decoder_stages}
        planned = [s.planned for s in oracle.job.decoder_stages]
        self.segments = split_segments(planned, len(oracle.layers), prunable.shape[1], 0)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        hooks = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.oracle.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, index = args[0], self.oracle.layers.index(module)
        tables = kwargs["position_embeddings"] if self.tables is None else self.tables
        assert kwargs.get("attention_mask") is None, "one unpadded row needs no mask"
        stage = self.stages.get(index)
        if stage is not None:
            hidden, tables = self._reduce(stage, index, hidden, tables)
        self.tables = tables
        kwargs["position_embeddings"] = tables
        return (hidden, *args[1:]), kwargs

    def _reduce(
        self, stage: StageFunction, index: int, hidden: Tensor, tables: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        last = torch.tensor([hidden.shape[1] - 1])
        taps = {}
        for name in (s for s in stage.signals if s != "tokens"):
            source = stage.signal_options[name]["projections"]
            layer: Any = self.oracle.layers[index if source == "next" else index - 1]
            if source != "previous":
                # Run the layer's own attention on these rows for its projections; the output is dropped.
                layer.self_attn(
                    hidden_states=layer.input_layernorm(hidden), position_embeddings=tables, attention_mask=None
                )
            query, key, scale = self.record.taken[layer.self_attn]
            taps[name] = query[:, :, -1:], key, scale
        name = stage.planned.name
        given = self.forced[name][None] if name in self.forced else None
        scored: list[Tensor] = []
        reduced = reduce_sequence(stage, hidden, self.prunable, last, taps, given, scored)
        self.row.kept[name], self.row.hidden[name] = reduced.kept[0], reduced.hidden[0]
        if scored:
            self.row.score[name] = scored[0]
        self.row.tokens[name] = hidden[self.prunable].float()[None]
        self.prunable = reduced.prunable
        if self.oracle.job.plan.recipe.positions == "compact":
            count = torch.arange(reduced.hidden.shape[1])[None]
            return reduced.hidden, self.oracle.decoder.rotary_emb(reduced.hidden, count)
        return reduced.hidden, tuple(t[:, reduced.rows[0]] for t in tables)


class _Record:
    """Rotated queries and keys of the last call of every attention module."""

    def __init__(self) -> None:
        self.taken: dict[nn.Module, tuple[Tensor, Tensor, float]] = {}


def load_recording_model(source: Source) -> nn.Module:
    """The checkpoint in fp32, with transformers' sdpa attention wrapped so that queries and keys can be seen."""
    from transformers import AttentionInterface, AutoModelForImageTextToText
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.utils import logging as hf_logging

    AttentionInterface.register(RECORDING, _attend_and_record)
    AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            Path(source.path), dtype=torch.float32, attn_implementation=RECORDING, local_files_only=True
        )
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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _active is not None:
        scale = kw.get("scaling")
        _active.taken[module] = query, key, float(query.shape[-1] ** -0.5 if scale is None else scale)
    return sdpa_attention_forward(module, query, key, value, mask, **kw)
