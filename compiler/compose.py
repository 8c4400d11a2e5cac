"""Stages of different papers, one behind the other, as one recipe."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from secateur.compiler.recipe import Cache, Part, Positions, Recipe
from secateur.compiler.site import SITE_KINDS, Site
from secateur.runtime.errors import UserError


def compose(name: str, parts: Sequence[Part]) -> Recipe:
    """The parts' stages in their order; ``name`` is what the user wrote.

    Raises UserError, in one line that names the parts, where they do not fit: a part that would have to act before
    the one in front of it, two stages at one place, a stage after all tokens are gone, two ways of numbering
    survivors on the same side of the decoder's entry, two cache policies inside it. Whether lengths, scopes and
    signals fit is known once the recipe is planned for a model.
    """
    where = f"--recipe {name}"
    for part in parts:
        if not part.recipe.stages:
            raise UserError(f"{part.recipe.name} has no stage to stack", where=where, fix="leave it out")
        if part.recipe.parts:
            raise UserError(f"{part.recipe.name} is composed already", where=where, fix="list its parts instead")
        if not 0.0 < part.keep <= 1.0:
            raise UserError(
                f"keep={part.keep:g} of {part.recipe.name} is out of (0, 1]",
                where=where,
                fix="it is the fraction of the tokens entering this part that it leaves",
            )
    for before, after in pairwise(parts):
        _check_order(before.recipe, after.recipe, where)
    rows = [part.recipe for part in parts]
    return Recipe(
        name=name,
        title=" + ".join(row.title or row.name for row in rows),
        link=" ".join(dict.fromkeys(row.link for row in rows if row.link)),
        stages=tuple(stage for row in rows for stage in row.stages),
        positions=_check_positions(rows, where),
        cache=_check_caches(rows, where),
        evidence="reconstructed",
        notes=" ".join(f"{row.name}: {row.notes}" for row in rows if row.notes),
        identity_at_one=all(row.identity_at_one for row in rows),
        parts=tuple(parts),
    )


def _check_order(before: Recipe, after: Recipe, where: str) -> None:
    last, first = before.stages[-1], after.stages[0]
    if last.select is not None and not last.prunes:
        raise UserError(f"{before.name} leaves no token for {after.name}", where=where, fix=f"put {before.name} last")
    if last.site == first.site:
        raise UserError(
            f"{before.name} and {after.name} both have a stage at {last.site}", where=where, fix="one stage per site"
        )
    if _comes_after(last.site, first.site):
        raise UserError(
            f"{after.name} acts at {first.site}, before {before.name} at {last.site}",
            where=where,
            fix="list parts in the order a token meets them",
        )


def _comes_after(one: Site, other: Site) -> bool:
    """Whether ``one`` stands behind ``other`` in a model of any depth; layers given in two ways are the plan's."""
    if one.kind != other.kind:
        return SITE_KINDS.index(one.kind) > SITE_KINDS.index(other.kind)
    if one.layer is None or other.layer is None or (one.depth is None) != (other.depth is None):
        return False
    return one.layer * (other.depth or 1) > other.layer * (one.depth or 1)


def _check_positions(rows: Sequence[Recipe], where: str) -> Positions:
    """The numbering inside the decoder, or before it where no part reaches the decoder."""
    chosen: dict[bool, Recipe] = {}
    for row in rows:
        for inside in {stage.site.kind == "decoder.layer" for stage in row.stages if stage.select}:
            other = chosen.setdefault(inside, row)
            if other.positions != row.positions:
                raise UserError(
                    f"{other.name} numbers survivors {other.positions!r}, {row.name} {row.positions!r}, both "
                    f"{'inside' if inside else 'before'} the decoder",
                    where=where,
                    fix="stack parts that agree, or write a recipe file",
                )
    return (chosen.get(True) or chosen.get(False) or rows[-1]).positions


def _check_caches(rows: Sequence[Recipe], where: str) -> Cache:
    """What becomes of the caches, as the parts with stages behind a layer of the decoder say."""
    inside = [row for row in rows if any(s.select and s.site.behind_a_layer for s in row.stages)]
    for one, other in pairwise(inside):
        if one.cache != other.cache:
            raise UserError(
                f"{one.name} has cache {one.cache!r}, {other.name} {other.cache!r}, both inside the decoder",
                where=where,
                fix="stack parts that agree, or write a recipe file",
            )
    return inside[0].cache if inside else "ragged"
