"""The table of papers: each published method is one row of data.

A row states where the method prunes, with which words of the vocabulary (``passes/methods``), what share of the
visual tokens its paper leaves, and in ``notes`` where our static form differs from the authors' code.
"""

from __future__ import annotations

from secateur.compiler.recipe import Recipe
from secateur.passes.recipes import (
    decoder_attention_rows,
    decoder_rows,
    reference_rows,
    tower_attention_rows,
    tower_rows,
)
from secateur.runtime.errors import UserError

_MODULES = (reference_rows, decoder_attention_rows, decoder_rows, tower_attention_rows, tower_rows)

RECIPES: dict[str, Recipe] = {row.name: row for module in _MODULES for row in module.ROWS}


def get_recipe(name: str) -> Recipe:
    """The row called ``name``."""
    if name not in RECIPES:
        raise UserError(
            f"no recipe {name!r}",
            where="--recipe",
            available=sorted(RECIPES),
            fix="or give the path of a .yaml file",
        )
    return RECIPES[name]
