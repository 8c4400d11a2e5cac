"""A recipe with its numbers: layers and token counts for one model, token count and keep ratio, no choices left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from secateur.compiler.layout import Grid, Layout
from secateur.compiler.media import MediaLayout
from secateur.compiler.place_sites import drop_crowded, place_sites
from secateur.compiler.recipe import Part, Positions, Recipe, Scope, Stage, Term
from secateur.compiler.site import Site
from secateur.runtime.errors import UserError

Gridless = Literal["pruned", "sizes", "sound", "tiles"]
"""Tokens form no grid: an earlier stage removed some, images have several sizes, sound lies between them, or they are
those of tiles."""


_NOISE = 1e-9
"""Shares are fractions in binary: one that means a whole number may lie so much beside it."""


class Tokens(Protocol):
    """How many tokens a tower makes: ``frames`` grids of ``tokens_per_image``."""

    @property
    def frames(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def tokens_per_image(self) -> int: ...


class NothingLeftError(UserError):
    """A keep ratio so small that a stage would be left without a token."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its numbers: ``length_in`` tokens per row come in, ``length_out`` go on.

    Both are per *group*: an image, a window of images or the row, as the scope says.
    """

    index: int
    site: Site
    score: Term | None
    select: Term | None
    merge: Term | None
    scope: Scope
    positions: Positions
    signals: Mapping[str, Mapping[str, Any]]
    groups: int
    length_in: int
    length_out: int
    grid: Grid | None = None
    """How the tokens lie; None where that is not known, or is no grid."""
    layout: Layout | None = None
    """Moment and kind of the tokens that enter the stage's program; None where a stage was planned without them."""
    part: int = 0
    """Which part of a composed recipe it belongs to. What a stage carries on stays within its part."""
    gridless: Gridless | None = None
    """Why there is no grid, where it is known why."""

    @property
    def name(self) -> str:
        return f"stage{self.index}"

    @property
    def observes(self) -> bool:
        """Whether the stage only scores and leaves every token as it is."""
        return self.select is None

    def __str__(self) -> str:
        terms = " ".join(
            f"{role}={term}"
            for role, term in (("score", self.score), ("select", self.select), ("merge", self.merge))
            if term is not None
        )
        return (
            f"{self.name} {self.site} {terms}{_show_signals(self.signals)} "
            f"scope={self.scope} positions={self.positions} "
            f"tokens={self.groups}x{self.length_in}->{self.groups}x{self.length_out}"
        )


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe for one model and geometry: what the pruning pass inserts."""

    recipe: Recipe
    keep: float
    stages: tuple[PlannedStage, ...]
    sizes: tuple[PlannedRecipe, ...] = ()
    """Where images are of several sizes: what is planned before the decoder for the images of each."""

    def __str__(self) -> str:
        # Named only where it is not the usual one: the digests of all other plans stay what they were.
        cache = "" if self.recipe.cache == "ragged" else f" cache={self.recipe.cache}"
        lines = [f"recipe {self.recipe.name} keep={self.keep:g}{cache}"]
        return "\n".join(lines + [f"  {stage}" for stage in self.stages])


def plan_recipe(
    recipe: Recipe,
    *,
    keep: float | None,
    images: int,
    tokens_per_image: int,
    vision_layers: int,
    decoder_layers: int,
    grid: tuple[int, int] | None = None,
    vision_running: int | None = None,
    media: MediaLayout | None = None,
    audio: Tokens | None = None,
    tiles: tuple[int, int] | None = None,
    sizes: Sequence[Tokens] = (),
    size_of: Sequence[int] = (),
    has_cls: bool = True,
    before_decoder: bool = False,
) -> PlannedRecipe:
    """Fix layers and token counts.

    ``keep`` is the fraction of the prunable tokens left after the last stage that leaves any. With published shares
    ``p_i`` stage i leaves ``keep ** (ln p_i / ln p_last)`` of them: the published values when ``keep`` is
    ``p_last``, all tokens when ``keep`` is 1, and never more than the stage before; a recipe that ``collapses`` scales
    what each stage removes instead. In a composed recipe the same holds inside each part, for the tokens that enter it.
    Raises NothingLeftError where that rounds to no token. ``grid`` is an image's rows and columns of tokens,
    ``vision_running`` the number of tower layers the projector needs, where it is not all of them. ``media`` says how
    the tokens of several media lie, ``audio`` which of them are heard: those reach the decoder as they are, beside
    what the stages before it leave of what is seen. ``tiles`` is (images, tokens of one) where the ``images`` of the
    tower are tiles, which nothing behind the tower's layers tells apart. Where images are of several ``sizes``,
    ``size_of`` every image, ``images`` is 1 and ``tokens_per_image`` counts the tokens of all; stages before the
    decoder then are those planned for each size. ``has_cls`` says whether the tower's row opens with a CLS token.
    ``before_decoder`` leaves the decoder's out.
    """
    keep = recipe.default_keep if keep is None else keep
    if audio is None:
        recipe = recipe.without_sound()
    if not 0.0 < keep <= 1.0:
        raise UserError(
            f"keep ratio {keep:g} is out of (0, 1]",
            where="--keep",
            fix="1 keeps every visual token, 0.25 a quarter of them",
        )
    planned = tuple(
        plan_recipe(
            recipe, keep=keep, images=size.frames, tokens_per_image=size.tokens_per_image, vision_layers=vision_layers,
            decoder_layers=decoder_layers, grid=size.grid, vision_running=vision_running, audio=audio,
            has_cls=has_cls, before_decoder=True,
        )
        for size in sizes
    )  # fmt: skip
    counts = [sizes[size].tokens_per_image for size in size_of]
    layers = {"vision": vision_layers, "decoder": decoder_layers}
    running = {"vision": vision_running or vision_layers}
    recipe = drop_crowded(recipe, layers, running)
    sites = place_sites(recipe, layers, running)
    stages: list[PlannedStage] = []
    groups, length = images, tokens_per_image
    gridless: Gridless | None = "sizes" if sizes else None
    index, reaching = 0, tokens_per_image  # tokens of an image that reach the decoder
    heard = audio.frames * audio.tokens_per_image if audio is not None else 0
    for number, part in enumerate(_scale_parts(recipe, keep)):
        entered = groups * length
        fractions = _fractions(part, sites[index : index + len(part.recipe.stages)], decoder_layers)
        before = 1.0
        for stage, fraction in zip(part.recipe.stages, fractions, strict=True):
            site = sites[index]
            if site.kind == "audio.out":
                assert audio is not None, "stages for sound are planned where there is sound"
                stages.append(_plan_sound(recipe, index, stage, audio, part.recipe.positions, number))
                index += 1
                continue
            inside = site.kind.startswith("decoder")
            if inside and before_decoder:
                return PlannedRecipe(recipe, keep, tuple(stages))
            if sizes or before_decoder:
                _check_scope(recipe, index, site)
            if heard and site.kind == "decoder.layer":
                # From here on what is seen and what is heard is one row of tokens.
                groups, length, images, gridless = 1, groups * length + heard, 1, "sound"
                entered, heard = entered + heard, 0
                before = length / entered
                if stage.scope != "whole":
                    raise UserError(
                        f"stage {index} has scope {stage.scope!r}, but sound lies beside or between the images",
                        where=f"recipe {recipe.name}",
                        fix="use scope 'whole' in the decoder, or compile without sound",
                    )
            if tiles is not None:
                if site.kind == "vision.layer":
                    raise UserError(
                        f"no stage can stand at {site}: the tower sees the tiles of an image one by one, with padding "
                        "at their edges, and how many tokens of each would be left is not known before it runs",
                        where=f"recipe {recipe.name}",
                        fix="use a recipe whose stages stand at vision.out, projector.out or decoder.layer[k], such as "
                        "visionzip, divprune or fastv",
                    )
                (images, length), gridless = tiles, "tiles"
                groups, entered, reaching, tiles = images, images * length, length, None
                tokens_per_image = length
            groups, length = _regroup(recipe, index, site, groups, length, images)
            count = _count_left(recipe, index, (before, fraction), entered // groups, length)
            before = fraction if stage.select is not None else before
            if sizes and not inside:
                counts = [planned[size].stages[len(stages)].length_out for size in size_of]
                count = sum(counts)
            layout = Layout.of_images(images // groups, reaching if inside else tokens_per_image)
            if inside and media is not None and groups == 1:
                layout = media.layout_of(counts) if sizes else media.layout_after(tokens_per_image, reaching)
            reaching = reaching if inside else count
            shape = Grid(images // groups, *grid) if grid is not None and gridless is None else None
            stages.append(
                PlannedStage(
                    index, site, stage.score, _settle_side(stage.select, has_cls), stage.merge, stage.scope,
                    part.recipe.positions, stage.signals, groups, length, count, shape, layout, number, gridless,
                )
            )  # fmt: skip
            if count < length or stage.merge is not None:
                gridless = gridless or "pruned"
            length, index = count, index + 1
    return PlannedRecipe(recipe, keep, tuple(stages), planned)


def _check_scope(recipe: Recipe, index: int, site: Site) -> None:
    """Raise UserError where a stage shares a budget among some of the images, and these are of several sizes."""
    scope, wanted = recipe.stages[index].scope, "whole" if site.kind == "decoder.layer" else "image"
    if scope != wanted:
        raise UserError(
            f"stage {index} has scope {scope!r} at {site}, but the images have different numbers of tokens",
            where=f"recipe {recipe.name}",
            fix=f"use scope {wanted!r} there, or compile for images of one size",
        )


def _plan_sound(
    recipe: Recipe, index: int, stage: Stage, audio: Tokens, positions: Positions, part: int
) -> PlannedStage:
    """A stage behind the audio tower: it scores, for stages in the decoder to choose by."""
    if stage.select is not None:
        raise UserError(
            f"stage {index} would choose at audio.out",
            where=f"recipe {recipe.name}",
            fix="leave select out: score there, and choose at decoder.layer[0], where what is seen and heard meets",
        )
    count = audio.tokens_per_image
    return PlannedStage(
        index, stage.site, stage.score, None, stage.merge, stage.scope, positions, stage.signals,
        audio.frames, count, count, Grid(1, *audio.grid), Layout.of_images(1, count), part,
    )  # fmt: skip


def _scale_parts(recipe: Recipe, keep: float) -> list[Part]:
    """The parts with the keep ratios that multiply to ``keep``, in the proportions (of logarithms) of their own."""
    if not recipe.parts:
        return [Part(recipe, keep)]
    whole = recipe.default_keep
    if keep == whole:
        return list(recipe.parts)
    pruning = sum(part.recipe.prunes for part in recipe.parts)
    even = keep ** (1 / pruning) if pruning else 1.0
    power = math.log(keep) / math.log(whole) if whole < 1.0 else 0.0
    return [Part(part.recipe, part.keep**power if whole < 1.0 else even) for part in recipe.parts]


def _fractions(part: Part, sites: list[Site], decoder_layers: int) -> list[float]:
    """For every stage of a part, the fraction of the tokens that entered the part it leaves."""
    recipe = part.recipe
    if recipe.schedule is None:
        scale = _linear_share if recipe.collapses else _stage_share
        return [scale(part.keep, stage.share, recipe.default_keep) for stage in recipe.stages]
    inside = [stage.prunes and site.behind_a_layer for stage, site in zip(recipe.stages, sites, strict=True)]
    layers = [site.layer or 0 for site, prunes in zip(sites, inside, strict=True) if prunes]
    leaves_none = bool(recipe.stages[-1].select) and not recipe.stages[-1].prunes
    end = (sites[-1].layer or 0) if leaves_none else decoder_layers
    enter, shares = recipe.schedule.shares(part.keep, layers, decoder_layers, end, f"recipe {recipe.name}")
    left = iter(shares)
    return [next(left) if prunes else enter for prunes in inside]


def _regroup(recipe: Recipe, index: int, site: Site, groups: int, length: int, images: int) -> tuple[int, int]:
    """Groups and tokens per group a stage works on; raises UserError where its scope does not fit."""
    stage = recipe.stages[index]
    where = f"recipe {recipe.name}"
    if stage.scope == "window" and (stage.window < 1 or images % stage.window):
        raise UserError(
            f"stage {index} has windows of {stage.window} images, which do not divide the {images} of a row",
            where=where,
            fix="compile for a multiple of the window with --images",
        )
    wanted = {"image": images, "window": images // stage.window, "whole": 1}[stage.scope]
    if groups < wanted:
        raise UserError(
            f"stage {index} has scope {stage.scope!r}, but the stage before left a different number of tokens per "
            f"{stage.scope}",
            where=where,
            fix="use scope 'whole' from the first stage with it on",
        )
    if wanted < groups and not site.kind.startswith("decoder"):
        raise UserError(
            f"scope {stage.scope!r} at {site} would leave a different number of tokens per image",
            where=where,
            fix="use scope 'image', or a decoder.layer[k] site",
        )
    return wanted, length * groups // wanted


def _settle_side(select: Term | None, has_cls: bool) -> Term | None:
    """A pairing selector that takes the side of the tower's row: tokens at odd places where CLS is in front of them."""
    if select is None or select.options.get("sources") != "tower":
        return select
    return replace(select, options={**select.options, "sources": "odd" if has_cls else "even"})


def _count_left(recipe: Recipe, index: int, fractions: tuple[float, float], total: int, length: int) -> int:
    """Tokens left per group by a stage that receives ``length``. ``fractions`` of the ``total`` that entered its part
    are what the stage before it and it itself leave."""
    stage, (before, fraction) = recipe.stages[index], fractions
    if stage.select is None:
        return length
    if stage.count is not None:
        if not 1 <= stage.count <= length:
            raise UserError(
                f"stage {index} keeps {stage.count} tokens of {length}",
                where=f"recipe {recipe.name}",
                fix=f"give a count from 1 to {length}",
            )
        return stage.count
    if stage.share == 0.0:
        return 0
    exact = fraction * total
    nearest = math.floor(exact + 0.5)
    count = {
        "nearest": nearest,
        "down": max(math.floor(exact + _NOISE), min(nearest, 1)),
        "up": math.ceil(exact - _NOISE),
        "removed down": length - math.floor((before - fraction) * total + _NOISE),
    }[stage.rounds]
    if count < 1:
        raise NothingLeftError(
            f"stage {index} would leave {exact:.2g} of {total} tokens",
            where=f"recipe {recipe.name}",
            fix="keep more with --keep" if recipe.parts else f"the smallest --keep is {_least_keep(total):g}",
        )
    return min(count, length)


def _least_keep(total: int) -> float:
    """The smallest ratio of four digits that rounds to one token of ``total``."""
    digits = 10 ** (3 - math.floor(math.log10(0.5 / total)))
    return math.ceil(0.5 / total * digits) / digits


def _stage_share(keep: float, published: float, published_last: float) -> float:
    if keep == published_last or not published:
        return published
    if published_last >= 1.0:
        return keep
    return float(keep ** (math.log(published) / math.log(published_last)))


def _linear_share(keep: float, published: float, published_last: float) -> float:
    """What a schedule that runs through all layers leaves: each of its steps takes its part of all that goes."""
    if published_last >= 1.0:
        return keep
    return 1.0 - (1.0 - published) * (1.0 - keep) / (1.0 - published_last)


def _show_signals(signals: Mapping[str, Mapping[str, Any]]) -> str:
    shown = [f"{name}.{key}={value}" for name in sorted(signals) for key, value in sorted(signals[name].items())]
    return f" signals={','.join(shown)}" if shown else ""
