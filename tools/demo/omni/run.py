"""Questions put to compiled bundles of the omni demo model, and the figures that come of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.tools.demo.ask import Asked as Answered
from secateur.tools.demo.ask import Bundle
from secateur.tools.demo.omni.clips import FRAMES_PER_SECOND, SAMPLING_RATE
from secateur.tools.demo.omni.inputs import CHUNK_AUDIO, CHUNK_VIDEO
from secateur.tools.demo.omni.language import KINDS
from secateur.tools.demo.omni.questions import Asked

Ints = NDArray[np.int64]


def ask_bundle(bundle: Bundle, questions: Sequence[Asked], advance: Callable[[], None]) -> None:
    """Greedy answers to all questions; one that goes on behind the right word is wrong."""
    for asked in questions:
        told = bundle.session.generate(
            asked.text, videos=asked.frames, audio=asked.wave, video_fps=FRAMES_PER_SECOND, audio_rate=SAMPLING_RATE,
            temperature=0.0,
        )  # fmt: skip
        text = told.text.strip()
        # A stage that leaves nothing chooses nothing.
        kept = [places[0] for places in told.metrics.kept.values() if places.shape[1]]
        bundle.asked.append(Answered(text, text == asked.answer, kept))
        advance()


def split_places(places: Ints) -> tuple[Ints, Ints]:
    """Which video tokens and which audio tokens some places of a clip are, each counted from 0 in order of time."""
    chunk, within = np.divmod(places, CHUNK_VIDEO + CHUNK_AUDIO)
    seen = within < CHUNK_VIDEO
    video = chunk[seen] * CHUNK_VIDEO + within[seen]
    return video, chunk[~seen] * CHUNK_AUDIO + within[~seen] - CHUNK_VIDEO


def measure_kinds(answered: Sequence[Answered], questions: Sequence[Asked]) -> dict[str, float]:
    """Share of right answers per kind of question, and of all under 'all'."""
    right = {
        kind: [told.right for told, asked in zip(answered, questions, strict=True) if asked.kind == kind]
        for kind in KINDS
    }
    shares = {kind: float(np.mean(values)) for kind, values in right.items() if values}
    return shares | {"all": float(np.mean([told.right for told in answered]))}


def report(bundles: Sequence[Bundle], questions: Sequence[Asked], samples: int) -> dict[str, Any]:
    """Everything as plain data; the first ``samples`` questions are the shipped ones, the others are held out."""
    return {
        "samples": [
            {"clip": asked.name, "question": asked.text, "expected": asked.answer,
             "answers": {b.label: {"text": b.asked[i].text, "right": b.asked[i].right} for b in bundles}}
            for i, asked in enumerate(questions[:samples])
        ],
        "bundles": [
            {
                "label": b.label,
                "bundle": str(b.session.path),
                "recipe": b.session.manifest.recipe.name,
                "keep": b.session.manifest.recipe.keep,
                "accuracy": measure_kinds(b.asked[samples:], questions[samples:]),
                "tokens": [{"layers": layers, "tokens": tokens} for layers, tokens in b.visual_tokens],
                "flops": b.flops,
                "unpruned_flops": b.unpruned_flops,
                "cache_bytes": b.cache_bytes,
            }
            for b in bundles
        ],
    }  # fmt: skip
