"""Which cells the accuracy table has: every recipe at every keep ratio, and the ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.compiler.pipeline import RECIPES, Recipe

KEEPS = (1.0, 0.5, 0.25, 0.1, 0.05)
ORACLE = "oracle-keep"
ORACLE_COMPACT = "oracle-keep, compact"


@dataclass(frozen=True)
class Cell:
    """One bundle to ask. ``by_oracle``: the unpruned tower's features, chosen by the scene's own ranking."""

    row: str
    recipe: Recipe
    keep: float

    @property
    def by_oracle(self) -> bool:
        return self.row in (ORACLE, ORACLE_COMPACT)

    @property
    def file_name(self) -> str:
        return f"{self.row.replace(', ', '-')}-{self.keep:g}.json"


def list_cells(recipes: Sequence[Recipe], keeps: Sequence[float], oracle: bool = True) -> list[Cell]:
    """``none`` once, then recipe by recipe."""
    cells = [Cell("none", RECIPES["none"], 1.0)]
    cells += [Cell(recipe.name, recipe, keep) for recipe in recipes for keep in keeps]
    if oracle:
        cells += [Cell(row, oracle_recipe(row), keep) for row in (ORACLE, ORACLE_COMPACT) for keep in keeps]
    return cells


def oracle_recipe(row: str) -> Recipe:
    """A recipe whose prefill takes any K features after the tower; what its own vision program keeps is not used."""
    return replace(
        RECIPES["random"],
        name="oracle-keep",
        title="The patches under digits, which the scene generator knows",
        positions="compact" if row == ORACLE_COMPACT else "original",
    )
