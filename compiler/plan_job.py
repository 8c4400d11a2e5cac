"""From what the user asked for to a job: every number fixed, every function resolved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from secateur.compiler.budget import Budget, PrefillCost, solve_budget
from secateur.compiler.calibration import check_calibrated
from secateur.compiler.geometry import Geometry
from secateur.compiler.plan_recipe import PlannedRecipe, PlannedStage, plan_recipe
from secateur.compiler.pruned import Job
from secateur.compiler.recipe import Recipe
from secateur.compiler.site import Site
from secateur.compiler.trace import Source
from secateur.passes.check_stages import check_stages
from secateur.passes.stage import StageFunction, stage_function
from secateur.passes.vocabulary import bind_stage
from secateur.runtime.errors import UserError

FLOPS_MISS = 0.02
"""By how much of the unpruned prefill the exact count may miss ``--flops-keep`` before that is said aloud."""

_log = logging.getLogger(__name__)


def plan_job(source: Source, geometry: Geometry, recipe: Recipe, keep: float | None) -> Job:
    """Fix every number of a recipe for a model and geometry and resolve its functions."""
    source = source.at(geometry)
    plan = plan_for(source, geometry, recipe, keep)
    # Stages of images of several sizes are those of each size.
    check_calibrated([s for s in plan.stages if not plan.sizes or _apart(s)], source.path / "config.json")
    for size in plan.sizes:
        check_calibrated(size.stages, source.path / "config.json")
    sizes = tuple(
        Job(replace(source, vision=facts, audio=None, media=None), geometry, part, _functions(part.stages))
        for part, facts in zip(plan.sizes, source.vision.sizes, strict=True)
    )
    job = Job(source, geometry, plan, _functions(plan.stages, bool(sizes)), sizes)
    check_stages(job.stages, source.vision, source.audio)
    assert len(job.media_order) == job.features_per_row, "every token of the media has one place"
    return job


def _apart(stage: PlannedStage) -> bool:
    """Whether a stage stands in no tower for what is seen."""
    return stage.site.kind in ("decoder.layer", "audio.out")


def _functions(stages: Sequence[PlannedStage], several_sizes: bool = False) -> tuple[StageFunction, ...]:
    """With ``several_sizes`` those of the vision side are never called: each size has its own."""
    return tuple(
        StageFunction(stage, bind_stage(stage, stage.name))
        if several_sizes and not _apart(stage)
        else stage_function(stage)
        for stage in stages
    )


def plan_for(source: Source, geometry: Geometry, recipe: Recipe, keep: float | None) -> PlannedRecipe:
    """Layers and token counts of a recipe for a model and geometry; nothing is looked up or traced."""
    if not recipe.stages and keep not in (None, 1.0):
        raise UserError(
            f"recipe {recipe.name} keeps every token",
            where=f"--keep {keep:g}",
            fix="leave --keep out or choose a recipe",
        )
    source = source.at(geometry)
    if source.vision.projector_merges:
        recipe = _behind_projector(recipe)
    if source.audio is not None and keep is None and recipe.rates is not None:
        # The published setting names a mean of its own for what is seen and for what is heard.
        keep = choose_keep(source, geometry, recipe, Budget(rates=recipe.rates))
    return plan_recipe(
        recipe,
        keep=keep,
        images=source.vision.frames,
        tiles=source.vision.images_of_tiles,
        tokens_per_image=source.vision.tokens_per_image,
        media=source.media,
        audio=source.audio,
        vision_layers=source.vision.layers,
        decoder_layers=source.decoder_layers,
        grid=source.vision.grid,
        vision_running=source.vision.feature_layer + 1,
        sizes=source.vision.sizes,
        size_of=source.vision.size_of,
        has_cls=source.vision.has_cls,
    )


def _behind_projector(recipe: Recipe) -> Recipe:
    """The recipe with what stands before the projector behind it: this projector puts patches together itself."""
    stages = tuple(
        replace(stage, site=Site("projector.out")) if stage.site.kind == "vision.out" else stage
        for stage in recipe.stages
    )
    parts = tuple(replace(part, recipe=_behind_projector(part.recipe)) for part in recipe.parts)
    return replace(recipe, stages=stages, parts=parts)


def choose_keep(source: Source, geometry: Geometry, recipe: Recipe, budget: Budget) -> float | None:
    """The keep ratio that meets a budget; None takes the published one."""
    budget = budget.weigh(source.at(geometry).vision.tokens_per_row, source.at(geometry).audio_tokens)
    if budget.mean_keep is None and budget.flops_keep is None:
        return budget.keep
    source = source.at(geometry)
    tokens = source.vision.tokens_per_row + source.audio_tokens
    fixed = geometry.text_tokens + source.vision.extra_rows * source.vision.items
    keep = solve_budget(
        budget,
        lambda ratio: plan_for(source, geometry, recipe, ratio if recipe.stages else None),
        tokens,
        source.decoder_layers,
        PrefillCost.of(source.text, fixed),
    )
    asked = "mean-keep" if budget.mean_keep is not None else "flops-keep"
    _log.info("--%s %g is met by --keep %g", asked, budget.mean_keep or budget.flops_keep, keep)
    return keep


def compare_flops(budget: Budget, pruned: int, unpruned: int) -> None:
    """Say what the prefill's exact count, stages included, makes of ``--flops-keep``; a warning if it is far off."""
    if budget.flops_keep is None:
        return
    exact = pruned / unpruned
    level = logging.INFO if abs(exact - budget.flops_keep) <= FLOPS_MISS else logging.WARNING
    _log.log(level, "--flops-keep %g: prefill takes %.3g of the unpruned FLOPs, scoring included",
             budget.flops_keep, exact)  # fmt: skip
