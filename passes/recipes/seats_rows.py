"""SEATS in full: three places, one schedule, caches that shrink; one row for each of its two models."""

from __future__ import annotations

from secateur.compiler.recipe import Recipe, Setting, Site, Stage, Term
from secateur.compiler.schedule import Exponential

_NOTES = (
    "Stage I before the LLM: the encoder's attention weighs a greedy max-min over the tokens the LLM reads, in every "
    "window of two frames, or of two seconds of sound, by itself. Stage II inside it: a softmax over windows of mean "
    "last-token attention gives each window its budget, and kinds of token their part of it; a window without tokens "
    "of one kind has mean 0 for it and takes part, so that where a video is longer than its sound what is heard falls "
    "below its rate and what is seen rises above; budgets are rounded and repaired as the authors do. Where nothing "
    "is heard the highest attention decides alone, as in theirs. Stage III: none is left, nor in the caches of any "
    "layer. {windows} Images of a prompt are frames, and a sound beside them is spread over them, so that the means of "
    "both kinds are met; the authors pair runs of image tokens with runs of sound in their order, which puts a whole "
    "sound beside the first image. They take a kind's number as a part of what is left of it, here it is in "
    "proportion to its tokens and rate at every step. Where the least of one token a window and kind comes to more "
    "than planned, the largest budgets give way, so that exactly the planned number stays. The encoder attention runs "
    "over one image and is that of the layer the projector reads; theirs is the last layer's, taken anew inside the "
    "window. keep is what is left before the last stage; the authors name the average over all layers, of what is seen "
    "and of what is heard: --mean-keep takes such a pair, and where there is sound the default is the pair of the row. "
    "In a shallow model steps that fall on one layer become one."
)
_TWO = (
    "Windows of stage II are two temporal grids with their audio tokens: the authors' runs of tokens at two frames a "
    "second, but that a video's end after its sound is one run there, and that a sound after its whole video "
    "(--no-audio-in-video) is one run there and has the windows of its time here."
)
_ONE = (
    "Windows of stage II are one temporal grid with its audio tokens, as the authors' runs of tokens are, but that a "
    "video's end after its sound is one run there, and that a sound after its whole video (--no-audio-in-video) is "
    "one run there and has the windows of its time here."
)


def _row(
    name: str, depth: int, steps: tuple[int, ...], leaves: int, drop: tuple[float, ...], temperature: float,
    model: str, pairs: tuple[tuple[float, float], ...], rates: tuple[float, float], grids: int, sound: int,
) -> Recipe:  # fmt: skip
    """``drop`` is the part of the entering tokens that is gone after each step, ``rates`` the averages aimed at: of
    vision tokens and of audio tokens. A run of tokens has ``grids``, two seconds have ``sound`` tokens."""
    default = rates[0]
    attention = Term("last_query_attention_mean", {"heads": "mean"})
    enter = 1.4 * default
    return Recipe(
        name=name,
        title="Stage-adaptive Token Selection for Efficient Omni-modal LLMs",
        link="https://arxiv.org/abs/2605.20035",
        stages=(
            Stage(Site("projector.out"), None, score=Term("received_attention_mean")),
            Stage(Site("audio.out"), None, score=Term("received_attention_mean")),
            Stage(
                Site("decoder.layer", 0),
                score=Term("carried_score"),
                select=Term("windowed_max_min", {"frames": 2, "rates": list(rates), "sound": sound}),
                share=round(enter, 4),
                scope="whole",
            ),
            *(
                Stage(
                    Site("decoder.layer", layer, depth),
                    score=Term(
                        "window_modality_quotas",
                        {"temperature": temperature, "frames": grids, "rates": list(rates), "alone": "highest"},
                        of=(attention,),
                    ),
                    select=Term("top_k"),
                    share=round(enter * (1.0 - gone), 4),
                    scope="whole",
                    signals={"last_query_attention": {"projections": "own"}},
                )
                for layer, gone in zip(steps, drop, strict=True)
            ),
            Stage(Site("decoder.layer", leaves, depth), select=Term("nothing"), share=0.0, scope="whole"),
        ),
        cache="shrink",
        identity_at_one=False,
        collapses=True,
        schedule=Exponential(1.4, drop=drop[-1]),
        notes=_NOTES.format(windows=_TWO if grids == 2 else _ONE),
        settings=tuple(
            Setting(model, round(1.4 * video * (1.0 - drop[-1]), 4), f"video average {video:g}, beside audio {audio:g}")
            for video, audio in pairs
        ),
    )


ROWS = (
    _row(
        "seats", 28, (16, 18, 20), 23, (0.0702, 0.2609, 0.7793), 0.1, "Qwen2.5-Omni-7B",
        ((0.3, 0.65), (0.2, 0.55), (0.1, 0.45), (0.06, 0.35)), (0.1, 0.45), 2, 50,
    ),
    _row(
        "seats_qwen3_omni", 48, (27, 31, 35), 39, (0.0745, 0.2769, 0.8272), 0.3, "Qwen3-Omni-30B-A3B",
        ((0.32, 0.7), (0.22, 0.6), (0.12, 0.5), (0.07, 0.45)), (0.12, 0.5), 1, 26,
    ),
)  # fmt: skip
