"""Put a bundle together: graphs, weights, processor files, engines, and last the manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import secateur
from secateur.compiler.calibration import digests_of, digests_of_weights
from secateur.compiler.engine_facts import KINDS, describe_engines, list_outside
from secateur.compiler.flops import count_flops
from secateur.compiler.generation_defaults import check_generation_defaults
from secateur.compiler.model_facts import describe_model, named_texts, token_text
from secateur.compiler.processor_files import open_processor, take_processor_files
from secateur.compiler.program import ProgramSet
from secateur.compiler.pruned import Job, Pruned
from secateur.compiler.requirements import describe_requires
from secateur.exporters.dialects import UNROLLED
from secateur.exporters.engine_options import EngineOptions
from secateur.exporters.onnx import Exported, port_name
from secateur.exporters.tensorrt import EngineInfo, load_library
from secateur.passes.check_function import digest_plan
from secateur.runtime import manifest as m
from secateur.runtime.errors import UserError
from secateur.runtime.probe import probe_pixels
from secateur.runtime.processing import Processor
from secateur.runtime.text_facts import describe_preprocessing, describe_prompt, describe_tokenizer

_TOOLS = ("torch", "transformers", "onnx-ir")


@dataclass(frozen=True)
class Target:
    """What a bundle is built for. ``provider`` is the ONNX Runtime provider that runs it, None if none does.

    ``sms`` are all GPU architectures its engines run on, ``sm`` the first of them; ``engines`` says how to build them.
    ``unrolled``: its graphs have no Loop, Scan or If.
    """

    name: str
    dtype: str
    sm: int | None
    sms: tuple[int, ...] = ()
    engines: EngineOptions | None = None
    unrolled: bool = False

    @property
    def dialect(self) -> str:
        if self.unrolled:
            return UNROLLED
        return "tensorrt" if self.name.startswith("tensorrt") else self.name

    @property
    def provider(self) -> str | None:
        if self.name == "onnxruntime-cuda":
            return "CUDAExecutionProvider"
        if self.name.startswith("tensorrt") or self.dtype != "fp32":
            return None
        return "CPUExecutionProvider"


def check_processor_files(job: Job) -> None:
    """Refuse processor files no bundle could be opened with, by opening them as the runtime will.

    Errors name the model's files.
    """
    # What a manifest says of processing is known before anything is traced.
    manifest = m.Manifest.model_construct(
        model=describe_model(job, weights_sha256="0" * 64), geometry=_geometry(job), media=_media(job)
    )
    _check_marks(job, manifest)
    processor = open_processor(job.source.path, manifest)
    if (least := processor.media_words) >= job.geometry.text_tokens:
        raise UserError(
            f"the texts and marks that stand between the media of a row take {least} text tokens already",
            where="--text-tokens", fix="give more, for the question and the chat template as well",
        )  # fmt: skip


def _check_marks(job: Job, manifest: m.Manifest) -> None:
    """Refuse tokens around media that no prompt could have: they are embedded, unlike the placeholders between them."""
    model, size = manifest.model, manifest.model.vocab_size
    rows = [manifest.geometry.place(model.image_token_id, model.image_before, model.image_behind)]
    if (media := manifest.media) is not None:
        rows = [list(side) for sides in media.around.values() for side in sides]
        rows += [list(media.sound_before), list(media.sound_behind)]
    if beyond := sorted({token for row in rows for token in row if token >= size and token != model.image_token_id}):
        raise UserError(
            f"token {beyond[0]}, which stands beside media in every prompt, has no row among the {size} of the "
            "embedding",
            where=f"{job.source.path / 'config.json'}: text_config.vocab_size",
            fix="use the tokenizer and the config.json of these weights; transformers cannot run them either",
        )  # fmt: skip


def list_generation_notes(job: Job) -> list[str]:
    """What of the checkpoint's generation defaults a bundle does not apply."""
    return check_generation_defaults(job.source.path, job.source.text.vocab_size)


def copy_processor_files(job: Job, work: Path) -> None:
    """Tokenizer, chat template, image processor and generation defaults travel with the bundle."""
    check_processor_files(job)
    take_processor_files(job.source.path).write(work)


def graph_file(program: str, variant: int) -> str:
    """The file of a program's graph; those of the first geometry bear the program's name alone."""
    return f"{program}.{variant}.onnx" if variant else f"{program}.onnx"


def check_distinct(jobs: Sequence[Job]) -> None:
    """Refuse geometries of which two come to the same shapes."""
    seen: list[tuple[m.GeometrySizes, m.Media | None]] = []
    for number, job in enumerate(jobs):
        sizes = (_geometry(job), _media(job))
        if sizes in seen:
            raise UserError(
                f"geometry {number} is geometry {seen.index(sizes)} again: {outline(job).words}", where="--geometry",
                fix="leave one of them out",
            )  # fmt: skip
        seen.append(sizes)


@dataclass(frozen=True)
class Part:
    """One geometry of a bundle in the making: its programs, the graph files they went to, and their FLOPs before."""

    pruned: Pruned
    graphs: Mapping[str, str]
    unpruned: Mapping[str, int]
    forecast: m.Forecast | None = None


def make_manifest(
    parts: Sequence[Part],
    exported: Exported,
    target: Target,
    work: Path,
    weights: Mapping[str, str],
    engines: Mapping[str, EngineInfo],
    outside: Mapping[str, Sequence[str]],
) -> m.Manifest:
    """The manifest of everything that lies in ``work``; ``weights`` are the paths and digests of the files that hold
    them, made while they were put there, ``engines`` those made of graph files, ``outside`` the weights that are given
    to what runs a graph file."""
    first, *others = parts
    job = first.pruned.job
    paths = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file())
    files = {path: m.file_entry(work / path, weights.get(path)) for path in paths}
    versions = {"secateur": secateur.__version__, **{t: importlib.metadata.version(t) for t in _TOOLS}}
    if target.name.startswith("tensorrt"):
        versions[target.name] = load_library(target.name).version
    processor = Processor(work, outline(job))
    return m.Manifest(
        secateur=secateur.__version__,
        model=describe_model(job, _digest_weights(weights)),
        target=target.name,  # type: ignore[arg-type]  # pydantic checks
        dialect=exported.dialect,
        dtype=target.dtype,  # type: ignore[arg-type]  # pydantic checks
        opset=exported.opset,
        provider=target.provider,
        sm=target.sm,
        versions=versions,
        weights=sorted(weights),
        files=files,
        variants=[m.Variant(**_of_geometry(part, work, processor, engines, outside)) for part in others],
        engines=describe_engines(target.engines or EngineOptions(), target.sms) if engines else None,
        tensors=list_outside(exported.layout, {name for names in outside.values() for name in names}),
        tokenizer=describe_tokenizer(processor.prompts),
        prompt=describe_prompt(processor.prompts),
        requires=describe_requires(target.name, exported, target.provider, versions, target.engines, target.sms),
        **_of_geometry(first, work, processor, engines, outside),
    )


def _of_geometry(
    part: Part,
    work: Path,
    processor: Processor,
    engines: Mapping[str, EngineInfo],
    outside: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """What a geometry has of its own, as the manifest says it."""
    job, programs = part.pruned.job, part.pruned.programs
    return {
        "recipe": _recipe(job),
        "geometry": _geometry(job),
        "programs": _programs(programs, part.unpruned, part.graphs, engines, outside),
        "segments": [m.Segment(**vars(s)) for s in programs.segments],
        "media": _media(job),
        "position_offset": job.position_offset,
        "notes": [*job.notes, *list_generation_notes(job)],
        "forecast": part.forecast,
        "pixels": probe_pixels(work, outline(job)),
        "preprocessing": describe_preprocessing(processor.at(outline(job))),
    }


def outline(job: Job, programs: ProgramSet | None = None) -> m.Manifest:
    """What a bundle of this job would say of model, recipe, shapes and ports. It names no file, so nothing can load it:
    for running programs, and preparing their inputs, without a bundle."""
    told = {} if programs is None else _programs(programs, dict.fromkeys(programs.programs, 0))
    return m.Manifest.model_construct(
        model=describe_model(job, weights_sha256="0" * 64),
        recipe=_recipe(job),
        geometry=_geometry(job),
        dtype="fp32",
        programs=told,
        media=_media(job),
        segments=[m.Segment(**vars(s)) for s in programs.segments] if programs else [],
        position_offset=job.position_offset,
    )


def _digest_weights(weights: Mapping[str, str]) -> str:
    """The digest of the one file, or of the list of all."""
    if len(weights) == 1:
        return next(iter(weights.values()))
    return hashlib.sha256(m.canonical_json(dict(weights)).encode()).hexdigest()


def _programs(
    programs: ProgramSet,
    unpruned: Mapping[str, int],
    graphs: Mapping[str, str] = {},
    engines: Mapping[str, EngineInfo] = {},
    outside: Mapping[str, Sequence[str]] = {},
) -> dict[str, m.Program]:
    made = {}
    for name, program in programs.programs.items():
        inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
        graph = graphs.get(name, graph_file(name, 0))
        engine = engines.get(graph)
        made[name] = m.Program(
            graph=graph,
            engine=engine.path.name if engine else None,
            inputs=[_port(port_name(n.name), n.meta["val"]) for n in inputs],
            outputs=[_port(o, r.meta["val"]) for o, r in zip(program.outputs, program.results, strict=True)],
            flops=count_flops(program),
            unpruned_flops=unpruned[name],
            weights=list(outside.get(graph, ())),
        )
    return made


def _port(name: str, value: Tensor) -> m.Port:
    shape = [int(n) for n in value.shape]
    return m.Port(name=name, dtype=KINDS[value.dtype], shape=shape)  # type: ignore[arg-type]  # pydantic checks


def _recipe(job: Job) -> m.Recipe:
    recipe = job.plan.recipe
    stages = [
        m.Stage(
            name=s.name, site=str(s.site), score=str(s.score) if s.score else None,
            select=str(s.select) if s.select else None,
            merge=str(s.merge) if s.merge else None, scope=s.scope, groups=s.groups,
            length_in=s.length_in, length_out=s.length_out,
        )
        for s in job.plan.stages
    ]  # fmt: skip
    return m.Recipe(
        name=recipe.name, title=recipe.title, link=recipe.link, keep=float(job.plan.keep), positions=recipe.positions,
        cache=recipe.cache, sha256=digest_plan(job.plan, job.stages), notes=recipe.notes, stages=stages,
        calibrations=digests_of(job.plan.stages), weights=digests_of_weights(job.plan.stages),
    )  # fmt: skip


def _geometry(job: Job) -> m.GeometrySizes:
    geometry, vision = job.geometry, job.source.vision
    cut = vision.tiles or vision.split
    size = vision.image_size if cut is None else cut.image_size
    grids = 1 if vision.split is None else vision.split.grids
    tokens, features = vision.tokens_per_item * grids, job.features_per_item * grids
    sizes = []
    if job.sizes:
        each = [(job.sizes[size], vision.sizes[size]) for size in vision.size_of]
        sizes = [
            m.ImageSize(
                height=facts.image_size[0], width=facts.image_size[1], tokens=facts.tokens_per_image,
                features=own.kept_per_image,
            )
            for own, facts in each
        ]  # fmt: skip
        tokens, features = max((one.tokens, one.features) for one in sizes)
    return m.GeometrySizes(
        batch=geometry.batch, images=len(sizes) or vision.items // grids, text_tokens=geometry.text_tokens,
        new_tokens=geometry.new_tokens,
        image_height=size[0], image_width=size[1], tiles=vision.grids_per_item * grids if cut else 0,
        tokens_per_tile=vision.tokens_per_image if cut else 0, tile_marks=_tile_marks(job),
        tokens_per_image=tokens, features_per_image=features, extra_rows=vision.extra_rows, sequence=job.sequence,
        frames=geometry.frames, fps=geometry.fps if geometry.frames else 0.0, audio_seconds=geometry.audio_seconds,
        audio_tokens=job.source.audio_tokens, sizes=sizes,
    )  # fmt: skip


def _tile_marks(job: Job) -> list[list[int]]:
    """The text around and between the tiles of an image as tokens. Raises UserError where it leaves no room for
    words."""
    split = job.source.vision.split
    if split is None or not split.texts:
        return []
    source, token = job.source, int(job.source.config.image_token_id)
    text = token_text(source.path, token).join(split.texts).format_map(named_texts(job))
    marks: list[list[int]] = [[]]
    tokenizer = take_processor_files(source.path).tokenizer.backend
    for each in tokenizer.encode(text, add_special_tokens=False).ids:
        if each == token:
            marks.append([])
        else:
            marks[-1].append(int(each))
    words = sum(map(len, marks)) * (job.geometry.images or 1)
    if words >= job.geometry.text_tokens:
        raise UserError(
            f"the marks of {split.grids} tiles are {words} of {job.geometry.text_tokens} text tokens",
            where="geometry", fix=f"compile with --text-tokens {words + 64}",
        )  # fmt: skip
    return marks


def _media(job: Job) -> m.Media | None:
    media, config = job.source.media, job.source.config
    if media is None:
        return None
    items = [
        m.MediaItem(kind=item.kind, tokens=left, span=item.span, reach=item.reach)  # type: ignore[arg-type]  # pydantic
        for item, left in zip(media.items, job.items_left, strict=True)
    ]
    around = {
        kind: [[int(getattr(config, name))] for name in names]
        for kind, names in media.around.items() if all(hasattr(config, name) for name in names)
    }  # fmt: skip
    before, behind = ([int(getattr(config, name))] if name else [] for name in media.sound_marks)
    return m.Media(
        items=items, around=around, sound_before=before, sound_behind=behind,
        sound_marks_count=media.sound_marks_count, sound_padding=media.sound_padding, timestamp=media.timestamp,
    )  # fmt: skip
