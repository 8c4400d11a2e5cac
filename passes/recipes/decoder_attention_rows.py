"""Methods that rank tokens inside the decoder, by what attends to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.compiler.recipe import Recipe, Setting, Site, Stage, Term

_LAST_QUERY = Term("last_query_attention_mean", {"heads": "mean"})
_TOP_K = Term("top_k")
_DEBIASING = "https://arxiv.org/abs/2508.17807"
_RECENCY = {"weights": [1.0, 0.79, 0.358]}
_ONE_BUDGET = "Several images compete for one budget; the authors' code knows one."


def _projections(choice: str, *signals: str) -> Mapping[str, Mapping[str, Any]]:
    return {signal: {"projections": choice} for signal in signals}


def _before(layer: int, depth: int = 32) -> Site:
    return Site("decoder.layer", layer, depth)


def _pyramid(first: Term, later: Term) -> tuple[Stage, ...]:
    """PyramidDrop's stages with one score for the first and one for the others."""
    return tuple(
        Stage(
            _before(layer),
            score=score,
            select=_TOP_K,
            share=share,
            scope="whole",
            signals=_projections("next", "last_query_attention"),
        )
        for layer, share, score in ((8, 0.5, first), (16, 0.25, later), (24, 0.125, later))
    )


def _drop_after_second_layer(score: Term) -> Stage:
    """FastV's stage."""
    return Stage(
        _before(2),
        score=score,
        select=_TOP_K,
        share=0.5,
        scope="whole",
        signals=_projections("previous", "last_query_attention"),
    )


ROWS = (
    Recipe(
        name="fastv",
        title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        link="https://arxiv.org/abs/2403.06764",
        stages=(_drop_after_second_layer(_LAST_QUERY),),
        notes="Tokens are really dropped (the authors' in-place path), their caches with them; the set chosen at "
        f"prefill serves the whole answer. {_ONE_BUDGET}",
        settings=(Setting("LLaVA-1.5", 0.5, "K=2, R=50%"), Setting("LLaVA-1.5", 0.25, "K=2, R=75%")),
    ),
    Recipe(
        name="fastv_debiased",
        title="Attention Debiasing for Token Pruning in Vision Language Models, over FastV",
        link=_DEBIASING,
        stages=(
            _drop_after_second_layer(
                Term("padding_mask", {}, of=(Term("position_bias", _RECENCY, of=(_LAST_QUERY,)),))
            ),
        ),
        notes="The authors weigh the 576 places with a fitted curve; here it is drawn straight through three of its "
        "points (first, middle, last) and resampled to the tokens at hand. A curve fitted for the model is better. The "
        "padding mask takes the shares of an image's sides that are filled; by default none is, as in checkpoints that "
        "crop. The authors keep fewer tokens when fewer patches are valid; here the number is fixed and padding scores "
        "0, so it goes first.",
        settings=(Setting("LLaVA-1.5", 0.5, "FastV, K=2, R=50%"),),
    ),
    Recipe(
        name="fastv_sink_masked",
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models, its sink test over FastV",
        link="https://arxiv.org/abs/2503.03321",
        stages=(_drop_after_second_layer(Term("sink_mask", {"tau": 20.0, "found": 2}, of=(_LAST_QUERY,))),),
        evidence="reconstructed",
        notes="The paper finds sinks to redistribute attention, in all layers; pruning by its test is our combination. "
        "Sink dimensions are those in which the prompt's first token is largest; option dims names them instead "
        "([1415, 2533] for Llama-2-7B). tau = 20 suits wide decoders: no entry of a row of width D exceeds sqrt(D).",
    ),
    Recipe(
        name="pyramiddrop",
        title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        link="https://arxiv.org/abs/2410.17247",
        stages=_pyramid(_LAST_QUERY, _LAST_QUERY),
        positions="compact",
        notes="Survivors are numbered anew after every stage, so the layers of a segment share one numbering. "
        f"{_ONE_BUDGET}",
        settings=(Setting("LLaVA-1.5", 0.125), Setting("LLaVA-NeXT", 0.125)),
    ),
    Recipe(
        name="pyramiddrop_debiased",
        title="Attention Debiasing for Token Pruning in Vision Language Models, over PyramidDrop",
        link=_DEBIASING,
        stages=_pyramid(
            Term("padding_mask", {}, of=(Term("position_bias", _RECENCY, of=(_LAST_QUERY,)),)),
            Term("position_bias", _RECENCY, of=(_LAST_QUERY,)),
        ),
        positions="compact",
        notes="As fastv_debiased. From the second stage on the curve is resampled to the survivors by their rank, "
        "not by the place they had, and padding is no longer masked: the first stage drops it before anything else, "
        "as long as it drops that many tokens.",
        settings=(Setting("LLaVA-1.5", 0.125),),
    ),
    Recipe(
        name="sparsevlm",
        title="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
        link="https://arxiv.org/abs/2410.04417",
        stages=tuple(
            Stage(
                _before(layer),
                score=Term("rater_attention_mean"),
                select=Term("top_k_and_clusters", {"recycled": 0.3, "per_cluster": 10}),
                merge=Term("merge_assigned", {"average": "mean"}),
                share=count / 576,
                scope="whole",
                signals=_projections("previous", "text_attention"),
            )
            for layer, count in ((3, 309), (7, 204), (16, 113))
        ),
        positions="compact",
        notes="Version 1: 300, 200 and 110 tokens kept after layers 2, 6 and 15, and 9, 4 and 3 clusters of recycled "
        "ones. Text raters are weights of 0 or 1 instead of an index set, and are told at each stage from the hidden "
        "rows there; the authors tell them once, from the embeddings. Random noise that breaks ties of density is "
        "left out. A cluster's mean stands in its centre's place, not behind the other visual tokens.",
        settings=(
            Setting("LLaVA-1.5", 113 / 576, "192 tokens"),
            Setting("LLaVA-1.5", 39 / 576, "128 tokens"),
            Setting("LLaVA-1.5", 18 / 576, "64 tokens"),
        ),
    ),
    Recipe(
        name="sparsevlm_plus",
        title="SparseVLM+: Visual Token Sparsification with Improved Text-Visual Attention Pattern",
        link="https://arxiv.org/abs/2410.04417",
        stages=tuple(
            Stage(
                _before(layer),
                score=Term(
                    "rater_attention_corrected", {"head_share": 14 / 32, "head_width": 128, "rotary_base": 10000.0}
                ),
                select=_TOP_K,
                share=count / 576,
                scope="whole",
                signals=_projections("previous", "text_attention"),
            )
            for layer, count in ((3, 300), (7, 200), (16, 118))
        ),
        notes="Version 2 of the code: no recycling, original positions. Raters as in sparsevlm. The pull of rotary "
        "positions is that of one-dimensional positions with the width and base given as options (Llama's by "
        "default); beyond some 1,700 positions, where that pull swings around zero, it counts as 0.25; the question is "
        "taken to follow the last visual token without a gap. 14 heads became a share of "
        "the heads there are.",
        settings=(
            Setting("LLaVA-1.5", 118 / 576, "192 tokens"),
            Setting("LLaVA-1.5", 60 / 576, "128 tokens"),
            Setting("LLaVA-1.5", 28 / 576, "96 tokens"),
            Setting("LLaVA-1.5", 20 / 576, "64 tokens"),
        ),
    ),
    Recipe(
        name="fitprune",
        title="Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models",
        link="https://arxiv.org/abs/2409.10197",
        stages=tuple(
            Stage(
                _before(layer),
                score=Term("self_times_text_attention"),
                select=_TOP_K,
                share=count / 576,
                scope="whole",
                signals=_projections("previous", "self_attention", "text_attention"),
            )
            for layer, count in ((3, 390), (7, 246), (17, 143))
        ),
        notes="The authors delete a few tokens in each of 32 layers, by a table fitted offline. Here three cuts stand "
        "for the 60% table: each keeps the mean number of tokens that the table leaves in the layers up to the next "
        "cut. Tokens leave after the layer that scores them; the authors let them leave between its attention and its "
        "MLP.",
        settings=(Setting("LLaVA-1.5", 143 / 576, "60% table; it ends at 127 tokens"),),
    ),
    Recipe(
        name="visiondrop",
        title="Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
        link="https://arxiv.org/abs/2506.22283",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term("cls_attention_mean", {"heads": "sum"}),
                select=Term("top_k_and_uniform", {"contextual": 6 / 48}),
                merge=Term("nearest_target", {"average": "assigned"}),
                share=48 / 576,
            ),
            *(
                Stage(
                    _before(layer),
                    score=Term("visual_attention_mean", {"heads": "mean"}),
                    select=Term("top_k_and_uniform", {"contextual": contextual / count}),
                    merge=Term("nearest_target", {"average": "assigned"}),
                    share=count / 576,
                    scope="whole",
                    signals=_projections("next", "self_attention", "keys"),
                )
                for layer, count, contextual in ((8, 35, 5), (16, 26, 4), (24, 19, 3))
            ),
        ),
        positions="compact",
        notes="The setting of 32 tokens on average. The authors count the CLS token among the first 42 dominant "
        "tokens; here it never becomes a token and one more patch is kept. Merged tokens stay in image order, not "
        "behind the dominant ones. Needs a tower with a CLS token.",
        settings=(Setting("LLaVA-1.5", 19 / 576, "32 tokens"),),
    ),
    Recipe(
        name="adaptinfer",
        title="AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance",
        link="https://arxiv.org/abs/2508.06084",
        stages=tuple(
            Stage(
                _before(layer),
                score=Term("text_weighted_attention"),
                select=_TOP_K,
                share=count / 576,
                scope="whole",
                signals=_projections("previous", "text_attention", "text_to_text_attention"),
            )
            for layer, count in ((2, 290), (11, 72), (21, 18))
        ),
        positions="compact",
        notes="Pruning after layers 1, 10 and 20 (counted from 0), with the attention these layers computed. The "
        f"smallest published budget keeps no token in the end; here at least one stays. {_ONE_BUDGET}",
        settings=(
            Setting("LLaVA-1.5-7B", 18 / 576, "128 tokens"),
            Setting("LLaVA-1.5-7B", 3 / 576, "64 tokens"),
            Setting("LLaVA-1.5-13B", 30 / 576, "128 tokens"),
        ),
    ),
    Recipe(
        name="aim",
        title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
        link="https://arxiv.org/abs/2412.03248",
        stages=(
            *(
                Stage(
                    site,
                    select=Term("bipartite_tokens", {"sources": "even"}),
                    merge=Term("merge_assigned", {"average": "mean"}),
                    share=share,
                    rounds="removed down",
                )
                for site, share in ((Site("projector.out"), 0.5), (Site("decoder.layer", 0), 0.25))
            ),
            *(
                Stage(
                    _before(layer, 28),
                    score=Term("page_rank", {"temperature": 0.1, "steps": 5}),
                    select=_TOP_K,
                    share=share,
                    scope="whole",
                    signals=_projections("previous", "attention_logits"),
                )
                for layer, share in ((15, 0.25 * 0.75), (18, 0.25 * 0.3125))
            ),
            Stage(_before(22, 28), select=Term("nothing"), share=0.0, scope="whole"),
        ),
        positions="compact",
        identity_at_one=False,
        notes="The two rounds of merging are a stage each and remove N // 2 and N // 4 of a frame's N tokens (729, "
        "365, 183); merged tokens stay in image order. The authors lower the tokens by an eighth in each of layers 14 "
        "to 21; here two cuts have the same mean over layers 15 to 17 and over 18 to 21, and nothing visual is left "
        "from layer 22 on. They mask tokens, here they are dropped, and survivors are numbered anew (the authors do "
        "so after merging only). PageRank needs the whole attention map.",
        settings=(Setting("LLaVA-OneVision-7B", 0.25 * 0.3125, "merged to 25%"),),
    ),
    Recipe(
        name="mustdrop",
        title="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
        link="https://arxiv.org/abs/2411.10803",
        stages=(
            Stage(
                Site("vision.layer", 1, 24),
                select=Term("merge_windows", {"side": 3}),
                merge=Term("merge_assigned", {"average": "mean"}),
                share=0.8,
            ),
            Stage(
                Site("vision.out"),
                score=Term("top_share", {"share": 0.08}, of=(Term("cls_attention_mean", {"heads": "mean"}),)),
                select=None,
                share=1.0,
                signals={"cls_attention": {"layer": "next"}},
            ),
            *(
                Stage(
                    _before(layer),
                    score=Term("spare_carried", of=(Term("text_attention_mean", {"heads": "mean", "rows": "max"}),)),
                    select=_TOP_K,
                    share=share,
                    scope="whole",
                    signals=_projections("previous", "text_attention"),
                )
                for layer, share in ((3, 0.52), (7, 0.28), (15, 0.23))
            ),
        ),
        positions="compact",
        notes="Thresholds became counts: the most uniform windows merge (authors: a mean cosine of 0.8), and the "
        "tokens with the highest attention from any text token stay (authors: thresholds on that and on the sum over "
        "the text). The counts are ours and give 192 tokens on average over the layers. The cut after layer 10 is "
        "left out, so that the row fits shallow decoders. Caches of earlier layers keep the tokens dropped later; the "
        "authors cut them after prefill. Merged tokens keep their place, the authors put them first. Needs a tower "
        "with a CLS token.",
        settings=(Setting("LLaVA-1.5", 0.23, "192 tokens, by our counts"),),
    ),
    Recipe(
        name="vflowopt",
        title="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
        link="https://arxiv.org/abs/2508.05211",
        stages=(
            Stage(
                Site("projector.out"),
                score=Term("global_query_attention", {"threshold": 34.8}),
                select=Term("top_k_and_cells", {"cells": 27 / 15.6}),
                merge=Term("merge_by_score"),
                share=0.265,
            ),
            *(
                Stage(_before(layer, 28), score=Term("carried_score"), select=_TOP_K, share=share, scope="whole")
                for layer, share in ((9, 0.265 * 0.983), (18, 0.265 * 0.983 * 0.877))
            ),
        ),
        notes="The preset of 25%. The authors recycle one token for every occupied cell, base view and tiles "
        "together; here every image recycles as many as its cells would be, rounded down, and what lies in a cell "
        "without a place goes. Survivors of the first stage keep the positions of their patches, where the authors "
        "number them afresh before the decoder and keep numbers inside it. Every image has a budget of its own. Patch "
        "entropy, whose weight is 0 in all presets, is left out, and so are the base view's scores for tiles: every "
        "tile is scored by itself. Where no token is global the mean over all counts.",
        settings=(
            Setting("LLaVA-OneVision-7B", 0.265 * 0.983 * 0.877, "25%"),
            Setting("LLaVA-OneVision-7B", 0.723 * 0.749 * 0.487, "50%: threshold 28.7, cells 27 / 11.8"),
            Setting("LLaVA-OneVision-7B", 0.1166 * 0.6011, "10%: threshold 39.3, cells 27 / 17.4"),
        ),
    ),
)
