"""Budgets other than the keep ratio: the keep ratio that meets a mean over layers, or a share of the FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.compiler.plan_recipe import NothingLeftError, PlannedRecipe
from secateur.runtime.errors import UserError

Measure = Callable[[PlannedRecipe], float]
_DIGITS = 4


@dataclass(frozen=True)
class Budget:
    """What was asked for; at most one is given, none means the published keep ratio.

    ``keep`` is the fraction of the prunable tokens left after the last stage that leaves any, ``mean_keep`` their mean
    over the decoder's layers, ``flops_keep`` the fraction of the unpruned prefill's FLOPs. ``mean_keep`` may be a pair,
    of what is seen and of what is heard: ``rates`` then holds it, and ``mean_keep`` is None until the tokens of both
    are counted (:meth:`weigh`).
    """

    keep: float | None = None
    mean_keep: float | None = None
    flops_keep: float | None = None
    rates: tuple[float, float] | None = None

    @classmethod
    def of(cls, keep: float | None, mean_keep: float | tuple[float, float] | None, flops_keep: float | None) -> Budget:
        """From what a user gave: ``mean_keep`` one number or a pair."""
        if isinstance(mean_keep, tuple):
            return cls(keep, None, flops_keep, mean_keep)
        return cls(keep, mean_keep, flops_keep)

    def weigh(self, seen: int, heard: int) -> Budget:
        """The same with one mean over ``seen`` and ``heard`` tokens in place of the pair."""
        if self.rates is None:
            return self
        mean = (self.rates[0] * seen + self.rates[1] * heard) / (seen + heard)
        return replace(self, mean_keep=mean, rates=None)

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None and name != "rates"}
        for value in self.rates or ():
            if not 0.0 < value <= 1.0:
                raise UserError(f"{value:g} is out of (0, 1]", where="--mean-keep")
        if self.rates is not None:
            given["mean_keep"] = self.rates[0]
        if len(given) > 1:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{names} are given together", fix="each of them alone fixes how many tokens are left")
        for name, value in given.items():
            if name != "keep" and not 0.0 < value <= 1.0:
                raise UserError(f"{value:g} is out of (0, 1]", where=f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class PrefillCost:
    """FLOPs of one row's prefill, counted as :mod:`secateur.compiler.flops` counts them, the stages' own left out.

    ``per_token`` are a layer's linear maps, ``per_pair`` its causal attention, ``head`` the logits of one token;
    ``fixed`` counts the slots beside the visual tokens.
    """

    per_token: int
    per_pair: int
    head: int
    fixed: int

    @classmethod
    def of(cls, text: Any, fixed: int) -> PrefillCost:
        """From a decoder's configuration: gated MLP, grouped keys."""
        width, heads = text.hidden_size, text.num_attention_heads
        size = getattr(text, "head_dim", None) or width // heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        linear = 2 * width * heads * size + 2 * width * keys * size + 3 * width * text.intermediate_size
        return cls(2 * linear, 2 * heads * size, 2 * width * text.vocab_size, fixed)

    def flops(self, visual: Sequence[int]) -> int:
        """``visual`` holds the visual tokens of each layer."""
        lengths = [count + self.fixed for count in visual]
        return self.head + sum(self.per_token * n + self.per_pair * n * n for n in lengths)


def visual_lengths(plan: PlannedRecipe, tokens: int, layers: int) -> list[int]:
    """Prunable tokens of a row at each decoder layer, of the ``tokens`` it has unpruned."""
    found = [tokens] * layers
    for stage in plan.stages:
        if not stage.observes:
            first = (stage.site.layer or 0) if stage.site.kind == "decoder.layer" else 0
            removed = stage.groups * (stage.length_in - stage.length_out)
            found[first:] = [found[first] - removed] * (layers - first)
    return found


def solve_budget(
    budget: Budget, plan_at: Callable[[float], PlannedRecipe], tokens: int, layers: int, cost: PrefillCost
) -> float | None:
    """The keep ratio that meets ``budget`` best; None if it asks for nothing.

    ``plan_at`` plans the recipe at a keep ratio. The FLOPs are an estimate without the stages' own. Raises UserError
    with the range that can be reached where the target lies outside it.
    """
    if budget.mean_keep is not None:
        target, where = budget.mean_keep, "--mean-keep"

        def measure(plan: PlannedRecipe) -> float:
            return sum(visual_lengths(plan, tokens, layers)) / (tokens * layers)

    elif budget.flops_keep is not None:
        target, where = budget.flops_keep, "--flops-keep"
        whole = cost.flops([tokens] * layers)

        def measure(plan: PlannedRecipe) -> float:
            return cost.flops(visual_lengths(plan, tokens, layers)) / whole

    else:
        return budget.keep
    return _bisect(plan_at, measure, target, 0.5 / tokens, where)


def _bisect(
    plan_at: Callable[[float], PlannedRecipe], measure: Measure, target: float, least: float, where: str
) -> float:
    """Counts are whole numbers, so ``measure`` climbs in steps: of the two around ``target`` the nearer one."""
    low, high = _raise_to_one_token(plan_at, least), 1.0
    below, above = measure(plan_at(low)), measure(plan_at(high))
    scale = 10**_DIGITS
    if not below <= target <= above:
        name = plan_at(high).recipe.name
        raise UserError(
            f"{target:g} cannot be reached with {name}", where=where,
            available=[f"{math.ceil(below * scale) / scale:g} to {math.floor(above * scale) / scale:g}"],
        )  # fmt: skip
    for _ in range(60):
        middle = (low + high) / 2
        value = measure(plan_at(middle))
        if value < target:
            low, below = middle, value
        else:
            high, above = middle, value
    best = low if target - below < above - target else high
    return _shorten(best, lambda keep: measure(plan_at(keep)), low)


def _raise_to_one_token(plan_at: Callable[[float], PlannedRecipe], keep: float) -> float:
    """A ratio, at least ``keep``, that leaves a token after every stage: groups of a row need one each."""
    while keep < 1.0:
        try:
            plan_at(keep)
        except NothingLeftError:
            keep *= 1.01
        else:
            return keep
    return 1.0


def _shorten(keep: float, measure: Callable[[float], float], least: float) -> float:
    """The keep ratio of fewest digits that plans to the same counts: it is what people read and write down."""
    wanted = measure(keep)
    for digits in range(1, 16):
        rounded = round(keep, digits)
        if least <= rounded <= 1.0 and measure(rounded) == wanted:
            return rounded
    return keep
