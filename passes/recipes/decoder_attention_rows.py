"""Methods that rank tokens inside the decoder, by what attends to them."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Site, Stage, Term

_LAST_QUERY = Term("last_query_attention_mean", {"heads": "mean"})

ROWS = (
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
)
