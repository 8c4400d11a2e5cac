"""Rows that are no paper: points of comparison."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Site, Stage, Term

ROWS = (
    Recipe(
        name="none",
        title="No pruning",
        link="",
        stages=(),
        evidence="reconstructed",
        notes="The unpruned model, as the point of comparison.",
    ),
    Recipe(
        name="random",
        title="Random tokens after the vision tower",
        link="",
        stages=(Stage(Site("vision.out"), score=Term("seeded_random", {"seed": 0}), select=Term("top_k"), share=0.5),),
        positions="compact",
        evidence="reconstructed",
        notes="The baseline any method should beat. The draw is a constant of the compiled graph, the same for every "
        "image; another seed is another bundle.",
    ),
)
