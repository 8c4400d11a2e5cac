"""Recipes as data: which tokens go, where, by which score, and how many stay.

A :class:`Recipe` is a row of the paper table. :func:`plan_recipe` turns it into a
:class:`PlannedRecipe` for one model depth, token count and keep ratio: plain numbers, no choices left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from secateur.compiler.layout import Grid as Grid
from secateur.compiler.layout import Layout as Layout
from secateur.compiler.media import MediaLayout
from secateur.compiler.place_sites import drop_crowded, place_sites
from secateur.compiler.schedule import Exponential
from secateur.compiler.site import SITE_KINDS as SITE_KINDS
from secateur.compiler.site import Site
from secateur.runtime.errors import UserError

Scope = Literal["image", "window", "whole"]
Positions = Literal["original", "compact"]
Cache = Literal["ragged", "shrink"]
Evidence = Literal["authors' code", "paper", "reconstructed"]


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
class Term:
    """A function of the vocabulary by name, with its options: one score, selector or merge.

    ``of`` holds the scores a score is made from: a product or sum of several, or a calibration of one.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    of: tuple[Term, ...] = ()

    def __str__(self) -> str:
        inner = [str(term) for term in self.of] + [f"{k}={self.options[k]!r}" for k in sorted(self.options)]
        return f"{self.name}({', '.join(inner)})"


@dataclass(frozen=True)
class Setting:
    """A setting a paper published: the model it is for, the keep ratio, and what the paper calls it."""

    model: str
    keep: float
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """One reduction: a site, the functions that choose, and the published share of tokens left.

    ``share`` is the fraction of the *original* prunable tokens left after this stage in the paper's
    setting; it fixes the proportions between stages, see :func:`plan_recipe`. 0 removes all of them.
    ``count`` instead is an exact number of tokens per group, whatever the keep ratio.
    A stage without ``select`` removes nothing: it scores, for later stages that ask for ``carried``.
    ``window`` is the number of images (frames) that share one budget when the scope is "window".
    ``signals`` holds the options of signals, by signal name.
    """

    site: Site
    select: Term | None
    score: Term | None = None
    merge: Term | None = None
    share: float = 0.5
    scope: Scope = "image"
    window: int = 1
    count: int | None = None
    signals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def prunes(self) -> bool:
        """Whether the stage leaves a part of the tokens: neither all (it only scores) nor none."""
        return self.select is not None and (self.count is not None or self.share > 0)


@dataclass(frozen=True)
class Recipe:
    """A published method as a row of data."""

    name: str
    title: str
    link: str
    stages: tuple[Stage, ...]
    positions: Positions = "original"
    cache: Cache = "ragged"
    """What a stage inside the decoder does to the caches of the layers before it: nothing ("ragged": every layer keeps
    the rows it saw), or it takes the same rows out of them ("shrink": all layers keep what the last stage leaves)."""
    evidence: Evidence = "authors' code"
    notes: str = ""
    identity_at_one: bool = True
    """Whether keep-ratio 1.0 leaves the model's output unchanged (false for rows that always merge, and for those
    that drop everything in late layers)."""
    settings: tuple[Setting, ...] = ()
    collapses: bool = False
    """Whether the stages are points of a schedule that runs through all layers: in a shallower model those that fall
    on one layer become one."""
    schedule: Exponential | None = None
    """How the stages share a budget, if not in the proportions of their published shares."""
    parts: tuple[Part, ...] = ()
    """Of a composed recipe (:func:`secateur.compiler.compose.compose`): what it is stacked from."""

    def __post_init__(self) -> None:
        if self.parts:
            return  # each part checked its own shares, which are fractions of what enters the part
        if self.schedule is not None:
            self._check_schedule(self.schedule)
        if self.cache == "shrink":
            self._check_shrinks()
        before = 1.0
        for index, stage in enumerate(self.stages):
            where = f"recipe {self.name}: stages[{index}].share"
            if stage.select is None or stage.count is not None:
                continue
            if not 0.0 <= stage.share <= 1.0:
                raise UserError(f"share {stage.share:g} is out of [0, 1]", where=where)
            if before == 0.0:
                raise UserError(
                    "no token is left for this stage", where=where, fix="a stage of share 0 must be the last"
                )
            if stage.share > before:
                raise UserError(
                    f"share {stage.share:g} is more than the {before:g} the stage before leaves",
                    where=where,
                    fix="a share is a fraction of the original tokens, so it cannot grow",
                )
            before = stage.share

    @property
    def default_keep(self) -> float:
        """The published fraction of tokens left after the last stage that leaves any."""
        if self.parts:
            return math.prod(part.keep for part in self.parts)
        shares = [stage.share for stage in self.stages if stage.prunes]
        return shares[-1] if shares else 1.0

    @property
    def rates(self) -> tuple[float, float] | None:
        """The means over layers that the published setting aims at, of what is seen and of what is heard; None for a
        recipe that does not tell them apart."""
        told = [term.options["rates"] for term in self._terms() if "rates" in term.options]
        return tuple(told[0]) if told else None

    def with_rates(self, rates: tuple[float, float]) -> Recipe:
        """The recipe with other means for what is seen and heard. Raises UserError where it does not tell them
        apart."""
        if self.rates is None:
            raise UserError(
                "the recipe does not tell what is seen from what is heard", where=f"recipe {self.name}",
                fix="give --mean-keep one number, or choose a recipe with rates, such as seats",
            )  # fmt: skip

        def change(term: Term | None) -> Term | None:
            if term is None:
                return None
            options = {**term.options, "rates": list(rates)} if "rates" in term.options else term.options
            return Term(term.name, options, tuple(t for t in map(change, term.of) if t is not None))

        stages = tuple(
            replace(s, score=change(s.score), select=change(s.select), merge=change(s.merge)) for s in self.stages
        )
        parts = tuple(
            replace(p, recipe=p.recipe.with_rates(rates)) if p.recipe.rates is not None else p for p in self.parts
        )
        return replace(self, stages=stages, parts=parts)

    def without_sound(self) -> Recipe:
        """The recipe without the stages that stand behind a tower for sound."""
        stages = tuple(stage for stage in self.stages if stage.site.kind != "audio.out")
        parts = tuple(replace(part, recipe=part.recipe.without_sound()) for part in self.parts)
        return replace(self, stages=stages, parts=parts)

    def _terms(self) -> list[Term]:
        found: list[Term] = []
        waiting = [t for s in self.stages for t in (s.score, s.select, s.merge) if t is not None]
        while waiting:
            found.append(waiting.pop(0))
            waiting += found[-1].of
        return found

    @property
    def prunes(self) -> bool:
        """Whether any stage does."""
        return any(stage.prunes for stage in self.stages)

    def _check_shrinks(self) -> None:
        for index, stage in enumerate(self.stages):
            if stage.merge is not None and stage.site.behind_a_layer:
                raise UserError(
                    f"merge {stage.merge.name!r} mixes hidden rows, but the keys and values that the layers before "
                    f"{stage.site} made of them cannot be mixed alike",
                    where=f"recipe {self.name}: stages[{index}].merge",
                    fix="use cache 'ragged', or merge at decoder.layer[0] or before",
                )

    def _check_schedule(self, schedule: Exponential) -> None:
        where = f"recipe {self.name}: schedule"
        outside = [stage.site for stage in self.stages if stage.prunes and not stage.site.behind_a_layer]
        if len(outside) != (schedule.entry is not None):
            raise UserError(
                f"{len(outside)} stages prune before the decoder",
                where=where,
                fix="give entry for exactly one of them, and no entry for none",
            )
        if not any(stage.prunes and stage.site.behind_a_layer for stage in self.stages):
            raise UserError("no stage prunes inside the decoder", where=where, fix="leave the schedule out")


@dataclass(frozen=True)
class Part:
    """A recipe inside a composed one. ``keep`` is the fraction of the tokens *entering the part* that are left after
    its last stage that leaves any."""

    recipe: Recipe
    keep: float


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
    """How the tokens lie, as long as no earlier stage removed any."""
    layout: Layout | None = None
    """Moment and kind of the tokens that enter the stage's program; None where a stage was planned without them."""
    part: int = 0
    """Which part of a composed recipe it belongs to. What a stage carries on stays within its part."""

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
    tower are tiles, which nothing behind the tower's layers tells apart.
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
    layers = {"vision": vision_layers, "decoder": decoder_layers}
    running = {"vision": vision_running or vision_layers}
    recipe = drop_crowded(recipe, layers, running)
    sites = place_sites(recipe, layers, running)
    stages: list[PlannedStage] = []
    groups, length, whole = images, tokens_per_image, True
    index, reaching = 0, tokens_per_image  # tokens of an image that reach the decoder
    heard = audio.frames * audio.tokens_per_image if audio is not None else 0
    for number, part in enumerate(_scale_parts(recipe, keep)):
        entered = groups * length
        fractions = _fractions(part, sites[index : index + len(part.recipe.stages)], decoder_layers)
        for stage, fraction in zip(part.recipe.stages, fractions, strict=True):
            site = sites[index]
            if site.kind == "audio.out":
                assert audio is not None, "stages for sound are planned where there is sound"
                stages.append(_plan_sound(recipe, index, stage, audio, part.recipe.positions, number))
                index += 1
                continue
            if heard and site.kind == "decoder.layer":
                # From here on what is seen and what is heard is one row of tokens.
                groups, length, images, whole = 1, groups * length + heard, 1, False
                entered, heard = entered + heard, 0
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
                (images, length), whole = tiles, False
                groups, entered, reaching, tiles = images, images * length, length, None
                tokens_per_image = length
            groups, length = _regroup(recipe, index, site, groups, length, images)
            count = _count_left(recipe, index, fraction, entered // groups, length)
            inside = site.kind.startswith("decoder")
            layout = Layout.of_images(images // groups, reaching if inside else tokens_per_image)
            if inside and media is not None and groups == 1:
                layout = media.layout_after(tokens_per_image, reaching)
            reaching = reaching if inside else count
            shape = Grid(images // groups, *grid) if grid is not None and whole else None
            stages.append(
                PlannedStage(
                    index, site, stage.score, stage.select, stage.merge, stage.scope, part.recipe.positions,
                    stage.signals, groups, length, count, shape, layout, number,
                )
            )  # fmt: skip
            whole = whole and count == length and stage.merge is None
            length, index = count, index + 1
    return PlannedRecipe(recipe, keep, tuple(stages))


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


def _count_left(recipe: Recipe, index: int, fraction: float, total: int, length: int) -> int:
    """Tokens left per group by a stage that receives ``length``: a fraction of the ``total`` that entered its part."""
    stage = recipe.stages[index]
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
    count = math.floor(fraction * total + 0.5)
    if count < 1:
        raise NothingLeftError(
            f"stage {index} would leave {fraction * total:.2g} of {total} tokens",
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
