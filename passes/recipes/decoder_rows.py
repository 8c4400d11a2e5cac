"""Methods inside or just before the decoder that do not rank by attention alone."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe

ROWS: tuple[Recipe, ...] = ()
