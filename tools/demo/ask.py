"""The demo's figures: the same questions put to several bundles, answers first, then times in turn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import UserError
from secateur.runtime.kv import cache_bytes
from secateur.runtime.results import Metrics
from secateur.runtime.schema import PROGRAMS
from secateur.runtime.session import Session

TIMES = ("vision", "prefill", "ttft", "tpot")


@dataclass(frozen=True)
class Question:
    image: Path
    text: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """What a bundle answered, and which patches were left: per stage int64 [K], original indices."""

    text: str
    right: bool
    kept: list[NDArray[np.int64]]


@dataclass
class Bundle:
    """A compiled recipe on show; ``seconds`` are medians by the names in ``TIMES``."""

    label: str
    session: Session
    asked: list[Asked] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def visual_tokens(self) -> list[tuple[int, int]]:
        """(layers, visual tokens of a row) per segment."""
        m = self.session.manifest
        return [(s.last_layer - s.first_layer, s.length - m.geometry.fixed_tokens) for s in m.segments]

    @property
    def flops(self) -> dict[str, int]:
        programs = self.session.manifest.programs
        return {name: programs[name].flops for name in PROGRAMS}

    @property
    def unpruned_flops(self) -> dict[str, int]:
        programs = self.session.manifest.programs
        return {name: programs[name].unpruned_flops for name in PROGRAMS}

    @property
    def cache_bytes(self) -> int:
        return cache_bytes(self.session.manifest)


def read_questions(path: Path) -> list[Question]:
    """A JSON list of {image, question, answer}; image paths are relative to the file."""
    if not path.is_file():
        raise UserError("no such file", where=str(path), fix="run from the repository's root, or give --questions")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [Question(path.parent / e["image"], str(e["question"]), str(e["answer"])) for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"not a list of questions ({type(error).__name__}: {error})", where=str(path),
            fix="each entry has image, question and answer",
        ) from None  # fmt: skip


def ask_bundle(bundle: Bundle, questions: Sequence[Question], advance: Callable[[], None]) -> None:
    """Greedy answers to all questions."""
    for question in questions:
        answer = bundle.session.generate(question.text, question.image, temperature=0.0)
        text = answer.text.strip()
        kept = [indices[0] for indices in answer.metrics.kept.values()]
        bundle.asked.append(Asked(text, text == question.answer, kept))
        advance()


def time_bundles(
    bundles: Sequence[Bundle], questions: Sequence[Question], repeat: int, advance: Callable[[], None]
) -> None:
    """Medians over all questions and repeats. Every question goes to every bundle in turn, so that a machine that
    slows down slows all of them; the first round does not count."""
    samples: list[list[Metrics]] = [[] for _ in bundles]
    for turn in range(repeat + 1):
        for question in questions:
            for bundle, sample in zip(bundles, samples, strict=True):
                told = bundle.session.generate(question.text, question.image, temperature=0.0, ignore_eos=True)
                metrics = told.metrics
                if turn:
                    sample.append(metrics)
            advance()
    for bundle, sample in zip(bundles, samples, strict=True):
        bundle.seconds = {name: statistics.median(getattr(m, f"{name}_s") for m in sample) for name in TIMES}


def report(bundles: Sequence[Bundle], questions: Sequence[Question]) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "questions": [
            {"image": q.image.name, "question": q.text, "expected": q.answer,
             "answers": {b.label: {"text": b.asked[i].text, "right": b.asked[i].right} for b in bundles}}
            for i, q in enumerate(questions)
        ],
        "bundles": [
            {
                "label": b.label,
                "bundle": str(b.session.path),
                "recipe": b.session.manifest.recipe.name,
                "keep": b.session.manifest.recipe.keep,
                "right": sum(asked.right for asked in b.asked),
                "visual_tokens": [{"layers": layers, "tokens": tokens} for layers, tokens in b.visual_tokens],
                "flops": b.flops,
                "unpruned_flops": b.unpruned_flops,
                "cache_bytes": b.cache_bytes,
                "median_seconds": b.seconds,
            }
            for b in bundles
        ],
    }  # fmt: skip
