"""Where the stages of a recipe stand in a model of a given depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from secateur.compiler.site import SITE_KINDS, Site
from secateur.runtime.errors import UserError

if TYPE_CHECKING:
    from secateur.compiler.recipe import Recipe


def place_sites(recipe: Recipe, layers: Mapping[str, int]) -> list[Site]:
    """Sites with their layers in this model, strictly in the order a token meets them.

    Published layers that scale to the same one move apart: down as far as the last stages need, else up.
    """
    sites: list[Site] = []
    order = (-1, -1)
    for index, stage in enumerate(recipe.stages):
        kind = stage.site.kind
        depth = layers.get(kind.partition(".")[0], 0)
        site = stage.site.at_depth(depth)
        if site.layer is not None and stage.site.depth is not None:
            later = sum(other.site.kind == kind for other in recipe.stages[index + 1 :])
            lowest = order[1] + 1 if order[0] == SITE_KINDS.index(kind) else 0
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
