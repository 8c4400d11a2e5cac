"""Methods on the vision side that compare tokens with each other, or thin out the tower itself."""

from __future__ import annotations

import math

from secateur.compiler.recipe import Recipe, Setting, Site, Stage, Term

_LLAVA = tuple(Setting("LLaVA-1.5-7B", count / 576, f"{count} tokens") for count in (192, 128, 64))
_RECEIVED = Term("received_attention_mean", {"heads": "mean"})
_AFTER_EACH_LAYER = (*(Site("vision.layer", layer, 24) for layer in range(1, 23)), Site("vision.out"))
"""Behind each of the 23 layers of CLIP-L that LLaVA-1.5 uses."""


def _flow_shares(tokens: int = 576, left: int = 192, entropy_term: float = 0.3) -> list[float]:
    """FlowCut's schedule: after every second layer (N - left) / sqrt(layers to come) * term tokens go, at last all."""
    shares, count = [], tokens
    for to_come in range(20, -1, -2):
        count = left if to_come == 0 else count - round((count - left) / math.sqrt(to_come) * entropy_term)
        shares.append(count / tokens)
    return shares


ROWS = (
    Recipe(
        name="divprune",
        title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        link="https://arxiv.org/abs/2503.02175",
        stages=(Stage(Site("projector.out"), select=Term("max_min", {"first": "second_smallest"}), share=0.098),),
        positions="compact",
        notes="A chosen token cannot be chosen again; in the authors' code that can happen once only duplicates of "
        "chosen tokens are left. Each image is pruned by itself.",
        settings=(Setting("LLaVA-1.5-7B", 0.098, "SUBSET_RATIO"),),
    ),
    Recipe(
        name="cdpruner",
        title="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
        link="https://arxiv.org/abs/2506.10967",
        stages=(
            Stage(
                Site("decoder.layer", 0),
                score=Term("min_max", of=(Term("question_similarity"),)),
                select=Term("determinant"),
                share=64 / 576,
            ),
        ),
        positions="compact",
        evidence="reconstructed",
        notes="Kernel and greedy search are the authors'. Relevance is not: they compare patches with the question in "
        "CLIP's shared space, with the sign turned round, and no family here brings CLIP's text tower. As they do for "
        "Qwen2.5-VL (unpublished), relevance is taken from the decoder's own embeddings: the mean cosine with the text "
        "behind the last image, template included. It is scaled to [0, 1] within each image, not over all crops, and "
        "without their 1e-6, so the least relevant token comes last. A token of which the chosen ones leave less than "
        "1e-4 is taken by relevance after all others; the authors' code divides rounding errors there. They publish no "
        "default budget.",
    ),
    Recipe(
        name="scope",
        title="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs",
        link="https://arxiv.org/abs/2510.24214",
        stages=(
            Stage(
                Site("vision.out"),
                score=Term("cls_attention_mean", {"heads": "sum"}),
                select=Term("coverage", {"power": 1.0, "combine": "product"}),
                share=1 / 3,
            ),
        ),
        positions="compact",
        notes="Every step adds up the coverage each token would add, over all pairs: k times N x N. power is their "
        "ALPHA, combine their COMBINED. Needs a tower with a CLS token.",
        settings=_LLAVA,
    ),
    Recipe(
        name="idpruner",
        title="IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs",
        link="https://arxiv.org/abs/2602.13315",
        stages=(
            Stage(
                Site("projector.out"),
                score=Term("min_max", of=(_RECEIVED,)),
                select=Term("max_marginal_relevance", {"weight": 0.5}),
                share=0.25,
            ),
        ),
        evidence="reconstructed",
        notes="The selection is the authors', the importance is not: theirs comes from a trained scorer, here it is "
        "the attention a patch receives in the tower layer the projector reads; `idpruner_learned` takes the scorer's "
        "weights. Figures of the paper do not apply. "
        "They pool the tokens of all images and choose from them at once; here each image is pruned by itself.",
        settings=(Setting("Qwen2.5-VL-7B", 0.25), Setting("Qwen2.5-VL-7B", 0.1)),
    ),
    Recipe(
        name="idpruner_learned",
        title="IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs (trained scorer)",
        link="https://arxiv.org/abs/2602.13315",
        stages=(
            Stage(
                Site("projector.out"),
                score=Term("min_max", of=(Term("learned_selector"),)),
                select=Term("max_marginal_relevance", {"weight": 0.5}),
                share=0.25,
            ),
        ),
        notes="Needs a file of weights: --recipe idpruner_learned:weights=FILE.safetensors with q_proj.weight [W,D], "
        "q_proj.bias [W], k_proj.weight [W,D] and k_proj.bias [W], as a VisionSelector checkpoint has them under its "
        "scorer (W is 1792 there). The scorer's form was read in published copies of it. The authors pool the tokens "
        "of all images, score and choose from them at once; here each image is scored and pruned by itself.",
        settings=(Setting("Qwen2.5-VL-7B", 0.25), Setting("Qwen2.5-VL-7B", 0.1)),
    ),
    Recipe(
        name="zoo_prune",
        title="ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
        link="https://arxiv.org/abs/2509.24837",
        stages=(
            Stage(
                Site("projector.out"),
                score=Term("min_max", of=(Term("projector_sensitivity"),)),
                select=Term("farthest_by_score"),
                share=1 / 3,
                signals={"probe_slopes": {"directions": 64, "step": 0.01, "seed": 0}},
                rounds="down",
            ),
        ),
        positions="compact",
        notes="The authors draw new directions for every image; here they are constants of the compiled graph, and "
        "another seed is another bundle. The projector runs 128 times on every token besides the once.",
        settings=_LLAVA,
    ),
    Recipe(
        name="gprune",
        title="What Kind of Visual Tokens Do We Need? Training-Free Visual Token Pruning for Multi-Modal Large "
        "Language Models from the Perspective of Graph",
        link="https://arxiv.org/abs/2501.02268",
        stages=(
            Stage(
                Site("projector.out"),
                score=Term("graph_flow", {"threshold": 0.5, "temperature": 0.03, "steps": 5}),
                select=Term("top_k"),
                share=0.5,
                rounds="down",
            ),
        ),
        notes="The authors treat the base image as one graph and all tiles together as another; here every image and "
        "every tile is a graph.",
        settings=(Setting("LLaVA-NeXT-8B", 0.5),),
    ),
    Recipe(
        name="textmonkey",
        title="TextMonkey: An OCR-Free Large Multimodal Model for Understanding Document (token filter)",
        link="https://arxiv.org/abs/2403.04473",
        stages=(Stage(Site("projector.out"), score=Term("later_redundancy"), select=Term("top_k"), share=0.5),),
        positions="compact",
        notes="The filter alone. In TextMonkey the tokens it keeps then read all tokens through a trained layer of "
        "cross-attention, which no other model has. The authors filter the 1024 tokens of all windows at once to 512; "
        "here each image keeps half of its own.",
        settings=(Setting("TextMonkey", 0.5, "512 tokens"),),
    ),
    Recipe(
        name="tome",
        title="Token Merging: Your ViT But Faster",
        link="https://arxiv.org/abs/2210.09461",
        stages=tuple(
            Stage(
                site,
                select=Term("bipartite_keys", {"sources": "tower"}),
                merge=Term("merge_assigned", {"average": "size"}),
                share=1 - 2 / 3 * layer / len(_AFTER_EACH_LAYER),
            )
            for layer, site in enumerate(_AFTER_EACH_LAYER, 1)
        ),
        positions="compact",
        collapses=True,
        notes="The same number of tokens is merged after each of the 23 layers LLaVA uses; the authors merge inside "
        "the block, between attention and MLP. In a shallower tower the merges that fall on one layer become one. One "
        "matching can remove half of the tokens; a smaller budget takes several in a row, the later ones on the mean "
        "keys of what was merged. Survivors stay in image order, the authors put unmerged sources first, so that "
        "later matchings split the tokens otherwise. The size of a token weighs in merges but not in attention (no "
        "proportional attention). CLS is never merged; counted with it in front the even places of the tower's row "
        "merge away, and so do they in a tower without it. The budgets are those at which SparseVLM's authors ran "
        "ToMe.",
        settings=_LLAVA,
    ),
    Recipe(
        name="crossget",
        title="CrossGET: Cross-Guided Ensemble of Tokens for Accelerating Vision-Language Transformers (matching)",
        link="https://arxiv.org/abs/2305.17455",
        stages=tuple(
            Stage(
                site,
                score=_RECEIVED,
                select=Term("complete_graph_keys"),
                merge=Term("merge_by_importance"),
                share=1 - 13 * layer / 576,
            )
            for layer, site in enumerate(_AFTER_EACH_LAYER, 1)
        ),
        positions="compact",
        collapses=True,
        evidence="reconstructed",
        notes="Matching, merging and 13 tokens a layer are the authors'. Their cross tokens are trained, and what they "
        "attend to is part of the importance; without them it is the attention a patch receives, mean over heads and "
        "queries. Merging stands behind the MLP, theirs between attention and MLP. In a shallower tower the merges "
        "that fall on one layer become one. They allow at most half of the tokens to go at once, here there is no such "
        "limit. No proportional attention.",
        settings=(Setting("LLaVA-1.5-7B", 277 / 576, "r = 13"),),
    ),
    Recipe(
        name="flowcut",
        title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
        link="https://arxiv.org/abs/2505.19536",
        stages=tuple(
            Stage(
                site,
                score=Term("attention_flow", {"momentum": 0.5}),
                select=Term("top_k") if layer % 2 == 0 else None,
                share=_flow_shares()[layer // 2 - 1] if layer % 2 == 0 else 1.0,
            )
            for layer, site in enumerate(_AFTER_EACH_LAYER[:22], 1)
        ),
        positions="compact",
        collapses=True,
        notes="Scores are averaged over every layer and tokens go after every second one, as the authors have it. How "
        "many go at once depends on the entropy of the attention in theirs; here that term is a constant 0.3, which "
        "is an assumption, and the last cut before the layer LLaVA reads leaves exactly the budget, as in theirs. In a "
        "shallower tower the cuts that fall on one layer become one. Needs a tower with a CLS token.",
        settings=_LLAVA,
    ),
)
