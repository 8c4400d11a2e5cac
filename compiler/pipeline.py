"""The road of a model: trace, prune, export, build. The whole pass list stands here, top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.compiler import ops
from secateur.compiler.budget import Budget
from secateur.compiler.bundle import (
    Part,
    Target,
    check_distinct,
    check_processor_files,
    copy_processor_files,
    graph_file,
    make_manifest,
)
from secateur.compiler.calibrate import calibrate_model, write_calibrated
from secateur.compiler.calibration import Calibration
from secateur.compiler.common_ground import Toolchain
from secateur.compiler.compare import Comparison, compare_named
from secateur.compiler.explain import Explanation, describe_pruned
from secateur.compiler.flops import count_flops
from secateur.compiler.geometry import Geometry
from secateur.compiler.geometry_text import list_geometries, read_geometries
from secateur.compiler.output import check_output, whole_directory
from secateur.compiler.plan_job import choose_keep, compare_flops, plan_for, plan_job
from secateur.compiler.program import Program, ProgramSet
from secateur.compiler.pruned import Job, Pruned
from secateur.compiler.questions import read_questions
from secateur.compiler.recipe import Recipe
from secateur.compiler.trace import DTYPES, Source, Traced, build_meta_model, read_source, trace_model
from secateur.compiler.verify import Verification, verify_bundle
from secateur.exporters.checkpoint import Checkpoint, list_tensors, open_checkpoint
from secateur.exporters.lint import lint_graph, refuse
from secateur.exporters.onnx import Exported, export_programs, save_model
from secateur.exporters.shards import place_shards, refer_weights
from secateur.exporters.tensor_names import tied_names
from secateur.exporters.weights import MODES, WEIGHTS_FILE, WeightLayout, plan_weights, write_weights
from secateur.passes.append_rows import append_rows
from secateur.passes.attach_caches import attach_caches, renumber_decode
from secateur.passes.drop_noops import drop_noops
from secateur.passes.drop_planes import drop_planes
from secateur.passes.expose_sites import expose_sites
from secateur.passes.fold_constants import fold_constants
from secateur.passes.fold_rms_norm import fold_rms_norm
from secateur.passes.fold_rotary import fold_rotary
from secateur.passes.fold_scatters import fold_scatters
from secateur.passes.insert_decoder_stages import insert_decoder_stages, split_segments
from secateur.passes.insert_vision_stages import insert_vision_stages
from secateur.passes.join_encoders import join_encoders
from secateur.passes.join_phases import Axes, join_decode, join_prefill
from secateur.passes.recipe_file import digest_recipe, load_recipe
from secateur.passes.recipes import RECIPES
from secateur.passes.refresh_shapes import refresh_shapes
from secateur.passes.straighten_heads import straighten_heads
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import hash_file, write_manifest

TARGETS = ("onnxruntime", "plain", "tensorrt", "tensorrt-rtx")
AUTO = "auto"
"""As ``dtype``: the checkpoint's own."""
Progress = Callable[[str, int, int], None]
"""Told (what, done, total) when a phase begins and during long ones; total 0 when nobody knows it yet."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One step: ``run`` returns new programs. Passes are named by effect."""

    name: str
    run: Callable[[ProgramSet, Job], ProgramSet]


def _each(function: Callable[[Program], Program]) -> Callable[[ProgramSet, Job], ProgramSet]:
    return lambda programs, job: programs.update(*(function(p) for p in programs.programs.values()))


def _towers(function: Callable[[Program], Program]) -> Callable[[ProgramSet, Job], ProgramSet]:
    return lambda programs, job: programs.update(
        *(function(p) for name, p in programs.programs.items() if name in ("vision", "audio"))
    )


def _segments(programs: ProgramSet, job: Job) -> ProgramSet:
    stages = [s.planned for s in job.decoder_stages]
    segments = split_segments(
        stages, job.source.decoder_layers, job.sequence, job.geometry.new_tokens, job.plan.recipe.cache
    )
    return replace(programs, segments=segments)


def _phases(programs: ProgramSet, job: Job) -> ProgramSet:
    decoder = programs["decoder"]
    return programs.update(
        replace(decoder, name="prefill_decoder"), drop_planes(replace(decoder, name="decode_decoder")), drop=["decoder"]
    )


def _vision_stages(programs: ProgramSet, job: Job) -> ProgramSet:
    source, audio = job.source, job.source.family.audio
    carries = job.carries and (source.audio is None or bool(job.vision_stages))
    pruned = [insert_vision_stages(programs["vision"], job.vision_stages, source.family.tower, source.vision, carries)]
    if source.audio is not None and audio is not None:
        if job.carries and not (job.vision_stages and job.audio_stages):
            lacks = "projector.out" if job.audio_stages else "audio.out"
            raise UserError(
                f"the decoder goes on with scores of what is seen and heard, and no stage at {lacks} gives any",
                where=f"recipe {job.plan.recipe.name}",
                fix=f"add a stage with a score at {lacks}, or compile without sound",
            )  # fmt: skip
        pruned.append(insert_vision_stages(programs["audio"], job.audio_stages, audio.tower, source.audio, job.carries))
    return programs.update(*pruned)


def _encoders(programs: ProgramSet, job: Job) -> ProgramSet:
    if job.source.audio is None or job.source.media is None:
        return programs
    choosing = [s.planned for s in job.vision_stages if not s.planned.observes]
    whole = job.source.vision.tokens_per_image
    orders = [job.source.media.order(whole, count) for count in (whole, *(s.length_out for s in choosing))]
    joined = join_encoders(
        programs["vision"], programs["audio"], orders, job.carries, [stage.name for stage in choosing]
    )
    return programs.update(joined, drop=["audio"])


def _extra_rows(programs: ProgramSet, job: Job) -> ProgramSet:
    if not job.source.vision.extra_rows:
        return programs
    facts = job.source.vision
    vision = append_rows(programs["vision"], programs["extra_rows"], facts.items, facts.tiles)
    return programs.update(vision, drop=["extra_rows"])


def _decoder_stages(programs: ProgramSet, job: Job) -> ProgramSet:
    layers = job.source.family.decoder_layers
    prefill = insert_decoder_stages(
        programs["prefill_decoder"], job.decoder_stages, layers, job.geometry.batch, job.sequence, job.carries,
        job.source.vision.extra_rows, job.source.vision.tiles is not None,
    )  # fmt: skip
    decode = programs["decode_decoder"]
    if job.plan.recipe.positions == "compact":
        decode = renumber_decode(decode, layers, programs.segments)
    return programs.update(prefill, decode)


def _caches(programs: ProgramSet, job: Job) -> ProgramSet:
    layers, batch = job.source.family.decoder_layers, job.geometry.batch
    return programs.update(
        attach_caches(programs["prefill_decoder"], layers, programs.segments, batch, fresh=True),
        attach_caches(programs["decode_decoder"], layers, programs.segments, batch, fresh=False),
    )


def _join(programs: ProgramSet, job: Job) -> ProgramSet:
    batch, config = job.geometry.batch, job.source.config
    features = programs["vision"].results[0].meta["val"].new_empty(
        (batch, job.features_per_row, job.source.text.hidden_size), device="cpu"
    )  # fmt: skip
    prefill = join_prefill(
        programs["prefill_decoder"], programs["embedding"], programs["head"],
        features=features, sequence=job.sequence, image_token=config.image_token_id,
        pad_token=job.source.pad_token, tokens_per_item=job.source.vision.tokens_per_item,
        kept_per_item=job.kept_per_item, original_positions=job.original_positions,
        extra_rows=job.source.vision.extra_rows, tiles=job.source.vision.tiles, axes=_axes(job),
        blocks=job.source.family.image_masks is not None, chosen=job.removes_before_decoder,
    )  # fmt: skip
    decode = join_decode(programs["decode_decoder"], programs["embedding"], programs["head"], batch)
    return programs.update(prefill, decode, drop=["prefill_decoder", "decode_decoder", "embedding", "head"])


def _axes(job: Job) -> Axes | None:
    """Offsets of the media's places, where position ids have several axes and the recipe does not count slots."""
    media = job.source.media
    if media is None:
        return None
    if job.removes_before_decoder and not job.original_positions:
        return Axes(None, None)
    return Axes(media.offsets, None if job.removes_before_decoder else tuple(range(job.features_per_row)))


PASSES: tuple[Pass, ...] = (
    # Tidy: every later pattern is written for graphs without tracing's leftovers.
    Pass("drop_noops", _each(drop_noops)),
    Pass("fold_scatters", _each(fold_scatters)),
    Pass("straighten_heads", _each(straighten_heads)),
    # Fold what backends have kernels for, before rows are taken: pruned layers then carry the folded form too.
    Pass("fold_rms_norm", _each(fold_rms_norm)),
    Pass("fold_rotary", _each(fold_rotary)),
    Pass("fold_constants", _towers(fold_constants)),
    # Prune: features after the tower, rows between decoder layers; one KV capacity per run of layers.
    Pass("insert_vision_stages", _vision_stages),
    Pass("append_rows", _extra_rows),
    Pass("join_encoders", _encoders),
    Pass("split_segments", _segments),
    Pass("split_phases", _phases),
    Pass("insert_decoder_stages", _decoder_stages),
    # Caches: prefill writes where decode reads.
    Pass("attach_caches", _caches),
    # Whole programs at static shape.
    Pass("join_phases", _join),
    Pass("refresh_shapes", _each(refresh_shapes)),
)


def prune(
    traced: Traced,
    recipe: Recipe,
    keep: float | None = None,
    *,
    dump_dir: Path | None = None,
    stop_after: str | None = None,
    expose: bool = False,
) -> Pruned:
    """Run the pass list.

    ``dump_dir`` gets the programs' text after each pass, ``stop_after`` names the last one to run; ``expose``
    adds the hidden rows every decoder stage leaves to prefill's outputs, for comparing runs.
    """
    check_pass(stop_after)
    job, programs = plan_job(traced.source, traced.geometry, recipe, keep), traced.programs
    if dump_dir is not None:
        dump_dir.mkdir(parents=True, exist_ok=True)
        (dump_dir / "00_trace.txt").write_text(f"{programs}\n")
    for index, step in enumerate(PASSES, 1):
        programs = step.run(programs, job)
        if dump_dir is not None:
            (dump_dir / f"{index:02}_{step.name}.txt").write_text(f"{programs}\n")
        if step.name == stop_after:
            break
    if expose and stop_after is None:
        programs = programs.update(expose_sites(programs["prefill"]))
    return Pruned(job, traced, programs)


def export(pruned: Pruned, dialect: str, weights: str = "stream") -> Exported:
    """Lower pruned programs to ONNX models. Weights are laid out, not read: ``weights`` as for :func:`compile`."""
    return export_programs(pruned.programs.programs, dialect, lay_out([pruned], weights))


def lay_out(geometries: Sequence[Pruned], weights: str) -> WeightLayout:
    """Places for the weights of all geometries of a model: one file, or the same references, for all of them."""
    check_weights_mode(weights)
    used: dict[str, Tensor] = {}
    for pruned in geometries:
        for program in pruned.programs.programs.values():
            used |= {k: v for k, v in program.weights().items() if k not in used}
    traced = geometries[0].traced
    if weights == "stream":
        return plan_weights(used, traced.model, DTYPES[traced.dtype])
    checkpoint = open_checkpoint(geometries[0].job.source.path, traced.model)
    turnable = list_turnable(*(pruned.programs for pruned in geometries))
    return refer_weights(used, checkpoint, DTYPES[traced.dtype], weights, turnable)


def build(
    pruned: Pruned | Sequence[Pruned],
    exported: Exported | Sequence[Exported],
    target: Target,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the bundle: graphs, weights, processor files, engines for TensorRT targets, and last the manifest.

    Several geometries come as sequences of the same length, their weights laid out together (:func:`lay_out`).
    """
    pruned = [pruned] if isinstance(pruned, Pruned) else pruned
    exported = [exported] if isinstance(exported, Exported) else exported
    tell = progress or (lambda what, done, total: None)
    with whole_directory(out, force) as work:
        for one in pruned:
            copy_processor_files(one.job, work)
        graphs = _save_graphs(exported, target, work)
        with _phase("weights", progress):
            checkpoint = open_checkpoint(pruned[0].job.source.path, pruned[0].traced.model)
            weights = _place_weights(exported[0], checkpoint, work, tell)
        engines = _build_engines(list(dict.fromkeys(file for files in graphs for file in files.values())), target, work,
                                 tell)  # fmt: skip
        parts = [Part(one, files, count_unpruned(one.traced)) for one, files in zip(pruned, graphs, strict=True)]
        write_manifest(work, make_manifest(parts, exported[0], target, work, weights, engines))
    return out


def compile(
    model_dir: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | str = "none",
    keep: float | None = None,
    mean_keep: float | tuple[float, float] | None = None,
    flops_keep: float | None = None,
    geometry: Geometry | Sequence[Geometry] | None = None,
    target: str = "onnxruntime",
    dtype: str | None = None,
    sm: int | None = None,
    weights: str = "stream",
    force: bool = False,
    dump_dir: Path | None = None,
    stop_after: str | None = None,
    progress: Progress | None = None,
) -> Path | Pruned:
    """Compile a Hugging Face directory and a recipe into a bundle at ``out``.

    ``recipe`` is what ``--recipe`` takes (:func:`load_recipe`) or a :class:`Recipe`; ``keep`` the fraction of
    visual tokens left after the last stage (the published one by default), or instead ``mean_keep`` their mean over
    the decoder's layers (a pair for what is seen and what is heard), or ``flops_keep`` the fraction of the unpruned
    prefill's FLOPs. Several geometries become one bundle with one copy of the weights; a budget is then met in the
    first. ``target`` is one of ``TARGETS``; ``dtype`` is fp32 for ONNX Runtime, fp16 (the default) or
    bf16 for TensorRT, any for plain, fp32 by default, or ``auto`` for the checkpoint's own; ``sm`` the GPU
    architecture for tensorrt-rtx. ``weights`` says how they come into the bundle: ``stream`` writes one file of
    them, cast where needed, tensor by tensor; ``reference`` hard-links the checkpoint's files, ``copy`` copies
    them. Returns ``out``; with ``stop_after`` nothing is written and the programs as that pass left them are
    returned.
    Raises UserError for bad input, before anything long starts where that is possible.
    """
    out, geometries = Path(out), list_geometries(geometry)
    goal = check_target(target, None if dtype == AUTO else dtype, sm)
    check_weights_mode(weights)
    check_pass(stop_after)
    if stop_after is not None and len(geometries) > 1:
        raise UserError(
            f"the programs of one geometry can be printed, {len(geometries)} are given", where="--stop-after",
            fix="give one --geometry",
        )  # fmt: skip
    row = load_recipe(str(recipe)) if isinstance(recipe, (str, Path)) else recipe
    if stop_after is None:
        check_output(out, force)
    # What cannot work fails here, before the model is traced.
    source = read_source(Path(model_dir))
    if dtype == AUTO:
        goal = check_target(target, Checkpoint(source.path, build_meta_model(source, "fp32")).dtype(), sm, AUTO)
    budget = Budget.of(keep, mean_keep, flops_keep)
    if budget.rates is not None:
        row = row.with_rates(budget.rates)
    keep = choose_keep(source, geometries[0], row, budget)
    jobs = [plan_one(source, number, geometries, row, keep) for number in range(len(geometries))]
    check_distinct(jobs)
    for note in dict.fromkeys(note for job in jobs for note in job.notes):
        _log.warning("%s", note)
    if stop_after is None:
        for job in jobs:
            check_processor_files(job)
        list_tensors(source.path)
    tags = [f", geometry {number}" if len(jobs) > 1 else "" for number in range(len(jobs))]
    dumps = [dump_dir / f"geometry{n}" if dump_dir and tag else dump_dir for n, tag in enumerate(tags)]
    traced: list[Traced] = []
    for tag, sizes in zip(tags, geometries, strict=True):
        if tag:
            _log.info(
                "%s: %s, %d text tokens, %d new tokens", tag[2:], sizes.media, sizes.text_tokens, sizes.new_tokens
            )
        with _phase(f"trace{tag}", progress):
            traced.append(_trace_again(traced, sizes) or trace_model(source, sizes, goal.dtype))
    if stop_after is None:
        check_weights(*traced, weights=weights)
    pruned: list[Pruned] = []
    for tag, model, dump in zip(tags, traced, dumps, strict=True):
        with _phase(f"prune{tag}", progress):
            pruned.append(prune(model, row, keep, dump_dir=dump, stop_after=stop_after))
    if stop_after is not None:
        return pruned[0]
    if budget.flops_keep is not None:
        before = count_unpruned(traced[0])["prefill"]
        compare_flops(budget, count_flops(pruned[0].programs["prefill"]), before)
    layout, exported = lay_out(pruned, weights), list[Exported]()
    for tag, one, dump in zip(tags, pruned, dumps, strict=True):
        with _phase(f"export{tag}", progress):
            exported.append(export_programs(one.programs.programs, goal.dialect, layout))
        if dump is not None:
            (dump / f"{len(PASSES) + 1:02}_export.txt").write_text(f"{exported[-1]}\n")
    return build(pruned, exported, goal, out, force=force, progress=progress)


def explain(
    recipe: Recipe | str,
    model_dir: Path | str,
    *,
    keep: float | None = None,
    mean_keep: float | tuple[float, float] | None = None,
    flops_keep: float | None = None,
    geometry: Geometry | None = None,
    dtype: str = "fp32",
    progress: Progress | None = None,
) -> Explanation:
    """What a recipe does to a model: stages, tokens per layer, FLOPs and cache bytes before and after.

    Reads the configuration only; the arguments are those of :func:`compile`. Raises UserError as it does.
    """
    geometry = geometry or Geometry()
    if dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}", where="--dtype", available=DTYPES)
    row = load_recipe(str(recipe)) if isinstance(recipe, (str, Path)) else recipe
    source = read_source(Path(model_dir))
    budget = Budget.of(keep, mean_keep, flops_keep)
    if budget.rates is not None:
        row = row.with_rates(budget.rates)
    keep = choose_keep(source, geometry, row, budget)
    plan_job(source, geometry, row, keep)
    with _phase("trace", progress):
        traced = trace_model(source, geometry, dtype)
    with _phase("prune", progress):
        pruned = prune(traced, row, keep)
        unpruned = prune(traced, RECIPES["none"]) if pruned.job.stages else pruned
    found = describe_pruned(pruned, unpruned)
    compare_flops(budget, found.flops["prefill"].after, found.flops["prefill"].before)
    return found


def verify(bundle: Path | str, model_dir: Path | str | None = None, **how: Any) -> Verification:
    """Check a bundle's files by hash and, given the model, its results against Hugging Face; see ``verify_bundle``."""
    return verify_bundle(Path(bundle), None if model_dir is None else Path(model_dir), plan_job, **how)


def calibrate(model_dir: Path | str, data: Any, **how: Any) -> Calibration:
    """Measure a recipe's scores on questions: weights by place, sink dimensions, counts; see ``calibrate_model``."""
    source = Path(data) if isinstance(data, str) else data
    return calibrate_model(Path(model_dir), source, plan_job, **how)


def compare(a: Path | str, b: Path | str, **how: Any) -> Comparison:
    """Two runs over the same rows, each ``oracle``, ``fx``, ``plain``, ``onnxruntime`` or the directory of a bundle:
    choices, numbers, answers, and the first pass that changes numbers; see ``compare_named`` for the options."""

    def make(pruned: Pruned, target: str, out: Path) -> Path:
        goal = check_target(target, "fp32", None)
        return build(pruned, export(pruned, goal.dialect), goal, out)

    return compare_named(str(a), str(b), Toolchain(plan_job, trace_model, prune, make, PASSES), **how)


def plan_one(source: Source, number: int, geometries: Sequence[Geometry], recipe: Recipe, keep: float | None) -> Job:
    """:func:`plan_job` for one of several geometries, whose errors say which it is."""
    try:
        return plan_job(source, geometries[number], recipe, keep)
    except UserError as error:
        if len(geometries) == 1:
            raise
        raise UserError(str(error), where=f"geometry {number}") from None


def check_target(target: str, dtype: str | None, sm: int | None, asked: str | None = None) -> Target:
    """Resolve defaults and refuse what no backend runs; TensorRT's library must be there.

    ``asked`` is the option that ``dtype`` was found by, for messages: ``auto``.
    """
    if target not in TARGETS:
        raise UserError(f"no target {target!r}", where="--target", available=TARGETS)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}", where="--dtype", available=(*DTYPES, AUTO))
    if target.startswith("tensorrt"):
        from secateur.exporters import tensorrt

        dtype = dtype or "fp16"
        sm = tensorrt.check_target(target, dtype=dtype, sm=sm)
        tensorrt.load_library(target)
        return Target(target, dtype, sm)
    if sm is not None:
        raise UserError(f"target {target} has no GPU architecture", where="--sm", fix="leave --sm out")
    goal = Target(target, dtype or "fp32", None)
    if goal.provider is None:
        if target == "onnxruntime":
            where = f"--dtype {goal.dtype}" if asked is None else f"--dtype {asked}, the checkpoint is {goal.dtype}"
            raise UserError(
                "ONNX Runtime on the CPU is fp32", where=where,
                fix="half precision is for the TensorRT targets; compile with --dtype fp32",
            )  # fmt: skip
        _log.warning("this bundle is for other toolchains: Session runs fp32 only, not %s", goal.dtype)
    return goal


def check_weights(*geometries: Traced, weights: str = "stream") -> None:
    """Refuse a checkpoint that lacks a tensor of the traced programs, has it in another shape, or cannot be used as it
    is where ``weights`` says so; warn of tensors the model does not have. Reads headers only."""
    traced = geometries[0]
    aliases, checkpoint = tied_names(traced.model), open_checkpoint(traced.source.path, traced.model)
    used: dict[str, Tensor] = {}
    for program in (program for one in geometries for program in one.programs.programs.values()):
        used |= {aliases.get(name, name): tensor for name, tensor in program.weights().items()}
    checkpoint.require({name: tuple(tensor.shape) for name, tensor in used.items()})
    if weights != "stream":
        refer_weights(used, checkpoint, DTYPES[traced.dtype], weights,
                      list_turnable(*(one.programs for one in geometries)))  # fmt: skip
    if extra := checkpoint.unexpected():
        _log.warning(
            "%s: %d tensors are no part of the model and are left out, such as %s",
            traced.source.path, len(extra), ", ".join(extra[:3]),
        )  # fmt: skip


def list_turnable(*sets: ProgramSet) -> set[str]:
    """Weights that every program reads as experts only: graphs take those as they lie or turned."""
    programs = [program for one in sets for program in one.programs.values()]
    nodes = [n for p in programs for n in p.graph.nodes if n.op == "get_attr" and "weight" in n.meta]
    other = {n.meta["weight"] for n in nodes if any(user.target is not ops.experts for user in n.users)}
    return {n.meta["weight"] for n in nodes} - other


def check_weights_mode(weights: str) -> None:
    if weights not in MODES:
        raise UserError(f"no way {weights!r} of placing weights", where="--weights", available=MODES)


def check_pass(name: str | None) -> None:
    names = [p.name for p in PASSES]
    if name is not None and name not in names:
        raise UserError(f"no pass {name!r}", where="--stop-after", available=names)


@lru_cache(maxsize=4)
def count_unpruned(traced: Traced) -> Mapping[str, int]:
    """FLOPs per program of a traced model without any recipe; counted once per trace."""
    whole = prune(traced, RECIPES["none"])
    return {name: count_flops(p) for name, p in whole.programs.programs.items()}


def _place_weights(exported: Exported, checkpoint: Checkpoint, work: Path, tell: Progress) -> dict[str, str]:
    """Put the weights into the bundle; returns the SHA-256 of each file by its path there."""
    layout = exported.layout

    def written(done: int, total: int) -> None:
        tell("weights", done, total)

    placed = place_shards(layout, work, written) if layout.shards else {}
    if layout.header:
        placed[WEIGHTS_FILE] = write_weights(layout, checkpoint, work / WEIGHTS_FILE, written)
    return placed


def _trace_again(traced: Sequence[Traced], geometry: Geometry) -> Traced | None:
    """A trace that serves this geometry as well: lengths of text are symbols in it."""
    for one in traced:
        if replace(one.geometry, text_tokens=geometry.text_tokens, new_tokens=geometry.new_tokens) == geometry:
            return replace(one, source=one.source.at(geometry), geometry=geometry)
    return None


def _save_graphs(exported: Sequence[Exported], target: Target, work: Path) -> list[dict[str, str]]:
    """Write the graphs; the file of every program, per geometry. Equal graphs are one file."""
    found: list[dict[str, str]] = []
    written: dict[str, str] = {}
    for number, one in enumerate(exported):
        found.append({})
        for name, graph in one.models.items():
            file = graph_file(name, number)
            refuse(lint_graph(graph, target.name, target.dtype, target.sm), where=file)
            save_model(graph, work / file)
            found[-1][name] = written.setdefault(hash_file(work / file), file)
            if found[-1][name] != file:
                (work / file).unlink()
    return found


def _build_engines(graphs: Sequence[str], target: Target, work: Path, tell: Progress) -> dict[str, str]:
    """The engine file of every graph file."""
    if target.dialect != "tensorrt":
        return {}
    from secateur.exporters.tensorrt import build_engine

    made = {}
    for graph in graphs:
        name = graph.removesuffix(".onnx")
        with _phase(f"engine {name}", tell):
            build_engine(
                work / graph, work / f"{name}.engine", flavour=target.name, sm=target.sm,
                progress=lambda what, done, total, name=name: tell(f"engine {name}: {what}", done, total),  # type: ignore[misc]
            )  # fmt: skip
        made[graph] = f"{name}.engine"
    return made


@contextmanager
def _phase(name: str, tell: Progress | None = None) -> Iterator[None]:
    """Tell that a phase begins, and log how long it took once it is over."""
    start = time.perf_counter()
    if tell is not None:
        tell(name, 0, 0)
    yield
    _log.info("%-16s %6.1f s", name, time.perf_counter() - start)


__all__ = [
    "PASSES",
    "TARGETS",
    "Budget",
    "Geometry",
    "Pass",
    "Source",
    "build",
    "build_meta_model",
    "calibrate",
    "choose_keep",
    "compile",
    "digest_recipe",
    "explain",
    "export",
    "load_recipe",
    "plan_for",
    "plan_job",
    "prune",
    "read_geometries",
    "read_questions",
    "verify",
    "write_calibrated",
]
