"""Recipes as data: which tokens go, where, by which score, and how many stay.

A :class:`Recipe` is a row of the paper table. ``plan_recipe.py`` turns it into plain numbers for one model depth, token
count and keep ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from secateur.compiler.schedule import Exponential
from secateur.compiler.site import Site
from secateur.runtime.errors import UserError

Scope = Literal["image", "window", "whole"]
Positions = Literal["original", "compact"]
Cache = Literal["ragged", "shrink"]
Evidence = Literal["authors' code", "paper", "reconstructed"]
Rounds = Literal["nearest", "down", "up", "removed down"]
"""What a share of the tokens is rounded to: the nearest whole number (halves up), the one below (1 rather than none
where 1 is the nearest) or above it, or so that the number the stage removes is rounded down."""


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
    ``rounds`` says which whole number of tokens that is: "removed down" is for authors who remove ``N // 2``.
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
    rounds: Rounds = "nearest"

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
