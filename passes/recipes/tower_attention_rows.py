"""Methods that rank patches by the attention of the vision tower."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Site, Stage, Term

ROWS = (
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
