"""Ask a bundle the held-out questions, one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.request import Request
from secateur.runtime.session import Session


@dataclass(frozen=True)
class Asked:
    """A held-out question. ``ranking`` int64 [196]: patches, the ones with most ink first."""

    kind: str
    image: NDArray[np.uint8]
    text: str
    answer: str
    ranking: NDArray[np.int64]


class UnprunedVision:
    """Features of every question's image by the unpruned tower, float32 [1, N, D], computed when first asked for."""

    def __init__(self, bundle: Path, questions: list[Asked], threads: int) -> None:
        self._session = Session(bundle, threads=threads)
        self._request = self._session.request()
        self._questions = questions
        self._found: dict[int, NDArray[np.float32]] = {}

    def features(self, index: int) -> NDArray[np.float32]:
        if index not in self._found:
            pixels = self._session.processor.pixel_values(self._questions[index].image)
            self._found[index] = self._request.encode(pixels[None])
        return self._found[index]

    def is_that_of(self, session: Session) -> bool:
        """Whether a bundle's vision program computes the same: same graph, same weights."""
        mine, other = self._session.manifest.files, session.manifest.files
        return all(mine[path].sha256 == other[path].sha256 for path in ("vision.onnx", session.manifest.weights))

    def close(self) -> None:
        self._session.close()


def ask_all(
    bundle: Path,
    questions: list[Asked],
    vision: UnprunedVision,
    *,
    by_oracle: bool,
    threads: int,
    advance: Callable[[], None],
) -> list[bool]:
    """Whether each question is answered right: the one right token, then the end of the answer.

    A bundle that prunes in the decoder only is given the unpruned features, which are what its own tower computes.
    """
    with Session(bundle, threads=threads) as session:
        request = session.request()
        reuse = vision.is_that_of(session)
        right = []
        for index, asked in enumerate(questions):
            features = kept = None
            if by_oracle:
                kept = choose_patches(asked.ranking, session.manifest.geometry.features)[None]
                features = vision.features(index)[:, kept[0]]
            elif reuse:
                features = vision.features(index)
            else:
                request.encode(session.processor.pixel_values(asked.image)[None])
            right.append(_answers(session, request, asked, features, kept))
            advance()
    return right


def choose_patches(ranking: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The best ``count`` patches in image order, int64 [count]."""
    return np.sort(ranking[:count])


def _answers(session: Session, request: Request, asked: Asked, features: Any, kept: Any) -> bool:
    prompt = session.processor.encode(asked.text)
    ids = np.full((1, session.manifest.geometry.sequence), session.manifest.model.pad_token_id, np.int64)
    ids[0, : len(prompt)] = prompt
    logits = request.prefill(ids, np.array([len(prompt)]), features, kept)
    first = int(logits[0].argmax())
    if [first] != session.processor.prompts.encode(asked.answer, False):
        return False
    return int(session.decode(request, np.array([first]))[0].argmax()) in session.manifest.model.eos_token_ids
