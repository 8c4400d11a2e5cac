"""Questions with answers: the demo model's held-out set, or the lines of a JSONL file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.compiler.pipeline import read_questions as read_lines
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import hash_file
from secateur.runtime.pictures import ImageLike

DEMO = "demo"
DRAWN = 100_000
"""Questions of the demo set that are drawn at most: their pictures lie in memory."""


@dataclass(frozen=True)
class Question:
    """``images`` are paths (or pixels, in the demo set) and are opened when asked; ``where`` is for messages.

    ``ranking`` int64 [N], where it is known: the patches of the one image, the best first.
    """

    images: tuple[ImageLike, ...]
    text: str
    answer: str
    where: str
    kind: str = ""
    ranking: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Questions:
    """Questions of one layout (the same number of images each); ``digest`` covers texts, answers and pixels."""

    name: str
    asked: tuple[Question, ...]
    digest: str

    @property
    def images(self) -> int:
        return len(self.asked[0].images)


def read_questions(source: str, count: int | None) -> Questions:
    """The first ``count`` questions (None: all) of a JSONL file, or of the demo set for ``"demo"``."""
    if source == DEMO:
        return read_demo(count or 1000)
    return read_jsonl(Path(source), count)


def read_jsonl(path: Path, count: int | None) -> Questions:
    """Lines of ``image`` (a path, or a list of them, relative to the file), ``question`` and ``answer``.

    Raises UserError with the line and the field for the first that is not so.
    """
    asked: list[Question] = []
    for line in read_lines(path, count):
        if not line.answer or not line.answer.strip():
            raise UserError("no field 'answer', or an empty one", where=line.where, fix="give the expected text")
        if asked and len(line.images) != len(asked[0].images):
            raise UserError(
                f"{len(line.images)} images, {asked[0].where} has {len(asked[0].images)}",
                where=line.where,
                fix="a bundle is compiled for one number of images: split the file",
            )
        asked.append(Question(tuple(line.images), line.text, line.answer, line.where))
    return Questions(path.name, tuple(asked), _digest(asked))


def read_demo(count: int) -> Questions:
    """Held-out questions about scenes of digits; every sixth is of the same kind. At most :data:`DRAWN`."""
    if count > DRAWN:
        raise UserError(f"{count} questions are asked for", where=DEMO, fix=f"draw at most {DRAWN}")
    try:
        from secateur.tools.demo.language import KINDS
        from secateur.tools.demo.scenes import held_out
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(("secateur.tools.demo", "sklearn")):
            raise
        raise UserError(
            "the demo set is drawn by code that is not installed", where=DEMO,
            fix="run from a checkout of the repository (make setup), or give a JSONL file",
        ) from None  # fmt: skip
    asked = [
        Question((image,), text, answer, f"demo question {i}", KINDS[i % len(KINDS)], scene.rank_patches())
        for i, (image, text, answer, scene) in enumerate(held_out(count))
    ]
    return Questions(DEMO, tuple(asked), _digest(asked))


def is_right(given: str, wanted: str) -> bool:
    """Whether two answers are the same but for case, spacing and a final full stop."""
    return _normalise(given) == _normalise(wanted)


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _digest(asked: list[Question]) -> str:
    """Over everything the answers depend on; an image that several questions share is hashed once."""
    found = hashlib.sha256()
    known: dict[Path, str] = {}
    for question in asked:
        for image in question.images:
            if isinstance(image, Path):
                known[image] = known.get(image) or hash_file(image)
                found.update(known[image].encode())
            else:
                found.update(np.ascontiguousarray(image).tobytes())
        ranking = None if question.ranking is None else question.ranking.tolist()
        found.update(json.dumps([question.text, question.answer, ranking]).encode())
    return found.hexdigest()
