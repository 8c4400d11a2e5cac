"""The road of a model: trace, prune (passlist.py), export and build (build_bundle.py)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.compiler.budget import Budget
from secateur.compiler.build_bundle import (
    Progress,
    build,
    check_weights,
    check_weights_mode,
    export,
    foresee,
    lay_out,
    phase,
)
from secateur.compiler.bundle import (
    Target,
    check_distinct,
    check_processor_files,
    list_generation_notes,
)
from secateur.compiler.calibrate import calibrate_model, write_calibrated
from secateur.compiler.calibration import Calibration
from secateur.compiler.capacity import Expected
from secateur.compiler.common_ground import Toolchain
from secateur.compiler.compare import Comparison, compare_named
from secateur.compiler.explain import Explanation, describe_pruned
from secateur.compiler.flops import count_flops
from secateur.compiler.geometry import Geometry
from secateur.compiler.geometry_text import list_geometries, make_geometry, read_geometries, read_sizes
from secateur.compiler.loops import check_loops
from secateur.compiler.meta_model import DTYPES, build_meta_model
from secateur.compiler.output import check_output, recover_output
from secateur.compiler.passlist import PASSES, Pass, check_pass, count_unpruned, prune
from secateur.compiler.plan_job import choose_keep, compare_flops, plan_for, plan_job
from secateur.compiler.processor_files import take_processor_files
from secateur.compiler.pruned import Job, Pruned
from secateur.compiler.questions import read_questions
from secateur.compiler.recipe import Recipe
from secateur.compiler.rope import follow_length
from secateur.compiler.self_test import check_level
from secateur.compiler.trace import Source, Traced, read_source, trace_model
from secateur.compiler.verify import Verification, verify_bundle
from secateur.exporters import tensorrt
from secateur.exporters.checkpoint import Checkpoint, list_tensors
from secateur.exporters.digests import Digests
from secateur.exporters.engine_options import EngineOptions, check_library, check_options, flag_of, given
from secateur.exporters.onnx import Exported, export_programs
from secateur.exporters.shards import list_unread
from secateur.passes.recipe_file import digest_recipe, load_recipe
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError

TARGETS = ("onnxruntime", "onnxruntime-cuda", "plain", "tensorrt", "tensorrt-rtx")
AMPERE = 80
AUTO = "auto"
"""As ``dtype``: the checkpoint's own."""

_log = logging.getLogger(__name__)


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
    sm: int | Sequence[int] | None = None,
    engines: EngineOptions | None = None,
    weights: str | None = None,
    loops: str | None = None,
    force: bool = False,
    dump_dir: Path | None = None,
    stop_after: str | None = None,
    progress: Progress | None = None,
    expected: Expected | None = None,
    self_test: str | None = None,
) -> Path | Pruned:
    """Compile a Hugging Face directory and a recipe into a bundle at ``out``.

    ``recipe`` is what ``--recipe`` takes (:func:`load_recipe`) or a :class:`Recipe`; ``keep`` the fraction of
    visual tokens left after the last stage (the published one by default), or instead ``mean_keep`` their mean over
    the decoder's layers (a pair for what is seen and what is heard), or ``flops_keep`` the fraction of the unpruned
    prefill's FLOPs. Several geometries become one bundle with one copy of the weights; a budget is then met in the
    first. ``target`` is one of ``TARGETS``; ``dtype`` is fp32 for ONNX Runtime on the CPU, fp16 (the default) or bf16
    for its CUDA provider and for TensorRT, any for plain, fp32 by default, or ``auto`` for the checkpoint's own;
    ``sm`` the GPU architecture for tensorrt-rtx, or several that one engine is to run on, and ``engines`` how TensorRT
    builds. ``weights`` says how they come into the bundle: ``stream``, the default, writes one file of them, cast where
    needed, tensor by tensor; ``reference`` hard-links the checkpoint's files, ``copy`` copies them. ``loops`` is for
    plain: ``keep``, the default, or ``unroll``, no control flow in the graphs. ``expected`` says what the device has,
    who is told the forecast, and whether it may stop the work before anything is written.
    ``self_test`` says what of it the bundle holds: ``full``, ``inputs`` (nothing that takes running the programs),
    ``none``, or ``auto``, the default: ``full`` where the programs run here in about a second. Returns ``out``; with
    ``stop_after`` nothing is written and the programs as that pass left them are returned.
    Raises UserError for bad input, before anything long starts where that is possible.
    """
    out, geometries = Path(out), list_geometries(geometry)
    goal = check_target(target, None if dtype == AUTO else dtype, sm, engines=engines, loops=loops)
    check_pass(stop_after)
    if stop_after is not None:
        _warn_unused(weights=weights, loops=loops, force=force or None, sm=sm, engines=engines, expected=expected,
                     self_test=self_test)  # fmt: skip
    self_test = self_test or "auto"
    if stop_after is None:
        check_level(self_test, goal.name, goal.dtype)
    weights = weights or "stream"
    check_weights_mode(weights)
    if stop_after is not None and len(geometries) > 1:
        raise UserError(
            f"the programs of one geometry can be printed, {len(geometries)} are given", where="--stop-after",
            fix="give one --geometry",
        )  # fmt: skip
    row = load_recipe(str(recipe)) if isinstance(recipe, (str, Path)) else recipe
    if stop_after is None:
        recover_output(out)
        check_output(out, force)
    # What cannot work fails here, before the model is traced.
    source = read_source(Path(model_dir))
    with Digests() as digests:

        def read_ahead() -> None:
            # Beside the tracing: reading a large checkpoint takes as long.
            if stop_after is None and weights == "reference":
                digests.begin(list_unread(source.path / file for file in list_tensors(source.path)))

        if dtype == AUTO:
            read_ahead()
            own = Checkpoint(source.path, build_meta_model(source, "fp32")).dtype()
            goal = check_target(target, own, sm, AUTO, engines, loops)
            if stop_after is None:
                check_level(self_test, goal.name, goal.dtype)
        budget = Budget.of(keep, mean_keep, flops_keep)
        if budget.rates is not None:
            row = row.with_rates(budget.rates)
        keep = choose_keep(source, geometries[0], row, budget)
        jobs = [plan_one(source, number, geometries, row, keep) for number in range(len(geometries))]
        check_distinct(jobs)
        notes = [note for job in jobs for note in (*job.notes, *list_generation_notes(job))]
        for note in dict.fromkeys(notes):
            _log.warning("%s", note)
        if stop_after is None:
            for job in jobs:
                check_processor_files(job)
            for note in take_processor_files(source.path).notes:
                _log.warning("%s: %s", source.path, note)
            list_tensors(source.path)
        read_ahead()
        return _compile(jobs, row, keep, budget, goal, out, weights, force, dump_dir, stop_after, progress, digests,
                        expected or Expected(), self_test)  # fmt: skip


def _warn_unused(**given: Any) -> None:
    """Name the arguments that are for a bundle, where only programs are looked at."""
    if named := [name for name, value in given.items() if value is not None]:
        _log.warning("beside stop_after no bundle is written, and %s says nothing", ", ".join(named))


def _compile(
    jobs: Sequence[Job], row: Recipe, keep: float | None, budget: Budget, goal: Target, out: Path,
    weights: str, force: bool, dump_dir: Path | None, stop_after: str | None, progress: Progress | None,
    digests: Digests, expected: Expected, self_test: str,
) -> Path | Pruned:  # fmt: skip
    """:func:`compile` once everything was checked that can be without a trace."""
    source, geometries = jobs[0].source, [job.geometry for job in jobs]
    tags = [f", geometry {number}" if len(jobs) > 1 else "" for number in range(len(jobs))]
    dumps = [dump_dir / f"geometry{n}" if dump_dir and tag else dump_dir for n, tag in enumerate(tags)]
    traced: list[Traced] = []
    for tag, sizes in zip(tags, geometries, strict=True):
        if tag:
            _log.info(
                "%s: %s, %d text tokens, %d new tokens", tag[2:], sizes.media, sizes.text_tokens, sizes.new_tokens
            )
        with phase(f"trace{tag}", progress):
            traced.append(_trace_again(traced, sizes) or trace_model(source, sizes, goal.dtype))
    if stop_after is None:
        digests.keep(list_unread(check_weights(*traced, weights=weights)))
    pruned: list[Pruned] = []
    for tag, model, dump in zip(tags, traced, dumps, strict=True):
        with phase(f"prune{tag}", progress):
            pruned.append(prune(model, row, keep, dump_dir=dump, stop_after=stop_after))
    if stop_after is not None:
        return pruned[0]
    if budget.flops_keep is not None:
        before = count_unpruned(traced[0])["prefill"]
        compare_flops(budget, count_flops(pruned[0].programs["prefill"]), before)
    layout, exported = lay_out(pruned, weights), list[Exported]()
    for tag, one, dump in zip(tags, pruned, dumps, strict=True):
        with phase(f"export{tag}", progress):
            plugins = goal.engines is not None and goal.engines.score_plugins
            exported.append(export_programs(one.programs.programs, goal.dialect, layout, plugins))
        if dump is not None:
            (dump / f"{len(PASSES) + 1:02}_export.txt").write_text(f"{exported[-1]}\n")
    needs = expected.consider(foresee(pruned, exported, goal), out)
    return build(
        pruned, exported, goal, out, force=force, progress=progress, digests=digests, needs=needs, self_test=self_test
    )


def explain(
    recipe: Recipe | str,
    model_dir: Path | str,
    *,
    keep: float | None = None,
    mean_keep: float | tuple[float, float] | None = None,
    flops_keep: float | None = None,
    geometry: Geometry | None = None,
    target: str | None = None,
    dtype: str | None = None,
    loops: str | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """What a recipe does to a model: stages, tokens per layer, FLOPs and cache bytes before and after.

    Reads the configuration only; the arguments are those of :func:`compile`. With a ``target``, whose library need not
    be there, also what the bundle is expected to take. Raises UserError as it does.
    """
    geometry = geometry or Geometry()
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}", where="--dtype", available=DTYPES)
    if target is None and loops is not None:
        raise UserError("says nothing without a target", where="--loops", fix="give --target plain as well")
    goal = None if target is None else name_target(target, dtype, loops)
    dtype = goal.dtype if goal else dtype or "fp32"
    row = load_recipe(str(recipe)) if isinstance(recipe, (str, Path)) else recipe
    source = read_source(Path(model_dir))
    budget = Budget.of(keep, mean_keep, flops_keep)
    if budget.rates is not None:
        row = row.with_rates(budget.rates)
    keep = choose_keep(source, geometry, row, budget)
    plan_job(source, geometry, row, keep)
    with phase("trace", progress):
        traced = trace_model(source, geometry, dtype)
    with phase("prune", progress):
        pruned = prune(traced, row, keep)
        unpruned = prune(traced, RECIPES["none"]) if pruned.job.stages else pruned
    found = describe_pruned(pruned, unpruned)
    compare_flops(budget, found.flops["prefill"].after, found.flops["prefill"].before)
    return found if goal is None else replace(found, forecast=foresee([pruned], [export(pruned, goal.dialect)], goal))


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


def name_target(target: str, dtype: str | None, loops: str | None = None) -> Target:
    """A target that need not be there, with its default dtype."""
    if target not in TARGETS:
        raise UserError(f"no target {target!r}", where="--target", available=TARGETS)
    unrolled = check_loops(target, loops)
    if not target.startswith("tensorrt"):
        return replace(_graph_target(target, dtype), unrolled=unrolled)
    dtype = dtype or "fp16"
    sms = tensorrt.check_target(target, dtype=dtype)
    return Target(target, dtype, sms[0] if sms else None, sms, EngineOptions())


def check_target(
    target: str,
    dtype: str | None,
    sm: int | Sequence[int] | None,
    asked: str | None = None,
    engines: EngineOptions | None = None,
    loops: str | None = None,
) -> Target:
    """Resolve defaults and refuse what no backend runs; TensorRT's library must be there and have the options.

    ``asked`` is the option that ``dtype`` was found by, for messages: ``auto``.
    """
    if target not in TARGETS:
        raise UserError(f"no target {target!r}", where="--target", available=TARGETS)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}", where="--dtype", available=(*DTYPES, AUTO))
    unrolled = check_loops(target, loops)
    if target.startswith("tensorrt"):
        dtype = dtype or "fp16"
        options = engines or EngineOptions()
        sms = tensorrt.check_target(target, dtype=dtype, sm=sm)
        check_options(target, options)
        tensorrt.check_machine(target)
        check_library(target, tensorrt.load_library(target).trt, options)
        if options.score_plugins:
            _register_plugins(sms, options)
        return Target(target, dtype, sms[0] if sms else None, sms, options)
    if engines is not None:
        where = flag_of((*given(engines), "weights")[0])
        raise UserError(f"target {target} builds no engines", where=where, fix="leave it out")
    if sm:
        raise UserError(f"target {target} has no GPU architecture", where="--sm", fix="leave --sm out")
    goal = replace(_graph_target(target, dtype, asked), unrolled=unrolled)
    if goal.provider is None:
        if target == "onnxruntime":
            where = f"--dtype {goal.dtype}" if asked is None else f"--dtype {asked}, the checkpoint is {goal.dtype}"
            raise UserError(
                "ONNX Runtime on the CPU is fp32", where=where,
                fix="half precision is for --target onnxruntime-cuda and TensorRT; compile with --dtype fp32",
            )  # fmt: skip
        _log.warning("this bundle is for other toolchains: Session runs fp32 only, not %s", goal.dtype)
    return goal


def _graph_target(target: str, dtype: str | None, asked: str | None = None) -> Target:
    """A target without engines, with its default dtype; ``asked`` as for :func:`check_target`."""
    goal = Target(target, dtype or ("fp16" if target == "onnxruntime-cuda" else "fp32"), None)
    if target == "onnxruntime-cuda" and goal.dtype == "fp32":
        raise UserError(
            "GroupQueryAttention computes in half precision on ONNX Runtime's CUDA provider",
            where="--dtype fp32" if asked is None else f"--dtype {asked}, the checkpoint is fp32",
            available=("fp16", "bf16"), fix="compile with --dtype fp16; norms and scores stay in fp32 inside the graph",
        )  # fmt: skip
    return goal


def _register_plugins(sms: Sequence[int], options: EngineOptions) -> None:
    """Make the kernels known to the library, for the GPU of this machine; raises UserError where something lacks."""
    from secateur.exporters.plugins.register import register_plugins

    if not sms:
        raise UserError(
            "kernels are compiled for the GPU's architecture, which is not known here", where="--score-plugins",
            fix="pip install 'secateur[tensorrt]', whose cuda-python asks the GPU, or leave it out",
        )  # fmt: skip
    # Engines for every GPU from Ampere on hold code that all of these can run.
    register_plugins(AMPERE if options.hardware_compatible else sms[0])


def _trace_again(traced: Sequence[Traced], geometry: Geometry) -> Traced | None:
    """A trace that serves this geometry as well: lengths of text are symbols in it."""
    for one in traced:
        same = replace(one.geometry, text_tokens=geometry.text_tokens, new_tokens=geometry.new_tokens) == geometry
        if same and follow_length(one.source, one.geometry) == follow_length(one.source, geometry):
            return replace(one, source=one.source.at(geometry), geometry=geometry)
    return None


__all__ = [
    "PASSES",
    "TARGETS",
    "Budget",
    "EngineOptions",
    "Expected",
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
    "foresee",
    "load_recipe",
    "make_geometry",
    "plan_for",
    "plan_job",
    "prune",
    "read_geometries",
    "read_questions",
    "read_sizes",
    "verify",
    "write_calibrated",
]
