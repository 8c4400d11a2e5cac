"""Questions about clips: held-out ones by seed, and the shipped ones from their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.tools.demo.omni.clips import Clip, make_clip
from secateur.tools.demo.omni.files import read_frames, read_questions, read_sound
from secateur.tools.demo.omni.language import KINDS, answer_question, phrase_question


@dataclass(frozen=True, eq=False)
class Asked:
    """One question: ``frames`` uint8 [8, 112, 112, 3], ``wave`` float32 [64000], and which clip of which kind where
    that is known."""

    name: str
    frames: NDArray[np.uint8]
    wave: NDArray[np.float32]
    text: str
    answer: str
    kind: str | None = None
    clip: Clip | None = None


def held_out(clips: int, first: int = 0) -> list[Asked]:
    """All kinds of question about held-out clips ``first`` to ``first + clips - 1``, wordings in turn."""
    asked = []
    for seed in range(first, first + clips):
        clip = make_clip(seed, "held_out")
        for number, kind in enumerate(KINDS):
            text, answer = phrase_question(kind, seed + number), answer_question(kind, clip)
            asked.append(Asked(str(seed), clip.video.frames, clip.audio.wave, text, answer, kind, clip))
    return asked


def load_shipped(path: Path) -> list[Asked]:
    """The questions of a ``questions.json`` with the clips they are about."""
    questions: Sequence = read_questions(path)
    return [
        Asked(
            question.frames.stem,
            read_frames(question.frames),
            read_sound(question.sound),
            question.text,
            question.answer,
        )
        for question in questions
    ]
