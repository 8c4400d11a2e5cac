"""Which cells a sweep has: every recipe at every ratio, the unpruned model first, the ceiling last."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from secateur.compiler.pipeline import RECIPES, Budget, Recipe, load_recipe
from secateur.passes.needs import needs_sound, needs_weights
from secateur.runtime.errors import UserError

ORACLE = "oracle-keep"
ORACLE_COMPACT = "oracle-keep, compact"
BudgetKind = Literal["keep", "mean-keep", "flops-keep"]


@dataclass(frozen=True)
class Cell:
    """One bundle to ask. ``ratio`` is of the budget's kind.

    ``by_oracle``: the unpruned tower's features, chosen by a ranking that the questions bring along.
    """

    row: str
    recipe: Recipe
    ratio: float
    budget: BudgetKind = "keep"

    @property
    def by_oracle(self) -> bool:
        return self.row in (ORACLE, ORACLE_COMPACT)

    @property
    def asked(self) -> Budget:
        """What the ratio asks for."""
        if not self.recipe.stages:
            return Budget()
        given: dict[str, Any] = {self.budget.replace("-", "_"): self.ratio}
        return Budget(**given)

    @property
    def file_name(self) -> str:
        kind = "" if self.budget == "keep" else f"{self.budget}-"
        return f"{re.sub(r'[^A-Za-z0-9_.=+-]+', '-', self.row)}-{kind}{self.ratio:g}.json"

    def __str__(self) -> str:
        return self.row if not self.recipe.stages else f"{self.row} {self.ratio:g}"


def list_cells(
    recipes: Sequence[Recipe], ratios: Sequence[float], *, oracle: bool = True, budget: BudgetKind = "keep"
) -> list[Cell]:
    """``none`` once, then recipe by recipe; with ``oracle`` the two ceilings."""
    cells = [Cell("none", RECIPES["none"], 1.0)]
    cells += [Cell(recipe.name, recipe, ratio, budget) for recipe in recipes for ratio in ratios]
    if oracle:
        cells += [Cell(row, oracle_recipe(row), ratio, budget) for row in (ORACLE, ORACLE_COMPACT) for ratio in ratios]
    return cells


def choose_recipes(texts: Sequence[str] | None) -> list[Recipe]:
    """What each text stands for behind ``--recipe``, without ``none``; for None or "all" every row of the table that
    asks for nothing besides the model: no file of weights, no sound, since questions are about images."""
    rows = [row for row in RECIPES.values() if row.stages and not needs_weights(row) and not needs_sound(row)]
    if texts is None or list(texts) == ["all"]:
        return rows
    chosen = [recipe for text in texts if (recipe := load_recipe(text)).stages]
    names = [recipe.name for recipe in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{twice[0]!r} is there twice", where="--recipes", fix="give each recipe a name of its own")
    return chosen


def oracle_recipe(row: str) -> Recipe:
    """A recipe whose prefill takes any K features after the tower; what its own vision program keeps is not used."""
    return replace(
        RECIPES["random"],
        name="oracle-keep",
        title="The best patches, which whoever made the questions knows",
        positions="compact" if row == ORACLE_COMPACT else "original",
    )
