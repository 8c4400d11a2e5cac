"""The road of a model: trace, prune, export, build. The whole pass list stands here, top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.compiler.geometry import Geometry
from secateur.compiler.program import ProgramSet
from secateur.compiler.pruned import Job, Pruned
from secateur.compiler.recipe import Recipe, plan_recipe
from secateur.compiler.trace import Traced
from secateur.passes.attach_caches import attach_caches, renumber_decode
from secateur.passes.drop_noops import drop_noops
from secateur.passes.fold_rms_norm import fold_rms_norm
from secateur.passes.fold_rotary import fold_rotary
from secateur.passes.insert_decoder_stages import insert_decoder_stages, split_segments
from secateur.passes.insert_vision_stages import insert_vision_stages
from secateur.passes.join_phases import join_decode, join_prefill
from secateur.passes.refresh_shapes import refresh_shapes
from secateur.passes.stage import stage_function
from secateur.runtime.errors import UserError


@dataclass(frozen=True)
class Pass:
    """One step: ``run`` returns new programs. Passes are named by effect."""

    name: str
    run: Callable[[ProgramSet, Job], ProgramSet]


def _each(function: Callable[..., object]) -> Callable[[ProgramSet, Job], ProgramSet]:
    return lambda programs, job: programs.update(*(function(p) for p in programs.programs.values()))  # type: ignore[misc]


def _segments(programs: ProgramSet, job: Job) -> ProgramSet:
    stages = [s.planned for s in job.decoder_stages]
    segments = split_segments(stages, job.source.decoder_layers, job.sequence, job.geometry.new_tokens)
    return replace(programs, segments=segments)


def _phases(programs: ProgramSet, job: Job) -> ProgramSet:
    decoder = programs["decoder"]
    return programs.update(
        replace(decoder, name="prefill_decoder"), replace(decoder, name="decode_decoder"), drop=["decoder"]
    )


def _vision_stages(programs: ProgramSet, job: Job) -> ProgramSet:
    source = job.source
    pruned = insert_vision_stages(
        programs["vision"], job.vision_stages, source.family, source.vision, job.geometry.images
    )
    return programs.update(pruned)


def _decoder_stages(programs: ProgramSet, job: Job) -> ProgramSet:
    layers = job.source.family.decoder_layers
    prefill = insert_decoder_stages(
        programs["prefill_decoder"], job.decoder_stages, layers, job.geometry.batch, job.sequence
    )
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
        pad_token=job.source.pad_token, tokens_per_image=job.source.vision.tokens_per_image,
        kept_per_image=job.kept_per_image, original_positions=job.original_positions,
    )  # fmt: skip
    decode = join_decode(programs["decode_decoder"], programs["embedding"], programs["head"], batch)
    return programs.update(prefill, decode, drop=["prefill_decoder", "decode_decoder", "embedding", "head"])


PASSES: tuple[Pass, ...] = (
    # Tidy: every later pattern is written for graphs without tracing's leftovers.
    Pass("drop_noops", _each(drop_noops)),
    # Fold what backends have kernels for, before rows are taken: pruned layers then carry the folded form too.
    Pass("fold_rms_norm", _each(fold_rms_norm)),
    Pass("fold_rotary", _each(fold_rotary)),
    # Prune: features after the tower, rows between decoder layers; one KV capacity per run of layers.
    Pass("insert_vision_stages", _vision_stages),
    Pass("split_segments", _segments),
    Pass("split_phases", _phases),
    Pass("insert_decoder_stages", _decoder_stages),
    # Caches: prefill writes where decode reads.
    Pass("attach_caches", _caches),
    # Whole programs at static shape.
    Pass("join_phases", _join),
    Pass("refresh_shapes", _each(refresh_shapes)),
)


def plan_job(traced: Traced, recipe: Recipe, keep: float | None) -> Job:
    """Fix every number of a recipe for the traced model and resolve its functions."""
    source = traced.source
    plan = plan_recipe(
        recipe,
        keep=keep,
        images=traced.geometry.images,
        tokens_per_image=source.vision.tokens_per_image,
        vision_layers=source.vision.layers,
        decoder_layers=source.decoder_layers,
    )
    return Job(traced, plan, tuple(stage_function(s) for s in plan.stages))


def prune(
    traced: Traced,
    recipe: Recipe,
    keep: float | None = None,
    *,
    dump_dir: Path | None = None,
    stop_after: str | None = None,
    on_pass: Callable[[str], None] = lambda name: None,
) -> Pruned:
    """Run the pass list. ``dump_dir`` gets the programs' text after each pass, ``stop_after`` names the last one to run."""
    names = [p.name for p in PASSES]
    if stop_after is not None and stop_after not in names:
        raise UserError(f"no pass {stop_after!r}", where="--stop-after", available=names)
    job, programs = plan_job(traced, recipe, keep), traced.programs
    if dump_dir is not None:
        dump_dir.mkdir(parents=True, exist_ok=True)
        (dump_dir / "00_trace.txt").write_text(f"{programs}\n")
    for index, step in enumerate(PASSES, 1):
        on_pass(step.name)
        programs = step.run(programs, job)
        if dump_dir is not None:
            (dump_dir / f"{index:02}_{step.name}.txt").write_text(f"{programs}\n")
        if step.name == stop_after:
            break
    return Pruned(job, programs)


__all__ = ["PASSES", "Geometry", "Pass", "plan_job", "prune"]
