"""The pass list, top to bottom: what makes of a trace the pruned programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from secateur.compiler.flops import count_flops
from secateur.compiler.plan_job import plan_job
from secateur.compiler.program import Program, ProgramSet
from secateur.compiler.pruned import Job, Pruned
from secateur.compiler.recipe import Recipe
from secateur.compiler.rope import follow_length
from secateur.compiler.trace import Traced, vision_programs
from secateur.passes.append_rows import append_rows
from secateur.passes.attach_caches import attach_caches, renumber_decode
from secateur.passes.attend_in_windows import attend_in_windows, list_uneven
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
from secateur.passes.join_sizes import join_sizes
from secateur.passes.recipes import RECIPES
from secateur.passes.refresh_shapes import refresh_shapes
from secateur.passes.straighten_heads import straighten_heads
from secateur.runtime.errors import UserError


@dataclass(frozen=True)
class Pass:
    """One step: ``run`` returns new programs. Passes are named by effect. A ``tidy`` one reads the programs alone, so
    that what it does to a trace is done once, whatever the recipes."""

    name: str
    run: Callable[[ProgramSet, Job], ProgramSet]
    tidy: bool = False


def _each(function: Callable[[Program], Program]) -> Callable[[ProgramSet, Any], ProgramSet]:
    return lambda programs, job: programs.update(*(function(p) for p in programs.programs.values()))


def _towers(function: Callable[[Program], Program]) -> Callable[[ProgramSet, Any], ProgramSet]:
    return lambda programs, job: programs.update(
        *(function(p) for name, p in programs.programs.items() if name.startswith(("vision", "audio")))
    )


def _segments(programs: ProgramSet, job: Job) -> ProgramSet:
    stages = [s.planned for s in job.decoder_stages]
    segments = split_segments(
        stages, job.source.decoder_layers, job.sequence, job.geometry.new_tokens, job.plan.recipe.cache
    )
    return replace(programs, segments=segments)


def _windows(programs: ProgramSet, job: Job) -> ProgramSet:
    uneven = list_uneven(programs.segments, job.original_positions, job.plan.recipe.positions == "compact")
    span = job.sequence + job.position_offset + job.geometry.new_tokens
    decoder = programs["decoder"]
    return programs.update(
        attend_in_windows(decoder, job.source.family.decoder_layers, programs.segments, uneven, span)
    )


def _phases(programs: ProgramSet, job: Job) -> ProgramSet:
    decoder = programs["decoder"]
    return programs.update(
        replace(decoder, name="prefill_decoder"), drop_planes(replace(decoder, name="decode_decoder")), drop=["decoder"]
    )


def _vision_stages(programs: ProgramSet, job: Job) -> ProgramSet:
    source, audio = job.source, job.source.family.audio
    carries = job.carries and (source.audio is None or bool(job.vision_stages))
    names = vision_programs(source.vision)
    pruned = [
        insert_vision_stages(programs[name], one.vision_stages, source.family.tower, one.source.vision, carries)
        for name, one in zip(names, job.sizes or (job,), strict=True)
    ]
    if job.sizes:
        pruned = [join_sizes(pruned, [one.vision_stages for one in job.sizes], source.vision, job.geometry.batch)]
        programs = programs.update(drop=names)
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
        by_length=bool(follow_length(job.source, job.geometry)),
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
        by_length=bool(follow_length(job.source, job.geometry)),
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
    Pass("drop_noops", _each(drop_noops), tidy=True),
    Pass("fold_scatters", _each(fold_scatters), tidy=True),
    Pass("straighten_heads", _each(straighten_heads), tidy=True),
    # Fold what backends have kernels for, before rows are taken: pruned layers then carry the folded form too.
    Pass("fold_rms_norm", _each(fold_rms_norm), tidy=True),
    Pass("fold_rotary", _each(fold_rotary), tidy=True),
    Pass("fold_constants", _towers(fold_constants), tidy=True),
    # Prune: features after the tower, rows between decoder layers; one KV capacity per run of layers.
    Pass("insert_vision_stages", _vision_stages),
    Pass("append_rows", _extra_rows),
    Pass("join_encoders", _encoders),
    Pass("split_segments", _segments),
    Pass("attend_in_windows", _windows),
    Pass("split_phases", _phases),
    Pass("insert_decoder_stages", _decoder_stages),
    # Caches: prefill writes where decode reads.
    Pass("attach_caches", _caches),
    # Whole programs at static shape.
    Pass("join_phases", _join),
    Pass("refresh_shapes", _each(refresh_shapes)),
)


@lru_cache(maxsize=4)
def _tidy(programs: ProgramSet, steps: tuple[Pass, ...]) -> ProgramSet:
    """A trace's programs after the passes that come first whatever the job; kept for the recipe that follows."""
    for step in steps:
        programs = step.run(programs, None)  # type: ignore[arg-type]  # they read no job
    return programs


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
    first = tuple(takewhile(lambda step: step.tidy and step.name != stop_after, PASSES)) if dump_dir is None else ()
    programs = _tidy(programs, first)
    for index, step in enumerate(PASSES[len(first) :], len(first) + 1):
        programs = step.run(programs, job)
        if dump_dir is not None:
            (dump_dir / f"{index:02}_{step.name}.txt").write_text(f"{programs}\n")
        if step.name == stop_after:
            break
    if expose and stop_after is None:
        programs = programs.update(expose_sites(programs["prefill"]))
    return Pruned(job, traced, programs)


def check_pass(name: str | None) -> None:
    names = [p.name for p in PASSES]
    if name is not None and name not in names:
        raise UserError(f"no pass {name!r}", where="--stop-after", available=names)


@lru_cache(maxsize=4)
def count_unpruned(traced: Traced) -> Mapping[str, int]:
    """FLOPs per program of a traced model without any recipe; counted once per trace."""
    whole = prune(traced, RECIPES["none"])
    return {name: count_flops(p) for name, p in whole.programs.programs.items()}
