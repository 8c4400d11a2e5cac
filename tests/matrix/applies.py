"""Which rows of the table apply to which towers, and why the others do not."""

from __future__ import annotations

from typing import NamedTuple

from secateur.compiler.recipe import Recipe
from secateur.passes.needs import needs_sound
from secateur.passes.signals import NEED_CLS
from secateur.passes.vocabulary import bind_stage


class Tower(NamedTuple):
    """What a layout's tower has: a CLS token; ``merges``: several patches become one token behind it; ``projected``:
    they do so in the projector or behind it; ``read_last``: the projector reads its last layer, so that there is none
    behind it to score with; ``linear``: the projector is; ``tiles``: it sees an image in tiles, whose tokens are put
    together without padding behind the projector; ``hears``: a tower for sound stands beside it."""

    has_cls: bool
    merges: bool = False
    projected: bool = False
    read_last: bool = False
    linear: bool = False
    tiles: bool = False
    hears: bool = False


def lacks(recipe: Recipe, tower: Tower) -> str | None:
    """Why a row does not apply to a layout; None where it does."""
    if needs_sound(recipe) and not tower.hears:
        return "it compares what is seen with what is heard, and nothing is heard"
    if tower.merges and any(stage.site.kind == "vision.layer" for stage in recipe.stages):
        return "its stages stand between layers of the tower, behind which patches are put together"
    if tower.tiles and any(stage.site.kind == "vision.layer" for stage in recipe.stages):
        return "its stages stand between layers of the tower, which sees the tiles of an image one by one"
    bound = [(stage, bind_stage(stage, where=recipe.name, weights=False)) for stage in recipe.stages]
    for stage, words in bound:
        gridded = any("grid" in term.every_reserved() for term in words.terms)
        if tower.tiles and gridded:
            return "it needs the whole grid of patches, and an image in tiles has several"
        if tower.hears and stage.site.kind == "decoder.layer" and gridded:
            return "it needs the whole grid of patches in the decoder, where sound lies between them"
        if tower.hears and stage.site.kind == "decoder.layer" and stage.prunes and stage.scope == "image":
            return "it prunes image by image in the decoder, where sound lies between them"
    scored = {stage.site.kind: words for stage, words in reversed(bound) if stage.score}
    first = scored.pop("decoder.layer", None)
    if tower.hears and first is not None and "carried" in first.signals and scored and "audio.out" not in scored:
        return "its first score in the decoder is that of the tokens seen, and those heard have none"
    nexts = [s for stage in recipe.stages for s, o in stage.signals.items() if o.get("layer") == "next"]
    if tower.has_cls and tower.read_last and nexts:
        return f"{nexts[0]} is that of the layer behind the one the projector reads, which is the last"
    for signal in (signal for _, words in bound for signal in words.signals):
        if signal == "probe_slopes" and tower.linear:
            return "probe_slopes are the same for every token behind a linear projector"
        if signal == "probe_slopes" and tower.projected:
            return "probe_slopes need a row before the projector for every token, and it puts patches together"
        if signal in NEED_CLS and not tower.has_cls:
            return f"{signal} needs a CLS token"
    return None
