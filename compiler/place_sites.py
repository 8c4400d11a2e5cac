"""Where the stages of a recipe stand in a model of a given depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from secateur.compiler.site import SITE_KINDS, Site
from secateur.runtime.errors import UserError

if TYPE_CHECKING:
    from secateur.compiler.recipe import Recipe, Stage


def drop_crowded(recipe: Recipe, layers: Mapping[str, int], running: Mapping[str, int]) -> Recipe:
    """The recipe without the stages for which a model of so many layers has no layer of their own.

    A method that watches several layers of a deep model watches fewer of a shallow one. Of pruning stages that fall
    on one layer the last, which leaves the fewest, stays where the recipe ``collapses``; else they move apart.
    """

    def place(stage: Stage) -> Site:
        site = stage.site
        if site.depth is None or site.layer is None:
            return site
        kind = site.kind.partition(".")[0]
        site = site.at_depth(layers.get(kind, 0))
        return Site(site.kind, min(site.layer or 0, running.get(kind, layers.get(kind, 0)) - 1))

    taken = {place(stage) for stage in recipe.stages if stage.select is not None}
    stages = []
    for index, stage in enumerate(recipe.stages):
        here = place(stage)
        later = (s for s in recipe.stages[index + 1 :] if s.select is not None)
        if recipe.collapses and stage.select is not None and any(place(s) == here for s in later):
            continue
        if stage.select is None and stage.site.depth is not None:
            if here in taken:
                continue
            taken.add(here)
        stages.append(stage)
    parts = tuple(replace(part, recipe=drop_crowded(part.recipe, layers, running)) for part in recipe.parts)
    return replace(recipe, stages=tuple(stages), parts=parts)


def place_sites(recipe: Recipe, layers: Mapping[str, int], running: Mapping[str, int] | None = None) -> list[Site]:
    """Sites with their layers in this model, strictly in the order a token meets them.

    Published layers that scale to the same one move apart: down as far as the last stages need, else up. ``running``
    is how many of the layers are used, where that is fewer: a published layer does not scale to one behind them.
    """
    used = {**layers, **(running or {})}
    sites: list[Site] = []
    order = (-1, -1)
    for index, stage in enumerate(recipe.stages):
        kind = stage.site.kind
        depth = layers.get(kind.partition(".")[0], 0)
        site = stage.site.at_depth(depth)
        if site.layer is not None and stage.site.depth is not None:
            later = sum(other.site.kind == kind for other in recipe.stages[index + 1 :])
            lowest = order[1] + 1 if order[0] == SITE_KINDS.index(kind) else 0
            depth = used.get(kind.partition(".")[0], 0)
            site = Site(kind, max(min(site.layer, depth - 1 - later), min(stage.site.layer or 0, 1), lowest))
            if (site.layer or 0) >= depth:
                raise UserError(
                    f"{depth} layers are too few for the stages at {kind}",
                    where=f"recipe {recipe.name}",
                    fix="use a deeper model, or a recipe file with fewer stages",
                )
        place = (SITE_KINDS.index(kind), site.layer or 0)
        if place <= order:
            raise UserError(
                f"stage {index} at {site} does not come after the stage before it",
                where=f"recipe {recipe.name}",
                fix="list stages in the order a token meets them, one per site",
            )
        order = place
        sites.append(site)
    return sites
