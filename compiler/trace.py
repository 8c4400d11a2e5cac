"""From a Hugging Face directory to graphs: the model is built on the ``meta`` device and exported.

Tracing needs the configuration only. Attention becomes one ``secateur::attention`` node per layer through
transformers' own attention interface; no model code is copied.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compiler.attention import TowerIndices
from secateur.compiler.deepstack import as_input, plane_outputs
from secateur.compiler.families import find_family
from secateur.compiler.families.family import Family, Forward, VisionFacts
from secateur.compiler.function import first_line, trace_function
from secateur.compiler.geometry import Geometry
from secateur.compiler.media import MediaLayout
from secateur.compiler.meta_model import DTYPES, build_meta_model, compute_buffers
from secateur.compiler.order import order_entry
from secateur.compiler.own_code import check_own_code
from secateur.compiler.program import Program, ProgramSet
from secateur.compiler.rope import check_rope, follow_length, steady_rope
from secateur.runtime.errors import UserError

_log = logging.getLogger(__name__)
_MODEL_FIX = "this is transformers' own code: check that transformers runs a model with this config.json"
_TRACE_LENGTH = 19  # any length works: the dimension is symbolic; an odd one meets no other size by chance


@dataclass(frozen=True)
class Source:
    """A model directory that passed the checks: its configuration, the family it belongs to, and what follows from
    both for a geometry."""

    path: Path
    config: Any
    family: Family
    vision: VisionFacts
    audio: VisionFacts | None = None
    media: MediaLayout | None = None

    def at(self, geometry: Geometry) -> Source:
        """The same model for another geometry. Raises UserError for one that the family does not support."""
        config, family = self.config, self.family
        vision = family.read_vision(config, geometry)
        audio = family.audio.read(config, geometry) if family.audio is not None and geometry.audio_seconds else None
        media = family.read_media(config, geometry, vision, audio) if family.read_media is not None else None
        return replace(self, vision=vision, audio=audio, media=media)

    @property
    def audio_tokens(self) -> int:
        """Tokens of a row's sound."""
        return self.audio.tokens_per_row if self.audio is not None else 0

    def media_tokens(self, kind: str) -> tuple[int, int]:
        """Ids that transformers marks with, in an item of ``kind``, what is seen and what is heard."""
        seen = self.config.image_token_id if kind == "image" else self.config.video_token_id
        return int(seen), int(getattr(self.config, "audio_token_id", seen))

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


def read_source(path: Path, geometry: Geometry | None = None) -> Source:
    """Check a model directory and read its configuration; facts are those for ``geometry``, or the usual one.

    Raises UserError for a directory without ``config.json``, an unknown model type (lists the supported ones),
    quantised checkpoints, adapters, and models whose code comes with the checkpoint.
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
    check_own_code(path, raw)
    family = find_family(raw.get("model_type"), str(config_file))
    _check_transformers(family)
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"checkpoint is quantised ({method})", where=str(config_file), fix="use the unquantised checkpoint"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Its validators raise exceptions of no common class; the cause's first line says what they found.
        reason = first_line(error.__cause__ or error)
        raise UserError(f"transformers cannot read it ({reason})", where=str(config_file)) from None
    if hasattr(config, family.inner_config):
        config = getattr(config, family.inner_config)
        config.name_or_path = str(path)
    for each in (config, config.text_config, config.vision_config):
        vars(each).pop("auto_map", None)  # So that nothing which is made of it later looks for that code.
    for part, known in (("text_config", family.decoder_types), ("vision_config", family.vision_types)):
        kind = getattr(config, part).model_type
        if kind not in known:
            raise UserError(f"{part}.model_type {kind!r} is unknown", where=str(config_file), available=known)
    check_rope(config.text_config, str(config_file))
    geometry = geometry or Geometry()
    return Source(path, config, family, family.read_vision(config, geometry)).at(geometry)


def _check_transformers(family: Family) -> None:
    """Raises UserError where the installed transformers lacks what the family cannot be compiled without."""
    import transformers
    from packaging.version import Version

    first, _ = family.tested_transformers
    if family.lacking_before and Version(transformers.__version__) < Version(first):
        raise UserError(
            f"transformers {transformers.__version__} is installed, which lacks what family {family.name} needs: "
            f"{family.lacking_before}",
            where="transformers", fix=f"pip install -U 'transformers>={first}'",
        )  # fmt: skip
    _warn_untested(family.name, family.tested_transformers)


@cache
def _warn_untested(family: str, tested: tuple[str, str]) -> None:
    """Say once per family that the installed transformers is not among the versions it was tested with."""
    import transformers
    from packaging.version import Version

    installed = Version(transformers.__version__)
    if not Version(tested[0]) <= installed < Version(tested[1]):
        _log.warning(
            "transformers %s is installed, but family %s was tested with %s to below %s; hold a bundle against "
            "transformers itself with: secateur verify", installed, family, *tested,
        )  # fmt: skip


def trace_model(source: Source, geometry: Geometry, dtype: str = "fp32") -> Traced:
    """Trace the programs ``vision``, ``decoder``, ``embedding`` and ``head`` for a geometry's batch.

    ``vision``: ``pixel_values [B*n,3,H,W]`` -> ``features [B*n,N,D]``, ``tower``. ``decoder``: ``hidden [B,s,D]``,
    ``position_ids [B,s]``, or ``[3,B,s]`` where they have several axes, and, where tokens of one image attend to each
    other, ``block_ids [B,s]`` -> normed ``hidden``. ``embedding``: ids ``[B,s]`` -> ``[B,s,D]``. ``head``: ``[B,D]`` ->
    float32 logits. Features of inner tower layers leave ``vision`` as ``deepstack.<i>`` and enter ``decoder`` as
    ``deepstack_<i> [B,s,D]``. A family with rows behind each image also has ``extra_rows``: -> ``[E,D]``; a geometry
    with sound ``audio``: ``input_features`` -> ``features``, ``tower``. Images of several sizes have programs of their
    own instead of ``vision``: ``vision_0``, ``vision_1``, ...
    """
    source = source.at(geometry)
    model = build_meta_model(source, dtype)
    batch, facts = geometry.batch, source.vision
    length = torch.export.Dim("s", min=2, max=1 << 24)
    kind, meta = DTYPES[dtype], torch.device("meta")
    hidden = torch.empty(batch, _TRACE_LENGTH, source.text.hidden_size, dtype=kind, device=meta)
    ids = torch.zeros(batch, _TRACE_LENGTH, dtype=torch.int64, device=meta)
    family = source.family
    decoder, head = model.get_submodule(family.decoder), model.get_submodule(family.head)
    steady_rope(decoder, follow_length(source, geometry))
    embedding = model.get_submodule(family.embedding)

    # The exporter reads the length off the last input: not off those that decode goes without.
    blocks = {"block_ids": ids.clone()} if family.image_masks else {}
    axes = ids if source.media is None else ids.expand(3, *ids.shape).contiguous()
    planes = {as_input(name): torch.empty_like(hidden) for name in plane_outputs(facts.deepstack)}
    entering = {"hidden": hidden, **planes, **blocks, "position_ids": axes}

    def run_decoder(hidden: Tensor, *rest: Tensor) -> Tensor:
        # What its forward does not know it hands on to every layer's attention.
        given: dict[str, Any] = dict(zip((*blocks, "position_ids"), rest[len(planes) :], strict=True))
        if planes:
            given["deepstack_visual_embeds"] = list(rest[: len(planes)])
        out: Tensor = decoder(inputs_embeds=hidden, use_cache=False, **given).last_hidden_state
        return out

    constants = compute_buffers(model)

    def own(*paths: str) -> dict[str, nn.Module]:
        return {path: model.get_submodule(path) for path in paths}

    def trace_tower(
        name: str, facts: VisionFacts, forward: Forward, modules: tuple[str, ...], indices: Mapping[str, Any]
    ) -> Program:
        outputs = ("features", "tower", *plane_outputs(facts.deepstack))
        entering = torch.empty(facts.input_of(batch), dtype=kind, device=meta)
        held = TowerIndices(name, indices)
        return trace_function(
            name, lambda rows: forward(model, rows, facts, held.read()), {facts.input_name: entering},
            outputs, {**own(*modules), held.path: held}, None, constants | held.values, _MODEL_FIX,
        )  # fmt: skip

    def trace_vision(name: str, facts: VisionFacts) -> Program:
        made = family.vision_indices(source.config, facts, batch) if family.vision_indices is not None else {}
        return trace_tower(name, facts, family.vision_forward, family.vision_modules, made)

    towers = [trace_vision(*each) for each in zip(vision_programs(facts), facts.sizes or (facts,), strict=True)]
    programs = [
        trace_function(
            "decoder", run_decoder, entering, ("hidden",), own(family.decoder),
            {name: {value.dim() - 1 if name == "position_ids" else 1: length} for name, value in entering.items()},
            constants, _MODEL_FIX,
        ),
        trace_function(
            "embedding", lambda ids: embedding(ids), {"ids": ids}, ("hidden",), own(family.embedding),
            {"ids": {1: length}}, constants, _MODEL_FIX,
        ),
        trace_function(
            "head", lambda row: head(row).float(), {"row": hidden[:, 0].contiguous()}, ("logits",), own(family.head)
        ),
    ]  # fmt: skip
    if len(set(getattr(source.text, "layer_types", None) or ())) > 1:
        programs[0] = order_entry(programs[0], family.decoder_layers)
    if family.extra_rows:
        programs.append(_trace_parameter("extra_rows", model, family.extra_rows))
    if source.audio is not None and family.audio is not None:
        indices = family.audio.indices(source.config, source.audio, batch)
        programs.append(trace_tower("audio", source.audio, family.audio.forward, family.audio.modules, indices))
    return Traced(source, geometry, dtype, model, ProgramSet({p.name: p for p in (*towers, *programs)}))


def vision_programs(facts: VisionFacts) -> list[str]:
    """Names of the programs that encode what is seen, before they are joined: one for each size of images."""
    return [f"vision_{place}" for place in range(len(facts.sizes))] or ["vision"]


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
