"""Methods for models that see and hear: the ports SEATS compares itself with, and two of other authors."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Setting, Site, Stage, Term

_BEFORE_DECODER = Site("decoder.layer", 0)
_SEATS = "https://arxiv.org/abs/2605.20035"
_PORT = "Stage-adaptive Token Selection for Efficient Omni-modal LLMs"
_PAIRS = ((0.3, 0.65), (0.2, 0.55), (0.1, 0.45), (0.06, 0.35))
_RATES = {"rates": [0.1, 0.45]}
_WINDOWS = {"frames": [1, 2]}
_ABOUT_RATES = (
    "The pair of rates is of what is seen and of what is heard, and where there is sound it is the default budget; "
    "--mean-keep takes another. keep scales both. Without sound it is the part of the visual tokens that stays."
)


def _settings(pairs: tuple[tuple[float, float], ...], whole: float = 0.0) -> tuple[Setting, ...]:
    """The published pairs; the first ``whole`` of the layers keep every token."""
    return tuple(
        Setting(
            "Qwen2.5-Omni-7B",
            round((video - whole) / (1.0 - whole), 4),
            f"video average {video:g}, beside audio {audio:g}",
        )
        for video, audio in pairs
    )


ROWS = (
    Recipe(
        name="random_omni",
        title=f"{_PORT} (its random baseline)",
        link=_SEATS,
        stages=(
            Stage(
                _BEFORE_DECODER,
                score=Term("seeded_random", {"seed": 0}),
                select=Term("top_k_per_modality", _RATES),
                share=0.1,
                scope="whole",
            ),
        ),
        notes="The authors draw anew for every prompt; here the draw is a constant of the compiled graph. "
        f"{_ABOUT_RATES}",
        settings=_settings(_PAIRS),
    ),
    Recipe(
        name="visionzip_omni",
        title=f"{_PORT} (its port of VisionZip)",
        link=_SEATS,
        stages=(
            Stage(Site("projector.out"), None, score=Term("received_attention_mean")),
            Stage(Site("audio.out"), None, score=Term("received_attention_mean")),
            Stage(
                _BEFORE_DECODER,
                score=Term("carried_score"),
                select=Term("top_k_and_uniform_per_window", {"contextual": 0.05, **_WINDOWS, **_RATES}),
                merge=Term("nearest_target_in_window", _WINDOWS),
                share=0.1,
                scope="whole",
            ),
        ),
        notes="Windows of one temporal grid of video and two moments of sound; in each, a twentieth of its tokens are "
        "targets that the dropped ones merge into. The authors compare keys of the towers for that, here it is the "
        "tokens the LLM reads. They round a window's numbers by itself; here the planned total is shared out to "
        "windows, and a window that keeps one token has no target. The attention is that of the layer the projector "
        f"reads. {_ABOUT_RATES}",
        settings=_settings(_PAIRS),
    ),
    Recipe(
        name="fastv_omni",
        title=f"{_PORT} (its port of FastV)",
        link=_SEATS,
        stages=(
            Stage(
                Site("decoder.layer", 2),
                score=Term("last_query_attention_mean", {"heads": "mean"}),
                select=Term("top_k_per_modality", {"share": "removed", **_RATES}),
                share=round((0.1 - 2 / 28) / (1 - 2 / 28), 4),
                scope="whole",
                signals={"last_query_attention": {"projections": "own"}},
            ),
        ),
        cache="shrink",
        notes="K = 2 in models of any depth. The tokens that leave are shared out to kinds so that the averages over "
        "all layers are the pair, which is the authors' conversion of rates; no pair below 2 / layers can be met, and "
        "they publish none. As they do, layer 2's own projections are applied once more to what it returns, and the "
        "caches of the first layers shrink as well. `fastv` itself ranks what is seen and heard together. "
        f"{_ABOUT_RATES}",
        settings=_settings(_PAIRS[:3], 2 / 28),
    ),
    Recipe(
        name="contextguard_proxy",
        title="ContextGuard (a training-free proxy of it)",
        link="https://arxiv.org/abs/2605.11605",
        stages=(
            Stage(_BEFORE_DECODER, score=Term("unlike_sound"), select=Term("top_k"), share=0.45, scope="whole"),
        ),
        evidence="reconstructed",
        notes="Not ContextGuard: a stand-in that needs no training. The authors train a predictor from sound to coarse "
        "visual meaning and prune the video it foretells; here a video token goes first whose cosine with the mean "
        "direction of its window's sound is high, and all sound stays as long as the budget holds it. Windows of two "
        "moments are ours. The tokens they keep for local detail, and the merging of what is alike in time, are left "
        "out: no formula of either could be found, nor any code. Figures of the paper do not apply. Needs sound.",
        settings=(Setting("Qwen2.5-Omni-7B", 0.45, "55 % of the tokens pruned"),),
    ),
    Recipe(
        name="echoingpixels",
        title="EchoingPixels: Cross-Modal Adaptive Token Reduction for Efficient Audio-Visual LLMs (its score head)",
        link="https://arxiv.org/abs/2512.10324",
        stages=(
            Stage(
                _BEFORE_DECODER, score=Term("learned_perceptron"), select=Term("top_k"), share=0.2, scope="whole",
                rounds="up",
            ),
        ),
        evidence="reconstructed",
        notes="Needs a file of weights: --recipe echoingpixels:weights=FILE.safetensors with norm.weight [D], "
        "up.weight [W,D], up.bias [W] and down.weight [1,W] (in the authors' model compressor.ln.weight, "
        "compressor.score_head.0.weight and .bias, and compressor.score_head.2.weight; W is D there). One pool of all "
        "that is seen and heard. It is their code with no refiner layers: the four layers of two-way attention before "
        "the head, whose states the survivors take on, and the rotary embedding with a fourth axis are a change of the "
        "model, and a head trained behind them has to be trained anew without.",
        settings=(Setting("Qwen2.5-Omni-3B", 0.2, "compression ratio 0.2"),),
    ),
)  # fmt: skip
