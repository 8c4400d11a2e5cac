"""The table of papers: each published method is one row of data.

A row states where the method prunes, with which words of the vocabulary (``passes/methods``), what share of the
visual tokens its paper leaves, and in ``notes`` where our static form differs from the authors' code.
"""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.runtime.errors import UserError

_LAST_QUERY = Term("last_query_attention_mean", {"heads": "mean"})

_ROWS = (
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
    Recipe(
        name="fastv",
        title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        link="https://arxiv.org/abs/2403.06764",
        stages=(
            Stage(
                Site("decoder.layer", 2, 32),
                score=_LAST_QUERY,
                select=Term("top_k"),
                share=0.5,
                scope="whole",
                signals={"last_query_attention": {"projections": "previous"}},
            ),
        ),
        notes="Tokens are really dropped (the authors' in-place path), their caches with them; the set chosen at "
        "prefill serves the whole answer. Several images compete for one budget; the authors' code knows one.",
    ),
    Recipe(
        name="pyramiddrop",
        title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        link="https://arxiv.org/abs/2410.17247",
        stages=tuple(
            Stage(
                Site("decoder.layer", layer, 32),
                score=_LAST_QUERY,
                select=Term("top_k"),
                share=share,
                scope="whole",
                signals={"last_query_attention": {"projections": "next"}},
            )
            for layer, share in ((8, 0.5), (16, 0.25), (24, 0.125))
        ),
        positions="compact",
        notes="Survivors are numbered anew after every stage, so the layers of a segment share one numbering. Several "
        "images compete for one budget; the authors' code knows one.",
    ),
    Recipe(
        name="fastervlm",
        title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
        link="https://arxiv.org/abs/2412.01818v1",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term("cls_attention_mean", {"heads": "mean"}),
                select=Term("top_k"),
                share=0.25,
            ),
        ),
        positions="compact",
        notes="The authors mask after the projector; it works row by row, so pruning before it keeps the same rows at "
        "less cost. Needs a tower with a CLS token. The default is the mildest of the published budgets, 144 of 576. "
        "The link is to version 1: from version 2 on the paper describes another method.",
    ),
    Recipe(
        name="divprune",
        title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        link="https://arxiv.org/abs/2503.02175",
        stages=(Stage(Site("projector.out"), select=Term("max_min", {"first": "second_smallest"}), share=0.098),),
        positions="compact",
        notes="A chosen token cannot be chosen again; in the authors' code that can happen once only duplicates of "
        "chosen tokens are left. Each image is pruned by itself.",
    ),
    Recipe(
        name="visionzip",
        title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        link="https://arxiv.org/abs/2412.04467",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term("cls_attention_mean", {"heads": "sum"}),
                select=Term("top_k_and_uniform", {"contextual": 0.156}),
                merge=Term("nearest_target", {"average": "assigned"}),
                share=1 / 3,
            ),
        ),
        positions="compact",
        notes="192 of 576 tokens: 162 by attention, 30 that others merge into. The authors keep the CLS token among "
        "the 162 and put the 30 last; here CLS never becomes a token, one more patch is kept instead, and all stay in "
        "image order. Merging adds the mean of the assigned tokens to the target, as the authors' code does "
        "(about twice the norm); average='all' is the normalised mean that some other implementations use.",
    ),
)

RECIPES: dict[str, Recipe] = {row.name: row for row in _ROWS}


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
