"""Methods that rank patches by the attention of the vision tower."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Setting, Site, Stage, Term

_CLS = Term("cls_attention_mean")
_TWO_LAYERS = (
    Term("cls_attention_layers_mean", {"layers": "first"}),
    Term("cls_attention_layers_mean", {"layers": "last"}),
)
_UPPER_HALF = [*(f"{layer}/24" for layer in range(12, 22)), "read"]
_JOINT = {"cls_attention": {"layer": "next", "heads": "joint"}}
_JOINT_AND_KEYS = {**_JOINT, "keys": {"layer": "next"}}
_RECOVERY = {"visual": 0.5, "text": 0.25}


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
        settings=(
            Setting("LLaVA-1.5", 144 / 576, "75 % pruned"),
            Setting("LLaVA-1.5", 58 / 576, "90 % pruned"),
            Setting("LLaVA-1.5", 29 / 576, "95 % pruned"),
        ),
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
        settings=(
            Setting("LLaVA-1.5", 192 / 576, "162 dominant and 30 contextual tokens"),
            Setting("LLaVA-1.5", 128 / 576, "108 and 20"),
            Setting("LLaVA-1.5", 64 / 576, "54 and 10"),
        ),
    ),
    Recipe(
        name="vtc_cls",
        title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
        link="https://arxiv.org/abs/2412.05819",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term("cls_attention_layers_mean", {"heads": "mean", "layers": "sum"}),
                select=Term("top_k"),
                share=128 / 576,
                signals={"cls_attention_layers": {"layers": _UPPER_HALF}},
            ),
        ),
        positions="compact",
        notes="The authors sum the layers from a given one up to the one the projector reads; the given layer has no "
        "published default that we know of, so the upper half of the tower is summed here. Other layers are an option "
        "of the signal. The number of tokens has no default either; the settings are those of the fixed-count "
        "baseline in their repository. Needs a tower with a CLS token.",
        settings=(
            Setting("LLaVA-1.5", 256 / 576, "256 tokens"),
            Setting("LLaVA-1.5", 128 / 576, "128 tokens"),
            Setting("LLaVA-1.5", 64 / 576, "64 tokens"),
        ),
    ),
    Recipe(
        name="vispruner",
        title="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
        link="https://arxiv.org/abs/2412.01818",
        stages=(
            Stage(
                Site("vision.out"),
                score=_CLS,
                select=Term("distinct", {"important": 0.5, "step": 8}),
                share=128 / 576,
            ),
        ),
        positions="compact",
        notes="The rounds of pruning are the authors', order within a round included; they need an even number of "
        "tokens in every round but the last, here an odd one gives the even places one token more. A round drops at "
        "most half of what is left. The order decides which tokens the next round compares, so that a difference in "
        "rounding can change several tokens of a large image. Needs a tower with a CLS token; `vispruner_siglip` is "
        "the form for others.",
        settings=(
            Setting("LLaVA-1.5", 128 / 576, "64 important and 64 diverse tokens"),
            Setting("LLaVA-1.5", 64 / 576, "on MME 48 important and 16 diverse: important=0.75"),
            Setting("LLaVA-NeXT", 32 / 576, "32 tokens of every crop"),
        ),
    ),
    Recipe(
        name="vispruner_siglip",
        title="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs "
        "(towers without CLS)",
        link="https://arxiv.org/abs/2412.01818",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term("received_attention_mean"),
                select=Term("distinct", {"important": 0.5, "step": 8}),
                share=128 / 576,
                signals={"received_attention": {"layer": "read"}},
            ),
        ),
        positions="compact",
        notes="The authors' form for SigLIP: attention received, mean over queries and heads, of the last layer. Here "
        "it is that of the layer the projector reads, which in LLaVA-OneVision is the last. See `vispruner`.",
    ),
    Recipe(
        name="prumerge",
        title="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
        link="https://arxiv.org/abs/2403.15388",
        stages=(
            Stage(
                Site("vision.out"),
                score=_CLS,
                select=Term("top_k"),
                merge=Term("centres_by_keys", {"neighbours": 32}),
                share=0.055,
                signals=_JOINT_AND_KEYS,
            ),
        ),
        positions="compact",
        identity_at_one=False,
        notes="The authors keep as many tokens as the attention has outliers (1.5 interquartile ranges above the third "
        "quartile), about 32 of 576 on average; a compiled graph keeps a constant number. The budget includes the "
        "token that sums up what is left over; it takes the place of the next token in the ranking. The authors put "
        "it last and the others in order of score; here all stay in image order. Queries and keys are those of the "
        "layer after the one the projector reads, all heads as one. Needs a tower with a CLS token.",
        settings=(Setting("LLaVA-1.5", 0.055, "adaptive, 32 tokens on average"),),
    ),
    Recipe(
        name="prumerge_plus",
        title="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (PruMerge+)",
        link="https://arxiv.org/abs/2403.15388",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term("grid_first", {"attention": 0.25}, of=(_CLS,)),
                select=Term("top_k"),
                merge=Term("centres_by_keys", {"neighbours": 32}),
                share=0.25,
                signals=_JOINT_AND_KEYS,
            ),
        ),
        positions="compact",
        identity_at_one=False,
        notes="As `prumerge`, with an even grid besides: a quarter of the places goes by attention, three quarters to "
        "the grid, which is the authors' proportion (their grid step is a third of the inverse of the outlier ratio). "
        "Where the grid meets a token chosen by attention they keep fewer; here the next by attention fills the place.",
        settings=(Setting("LLaVA-1.5", 0.25, "adaptive, 144 tokens on average"),),
    ),
    Recipe(
        name="hiprune",
        title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
        link="https://arxiv.org/abs/2508.00553",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term(
                    "anchors_first",
                    {"alpha": 0.1},
                    of=(
                        Term("received_attention_layers_mean", {"layers": "first"}),
                        Term("received_attention_layers_mean", {"layers": "last"}),
                    ),
                ),
                select=Term("top_k"),
                share=192 / 576,
                signals={"received_attention_layers": {"layers": ["8/24", "read"]}},
            ),
        ),
        positions="compact",
        notes="Anchors and the tokens around them are put before the registers in one ranking, so that the total is "
        "exact; the authors' counts are the same. Rows wrap and the ends are clamped as in their code, at any grid "
        "width. The CLS token's query counts where the tower has one; a tower without CLS is scored by its patches' "
        "queries alone (the authors' form for Qwen2.5-VL reads other layers).",
        settings=(
            Setting("LLaVA-1.5", 192 / 576, "192 tokens"),
            Setting("LLaVA-1.5", 128 / 576, "128 tokens"),
            Setting("LLaVA-1.5", 64 / 576, "64 tokens"),
        ),
    ),
    Recipe(
        name="holov",
        title='Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention',
        link="https://arxiv.org/abs/2510.02912",
        stages=(
            Stage(
                Site("projector.out"),
                score=Term("chunks_first", {"chunks": 16, "variance": 0.09}, of=(_CLS,)),
                select=Term("top_k"),
                share=64 / 576,
            ),
        ),
        positions="compact",
        notes="When a chunk's part is more than it has tokens, the authors pad with zero rows; here the most attended "
        "tokens left over fill up. Tokens stay in image order; the authors order each chunk by score. Scaling the "
        "variance to the attention of its own chunk makes every chunk's weight about 1.09 times its mean attention, in "
        "the authors' code as here. Needs a tower with a CLS token.",
        settings=(
            Setting("LLaVA-1.5", 192 / 576, "192 tokens"),
            Setting("LLaVA-1.5", 128 / 576, "128 tokens"),
            Setting("LLaVA-1.5", 64 / 576, "64 tokens"),
        ),
    ),
    Recipe(
        name="hired",
        title="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language "
        "Models",
        link="https://arxiv.org/abs/2408.10945",
        evidence="reconstructed",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term(
                    "tiles_first",
                    {"alpha": 0.5, "rows": 2, "columns": 2},
                    of=(
                        Term("cls_attention_layers_mean", {"heads": "sum", "layers": "first"}),
                        Term("cls_attention_layers_mean", {"heads": "sum", "layers": "last"}),
                    ),
                ),
                select=Term("top_k"),
                share=0.2,
                signals={"cls_attention_layers": {"layers": ["0/24", "read"]}},
            ),
        ),
        positions="compact",
        notes="The method is for models that see an image and sharper crops of it. With one picture per image its four "
        "quarters stand in for the crops: half of the budget goes to the whole image, half to the quarters in "
        "proportion to the first layer's attention, out of the tokens the first half has not taken (real crops have "
        "tokens of their own). Quotas round down; the best tokens left fill up to the budget, "
        "where the authors keep fewer. Their code for a single picture is `fastervlm` (rows=1, columns=1 here), and "
        "in their code for crops a crop's part of the first layer's attention is a run of the sequence, not a "
        "rectangle. Needs a tower with a CLS token.",
        settings=(
            Setting("LLaVA-NeXT", 0.4, "40 % of all crops' tokens"),
            Setting("LLaVA-NeXT", 0.2, "20 % of all crops' tokens"),
        ),
    ),
    Recipe(
        name="vscan",
        title="VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
        link="https://arxiv.org/abs/2505.22654",
        stages=(
            Stage(
                Site("projector.out"),
                score=Term("windows_first", {"side": 6, "share": 0.5}, of=_TWO_LAYERS),
                select=Term("top_k"),
                merge=Term("nearest_mean"),
                share=96 / 576,
                signals={"cls_attention_layers": {"layers": ["5/24", "read"]}},
            ),
            Stage(
                Site("decoder.layer", 16, 32),
                score=Term("last_query_attention_mean", {"heads": "mean"}),
                select=Term("top_k"),
                share=32 / 576,
                scope="whole",
                signals={"last_query_attention": {"projections": "next"}},
            ),
        ),
        positions="compact",
        notes="When the local half is not a multiple of the number of windows the authors keep fewer tokens; here the "
        "global half fills up. Windows of 6 by 6 on a grid of 24 by 24; on another grid as many as come nearest to "
        "that size. Several images compete for one budget in the decoder. That the decoder's stage takes the "
        "projections of the layer about to run is our reading. Needs a tower with a CLS token.",
        settings=(
            Setting("LLaVA-1.5", 32 / 576, "96 tokens, 32 from the middle on: 64 on average"),
            Setting("LLaVA-NeXT", 32 / 576, "of every crop"),
        ),
    ),
    Recipe(
        name="recoverable",
        title="Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information",
        link="https://arxiv.org/abs/2409.01179",
        stages=(
            Stage(Site("vision.out"), score=_CLS, select=None, share=1.0, signals=_JOINT),
            Stage(
                Site("decoder.layer", 0),
                score=Term("carried_then_question", _RECOVERY),
                select=Term("top_k_and_centres", _RECOVERY),
                merge=Term("centres_by_question", {"question": 1.8, "neighbours": 32}),
                share=0.1,
                signals={"text_rows": {"which": "question"}},
            ),
        ),
        positions="compact",
        evidence="reconstructed",
        identity_at_one=False,
        notes="The authors let local outlier factors decide how many tokens attention keeps, how many the question "
        "recovers and how many centres merge the rest; here these are a half, a quarter and a quarter of the budget, "
        "of which the last centre's place holds the sum of what is left over. They compare CLIP's text embedding with "
        "CLIP's patches; here the decoder's embeddings of the question are compared with the projected tokens, and "
        "nearness of tokens is measured on these instead of the tower's keys. Weighted sums are of projected tokens, "
        "theirs of the tower's, which are then projected. All stay in image order. Needs a tower with a CLS token.",
        settings=(Setting("LLaVA-1.5", 0.1, "adaptive, about a tenth of the tokens"),),
    ),
)
