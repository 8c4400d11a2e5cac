"""Methods on the vision side that compare tokens with each other, or thin out the tower itself."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Site, Stage, Term

ROWS = (
    Recipe(
        name="divprune",
        title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        link="https://arxiv.org/abs/2503.02175",
        stages=(Stage(Site("projector.out"), select=Term("max_min", {"first": "second_smallest"}), share=0.098),),
        positions="compact",
        notes="A chosen token cannot be chosen again; in the authors' code that can happen once only duplicates of "
        "chosen tokens are left. Each image is pruned by itself.",
    ),
)
