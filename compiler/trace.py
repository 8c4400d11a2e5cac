"""From a Hugging Face directory to graphs: the model is built on the ``meta`` device and exported.

Tracing needs the configuration only. Attention becomes one ``secateur::attention`` node per layer through
transformers' own attention interface; no model code is copied.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compiler import ops
from secateur.compiler.families import find_family
from secateur.compiler.families.family import Family, VisionFacts
from secateur.compiler.function import first_line, trace_function
from secateur.compiler.geometry import Geometry
from secateur.compiler.order import order_entry
from secateur.compiler.program import Program, ProgramSet
from secateur.runtime.errors import UserError

ATTENTION = "secateur"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TRACE_LENGTH = 19  # any length works: the dimension is symbolic; an odd one meets no other size by chance


@dataclass(frozen=True)
class Source:
    """A model directory that passed the checks: its configuration and the family it belongs to."""

    path: Path
    config: Any
    family: Family
    vision: VisionFacts

    @property
    def text(self) -> Any:
        return self.config.text_config

    @property
    def pad_token(self) -> int:
        """Id that fills the text bucket; nothing ever attends to it."""
        # Some configurations leave the whole's at a default that the decoder's vocabulary does not have.
        for holder in (self.config, self.text):
            if isinstance(pad := getattr(holder, "pad_token_id", None), int) and 0 <= pad < self.text.vocab_size:
                return pad
        return 0

    @property
    def decoder_layers(self) -> int:
        return int(self.text.num_hidden_layers)


@dataclass(frozen=True, eq=False)
class Traced:
    """The traced model: ``vision`` at its static shape, ``decoder`` with a symbolic length ``s``."""

    source: Source
    geometry: Geometry
    dtype: str
    model: nn.Module
    programs: ProgramSet

    def __str__(self) -> str:
        return f"traced {self.source.config.model_type} dtype {self.dtype} {self.geometry}\n\n{self.programs}"


def read_source(path: Path) -> Source:
    """Check a model directory and read its configuration.

    Raises UserError for a directory without ``config.json``, an unknown model type (lists the supported ones),
    quantised checkpoints, adapters, and models that need ``trust_remote_code``.
    """
    config_file = path / "config.json"
    if not path.is_dir():
        raise UserError("no such directory", where=str(path), fix="give the directory of a Hugging Face model")
    if (path / "adapter_config.json").exists():
        raise UserError(
            "this is an adapter, not a model", where=str(path), fix="merge it into its base model and save that"
        )
    if not config_file.is_file():
        raise UserError("no config.json", where=str(path), fix="give the directory of a Hugging Face model")
    try:
        raw = json.loads(config_file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON ({error})", where=str(config_file), fix="download the file again") from None
    if not isinstance(raw, dict):
        raise UserError("not a JSON object", where=str(config_file), fix="download the file again")
    family = find_family(raw.get("model_type"), str(config_file))
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"checkpoint is quantised ({method})", where=str(config_file), fix="use the unquantised checkpoint"
        )
    if raw.get("auto_map"):
        raise UserError(
            "model needs trust_remote_code", where=str(config_file), fix="use the version that transformers ships"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        # Its validators raise exceptions of no common class; the cause's first line says what they found.
        reason = first_line(error.__cause__ or error)
        raise UserError(f"transformers cannot read it ({reason})", where=str(config_file)) from None
    for part, known in (("text_config", family.decoder_types), ("vision_config", family.vision_types)):
        kind = getattr(config, part).model_type
        if kind not in known:
            raise UserError(f"{part}.model_type {kind!r} is unknown", where=str(config_file), available=known)
    return Source(path, config, family, family.read_vision(config))


def trace_model(source: Source, geometry: Geometry, dtype: str = "fp32") -> Traced:
    """Trace the programs ``vision``, ``decoder``, ``embedding`` and ``head`` for a geometry's batch.

    ``vision``: ``pixel_values [B*n,3,H,W]`` -> ``features [B*n,N,D]``, ``tower``. ``decoder``: ``hidden [B,s,D]``,
    ``position_ids [B,s]`` and, where tokens of one image attend to each other, ``block_ids [B,s]`` -> normed
    ``hidden``. ``embedding``: ids ``[B,s]`` -> ``[B,s,D]``. ``head``: ``[B,D]`` -> float32 logits. A family with rows
    behind each image also has ``extra_rows``: -> ``[E,D]``.
    """
    model = build_meta_model(source, dtype)
    batch, facts = geometry.batch, source.vision
    length = torch.export.Dim("s", min=2, max=1 << 24)
    kind, meta = DTYPES[dtype], torch.device("meta")
    hidden = torch.empty(batch, _TRACE_LENGTH, source.text.hidden_size, dtype=kind, device=meta)
    ids = torch.zeros(batch, _TRACE_LENGTH, dtype=torch.int64, device=meta)
    pixels = torch.empty(batch * geometry.images, facts.channels, *facts.image_size, dtype=kind, device=meta)
    family = source.family
    decoder, head = model.get_submodule(family.decoder), model.get_submodule(family.head)
    embedding = model.get_submodule(family.embedding)

    # The exporter reads the length off the last input: not off the one that decode goes without.
    blocks = {"block_ids": ids.clone()} if family.image_masks else {}
    entering = {"hidden": hidden, **blocks, "position_ids": ids}

    def run_decoder(hidden: Tensor, *rest: Tensor) -> Tensor:
        # What its forward does not know it hands on to every layer's attention.
        given = dict(zip((*blocks, "position_ids"), rest, strict=True))
        out = decoder(inputs_embeds=hidden, use_cache=False, **given).last_hidden_state
        return out  # type: ignore[no-any-return]

    constants = compute_buffers(model)

    def own(*paths: str) -> dict[str, nn.Module]:
        return {path: model.get_submodule(path) for path in paths}

    programs = [
        trace_function(
            "vision", lambda pixel_values: family.vision_forward(model, pixel_values),
            {"pixel_values": pixels}, ("features", "tower"), own(*family.vision_modules), None, constants,
        ),
        trace_function(
            "decoder", run_decoder, entering, ("hidden",), own(family.decoder),
            {name: {1: length} for name in entering}, constants,
        ),
        trace_function(
            "embedding", lambda ids: embedding(ids), {"ids": ids}, ("hidden",), own(family.embedding),
            {"ids": {1: length}}, constants,
        ),
        trace_function(
            "head", lambda row: head(row).float(), {"row": hidden[:, 0].contiguous()}, ("logits",), own(family.head)
        ),
    ]  # fmt: skip
    if len(set(getattr(source.text, "layer_types", None) or ())) > 1:
        programs[1] = order_entry(programs[1], family.decoder_layers)
    if family.extra_rows:
        programs.append(_trace_parameter("extra_rows", model, family.extra_rows))
    return Traced(source, geometry, dtype, model, ProgramSet({p.name: p for p in programs}))


def _trace_parameter(name: str, model: nn.Module, path: str) -> Program:
    """A program without inputs that returns a parameter ``[D]`` or ``[E,D]`` as rows ``[E,D]``."""
    parent, _, leaf = path.rpartition(".")
    # The exporter takes over every parameter of a module it owns: give it one that has this parameter alone.
    owner = nn.Module()
    owner.register_parameter(leaf, model.get_parameter(path))

    def read() -> Tensor:
        rows: Tensor = getattr(owner, leaf)
        return rows.reshape(-1, rows.shape[-1])

    return trace_function(name, read, {}, ("rows",), {parent: owner})


def build_meta_model(source: Source, dtype: str) -> nn.Module:
    """The Hugging Face model without weights: parameters on ``meta``, computed buffers real on the CPU."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as hf_logging

    register_attention()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                source.config, attn_implementation=ATTENTION, dtype=DTYPES[dtype]
            ).eval()
    finally:
        hf_logging.set_verbosity(verbosity)
    return model  # type: ignore[no-any-return]


def register_attention() -> None:
    """Make ``attn_implementation="secateur"`` known to transformers: one custom-op node, no mask arithmetic."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention_function)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def _attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
    out = ops.attention(
        query, key, value,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        kwargs.get("sliding_window"), kwargs.get("softcap"),
        *((None, blocks) if (blocks := kwargs.get("block_ids")) is not None else ()),
    )  # fmt: skip
    return out.transpose(1, 2), None


def compute_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no checkpoint holds (rotary frequencies, position indices), by name, on the CPU.

    They are made by building their module once more, outside the ``meta`` device.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if module._non_persistent_buffers_set:
            twin = type(module)(module.config) if hasattr(module, "config") else _fill_buffers(model, module)
            found.update({f"{path}.{n}": getattr(twin, n).detach() for n in module._non_persistent_buffers_set})
    return found


def _fill_buffers(model: Any, module: nn.Module) -> nn.Module:
    """A copy of a module that cannot be built from a configuration alone, its computed buffers filled by the model's
    own initialisation; parameters stay on ``meta``."""
    twin = copy.copy(module)
    twin._buffers = {n: torch.empty_like(b, device="cpu") for n, b in module._buffers.items() if b is not None}
    model._init_weights(twin)
    return twin
