"""What a recipe of your own is written with; see docs/writing-a-recipe.md.

from secateur.recipes import Recipe, Site, Stage, Term, score
"""

from __future__ import annotations

from secateur.compiler.calibration import read_reference
from secateur.compiler.layout import Grid, Layout
from secateur.compiler.learned import read_weights
from secateur.compiler.recipe import Recipe, Setting, Stage, Term
from secateur.compiler.site import Site
from secateur.passes.methods.learned import Weights
from secateur.passes.methods.own import merge, score, selector
from secateur.passes.methods.rows import Scored
from secateur.passes.methods.select import Selection

__all__ = [
    "Grid",
    "Layout",
    "Recipe",
    "Scored",
    "Selection",
    "Setting",
    "Site",
    "Stage",
    "Term",
    "Weights",
    "merge",
    "read_reference",
    "read_weights",
    "score",
    "selector",
]
