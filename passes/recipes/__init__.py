"""The table of papers: each published method is one row of data.

A row states where the method prunes, with which words of the vocabulary (``passes/methods``), what share of the
visual tokens its paper leaves, and in ``notes`` where our static form differs from the authors' code.
"""

from __future__ import annotations

from secateur.compiler.recipe import Recipe
from secateur.passes.recipe_module import installed_names, recipe_from_package
from secateur.passes.recipes import (
    decoder_attention_rows,
    decoder_rows,
    omni_rows,
    reference_rows,
    seats_rows,
    tower_attention_rows,
    tower_rows,
)
from secateur.runtime.errors import UserError

_MODULES = (
    reference_rows,
    decoder_attention_rows,
    decoder_rows,
    seats_rows,
    omni_rows,
    tower_attention_rows,
    tower_rows,
)

RECIPES: dict[str, Recipe] = {row.name: row for module in _MODULES for row in module.ROWS}


def get_recipe(name: str) -> Recipe:
    """The row called ``name``, or the recipe an installed package offers under that name."""
    if name in RECIPES:
        return RECIPES[name]
    recipe = recipe_from_package(name)
    if recipe is None:
        raise UserError(
            f"no recipe {name!r}",
            where="--recipe",
            available=sorted({*RECIPES, *installed_names()}),
            fix="or give a .yaml file, or FILE.py:NAME",
        )
    return recipe
