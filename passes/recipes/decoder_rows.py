"""Methods inside or just before the decoder that do not rank by attention alone."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Setting, Site, Stage, Term

_BEFORE_DECODER = Site("decoder.layer", 0)
_TRANSITION = Term("token_transition_variation")
_TRANSITION_AND_GUIDANCE = Term("weighted_sum", of=(_TRANSITION, Term("sum_to_one", of=(Term("text_attention_mean"),))))

ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="dart",
        title="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
        link="https://arxiv.org/abs/2502.11494",
        evidence="reconstructed",
        stages=(
            Stage(
                Site("decoder.layer", 2, 32),
                select=Term("unlike_pivots", {"visual_pivots": 4, "text_pivots": 4}),
                share=2 / 9,
                scope="whole",
            ),
        ),
        notes="Read in ports of the authors' code. After layer 2: four visual and four question tokens with the "
        "largest key norm are pivots, and each takes the tokens least like it. The authors let every pivot take the "
        "same rounded number and so keep a few tokens more or less than asked; here the pivots count among the tokens "
        "kept, and earlier pivots take one more where the rest does not divide. The authors visit pivots in the "
        "arbitrary order of a set; here the largest visual one comes first and the text pivots come last. The text is "
        "what stands behind the last visual token.",
        settings=(
            Setting("LLaVA-1.5-7B", 1 / 3, "192 tokens"),
            Setting("LLaVA-1.5-7B", 2 / 9, "128 tokens"),
            Setting("LLaVA-1.5-7B", 1 / 9, "64 tokens"),
        ),
    ),
    Recipe(
        name="dycoke",
        title="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
        link="https://arxiv.org/abs/2411.15024",
        stages=(
            Stage(
                _BEFORE_DECODER,
                score=Term("frame_change", {"compare": "group_of_four"}),
                select=Term("frame_quotas", {"group": 4}),
                share=0.475,
                scope="whole",
            ),
        ),
        positions="compact",
        notes="The merging of tokens over time, before the decoder: of every four frames the first stays, the others "
        "keep what changed most. With the published 0.475 those keep 30 % each; any other budget changes that share, "
        "and one below the first frames' own number thins those out evenly. Tokens of a thinned frame stay in "
        "ascending order, the authors' follow in the order of their change. At the end of a video their code leaves "
        "the third frame of the last four whole where the frames are a multiple of four, and drops the last of an odd "
        "number; here every third frame is thinned, and of nine frames the ninth, the first of its group, stays "
        "whole. The second half of the method, which picks the cache rows every decoding step may read anew, is left "
        "out: its reads depend on the data. A prompt with a single image has no frames to compare, so the rows of its "
        "patches take their place.",
        settings=(Setting("LLaVA-OneVision-7B", 0.475, "merging ratio 0.7"),),
    ),
    Recipe(
        name="evs",
        title="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
        link="https://arxiv.org/abs/2510.14624",
        stages=(
            Stage(
                _BEFORE_DECODER,
                score=Term("frame_change", {"compare": "previous"}),
                select=Term("top_k"),
                share=0.25,
                scope="whole",
                rounds="down",
            ),
        ),
        notes="Tokens of the projected frames that differ most from the frame before, the first frame ahead of all, "
        "as the serving engines do it; the paper also describes a variant on pixels. They never keep less than one "
        "frame; a budget below that thins the first frame out evenly here. A prompt with a single image has no frames "
        "to compare, so the rows of its patches take their place.",
        settings=(
            Setting("Qwen2.5-VL", 0.25, "pruning rate 0.75"),
            Setting("Nemotron Nano VL", 0.3, "pruning rate 0.7"),
        ),
    ),
    Recipe(
        name="framefusion",
        title="FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language "
        "Models",
        link="https://arxiv.org/abs/2501.01986",
        stages=(
            Stage(
                _BEFORE_DECODER,
                score=Term("frame_change", {"compare": "previous"}),
                select=Term("top_k"),
                merge=Term("run_mean"),
                share=0.5,
                scope="whole",
            ),
            Stage(
                Site("decoder.layer", 2, 28),
                score=Term("received_attention_mean"),
                select=Term("top_k"),
                share=0.285,
                scope="whole",
            ),
        ),
        notes="The authors merge whatever resembles its predecessor by 0.6 or more, layer after layer, until a layer "
        "finds little, and then prune to a cost of 0.3 averaged over 28 layers. Here one merging takes the most "
        "similar tokens to a fixed half before the first layer, and the pruning comes before the third; a later "
        "merging would need to know which of the removed tokens lay beside which. The cost is the same. A prompt with "
        "a single image has no frames to compare, so the rows of its patches take their place.",
        settings=(Setting("LLaVA-Video-7B", 0.285, "cost 0.3"),),
    ),
    Recipe(
        name="pact",
        title="PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models",
        link="https://arxiv.org/abs/2504.08966",
        stages=(
            Stage(
                Site("decoder.layer", 4, 28),
                score=Term("mean_query_importance"),
                select=Term("density_centres", {"candidates": 0.55, "reach": 0.315, "width": 2.0}),
                merge=Term("merge_assigned", {"average": "mean"}),
                share=0.287,
                scope="whole",
                signals={
                    "queries": {"projections": "next", "rotary": "none"},
                    "keys": {"projections": "next", "rotary": "none"},
                },
            ),
        ),
        notes="The authors' clusters have a fixed radius (0.21), so their number depends on the image. Here the "
        "number is fixed: the centres are the candidates farthest from any denser one, and every candidate joins the "
        "nearest, however far (theirs lie within the radius). A dropped token returns within 1.5 times that radius, "
        "as published. The score's mean query is that of the visual tokens and its softmax runs over them; the "
        "authors take the prompt before the image along. Distances are between keys before rotation, where the "
        "authors take rotated ones for the clusters and unrotated ones for the score. Their attention that counts a "
        "merged token by its size is left out. A cluster takes its centre's position.",
        settings=(Setting("LLaVA-OneVision-7B", 0.287, "71.3 % reduction"), Setting("LLaVA-OneVision-7B", 0.5, "50 %")),
    ),
    Recipe(
        name="seats_stage1",
        title="Stage-adaptive Token Selection for Efficient Omni-modal LLMs (stage I)",
        link="https://arxiv.org/abs/2605.20035",
        stages=(
            Stage(
                Site("projector.out"),
                score=Term("received_attention_mean"),
                select=Term("weighted_max_min"),
                share=0.14,
            ),
        ),
        notes="The first of three stages, for images: each image is a window of its own, where the authors' windows "
        "are two frames of video. The encoder attention runs over the image and is that of the layer the projector "
        "reads; theirs is the last layer's, taken anew inside the window. The authors keep 1.4 times the average they "
        "aim at, because later stages remove the rest; the default is that of their 10 % setting.",
        settings=(
            Setting("Qwen2.5-Omni-7B", 0.14, "target 10 %, video"),
            Setting("Qwen2.5-Omni-7B", 0.28, "target 20 %, video"),
        ),
    ),
    Recipe(
        name="todre",
        title="ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models",
        link="https://arxiv.org/abs/2505.18757v1",
        stages=(
            Stage(Site("projector.out"), select=Term("max_min", {"first": "second_smallest"}), share=0.1),
            Stage(Site("decoder.layer", 24, 32), select=Term("nothing"), share=0.0, scope="whole"),
        ),
        evidence="reconstructed",
        notes="As version 1 of the paper describes it: greedy k-center after the encoder, and no visual tokens in "
        "late layers. Version 2 calls the first stage max-sum diversification. The layer at which the tokens leave "
        "follows the attention of each prompt in the paper; here it is fixed, and three quarters of the depth is our "
        "choice. So are the cosine distance and the first token, which we could not find. Survivors keep their "
        "positions.",
        identity_at_one=False,
        settings=(Setting("LLaVA-NeXT-7B", 0.1, "90 % pruned"),),
    ),
    Recipe(
        name="transprune",
        title="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
        link="https://arxiv.org/abs/2507.20630",
        stages=tuple(
            Stage(
                Site("decoder.layer", layer, 32),
                score=_TRANSITION if share is None else _TRANSITION_AND_GUIDANCE,
                select=None if share is None else Term("top_k"),
                share=1.0 if share is None else share,
                scope="whole",
                signals={} if share is None else {"text_attention": {"projections": "next"}},
            )
            for layer, share in ((7, 0.875), (8, None), (9, 0.625), (10, None), (11, None), (12, 0.125))
        ),
        positions="compact",
        notes="Every layer from the seventh to the twelfth of 32 adds its share of change; stages without a selector "
        "only collect it. The softmax of the change runs over the real tokens of one prompt, in the authors' code "
        "over the whole batch. Survivors are numbered anew after every pruning. In a decoder of fewer layers a stage "
        "that only collects is left out where a pruning one falls on its layer.",
        settings=(Setting("LLaVA-1.5-7B", 0.125, "504, 360 and 72 of 576"), Setting("LLaVA-NeXT-7B", 0.125)),
    ),
    Recipe(
        name="visual_exit",
        title="Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
        link="https://arxiv.org/abs/2411.19628",
        stages=(Stage(Site("decoder.layer", 16, 32), select=Term("nothing"), share=0.0, scope="whole"),),
        evidence="reconstructed",
        notes="The static form of DyVTE: all visual tokens leave before one fixed layer. The authors train a small "
        "router per layer that decides for each prompt; half of the depth is our choice. Their weights have no place "
        "here: a router's answer changes how long the sequence is, and a compiled graph has one length for each layer, "
        "so that what could depend on it would drop nothing. Choose the layer from where the routers exit on your "
        "data, and write it as the site of a recipe file. The keep ratio has no effect, the layer decides.",
        identity_at_one=False,
    ),
)
