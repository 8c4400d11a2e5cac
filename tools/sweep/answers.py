"""Ask a bundle questions, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import SecateurError, UserError
from secateur.runtime.processing import RowMedia
from secateur.runtime.request import Request
from secateur.runtime.session import Session
from secateur.tools.sweep.data import Question

ROOM = 512 << 20
"""Bytes of features kept: those of more questions are computed again for every bundle."""


class Unpruned:
    """The unpruned bundle, open. It lends its tower's features to bundles that prune in the decoder alone."""

    def __init__(self, bundle: Path, questions: Sequence[Question], threads: int | None) -> None:
        self.session = Session(bundle, threads=threads)
        self._request = self.session.request()
        self._questions = questions
        self._found: dict[int, NDArray[np.float32]] = {}
        self._bytes = 0

    def __enter__(self) -> Unpruned:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.close()

    def check_prompts(self) -> None:
        """Refuse, before hours of asking, a prompt that does not fit the text bucket."""
        for question in self._questions:
            self.session.processor.encode(question.text, question.where)

    def features(self, index: int) -> NDArray[np.float32]:
        """Of one question's images, float32 [1, F, D]."""
        if index in self._found:
            return self._found[index]
        features = self._request.encode(read_pixels(self.session, self._questions[index]))
        if self._bytes + features.nbytes <= ROOM:
            self._found[index] = features
            self._bytes += features.nbytes
        return features

    def has_vision_of(self, session: Session) -> bool:
        """Whether a bundle's vision program computes the same: same graph, same weights."""
        mine, other = self.session.manifest, session.manifest
        paths = ("vision.onnx", *other.weights)
        return mine.weights == other.weights and all(mine.files[p].sha256 == other.files[p].sha256 for p in paths)


def answer_all(
    session: Session,
    questions: Sequence[Question],
    unpruned: Unpruned,
    *,
    by_oracle: bool,
    advance: Callable[[], None],
) -> list[str]:
    """The greedy answer to each question, at most as long as the bundle's room for new tokens.

    ``by_oracle``: the unpruned features of each question's best patches go in, whatever the bundle's tower keeps.
    A bundle that prunes in the decoder only is given the unpruned features, which are what its own tower computes.
    """
    request = session.request()
    lent = unpruned.has_vision_of(session)
    found = []
    for index, question in enumerate(questions):
        features = kept = None
        if by_oracle:
            assert question.ranking is not None, f"{question.where} has no ranking of its patches"
            kept = choose_patches(question.ranking, session.manifest.geometry.features)[None]
            features = unpruned.features(index)[:, kept[0]]
        elif lent:
            features = unpruned.features(index)
        else:
            request.encode(read_pixels(session, question))
        found.append(_answer(session, request, question, features, kept))
        advance()
    return found


def choose_patches(ranking: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The best ``count`` patches in image order, int64 [count]."""
    return np.sort(ranking[:count])


def read_pixels(session: Session, question: Question) -> NDArray[np.float32]:
    """The question's images for the vision program, float32 [n, 3, H, W] or patches."""
    try:
        return session.processor.tower_input(RowMedia(question.images))[0]
    except SecateurError as error:
        raise UserError(str(error), where=f"{question.where}: image") from error


def _answer(
    session: Session,
    request: Request,
    question: Question,
    features: NDArray[np.float32] | None,
    kept: NDArray[np.int64] | None,
) -> str:
    manifest = session.manifest
    prompt = session.processor.encode(question.text, question.where)
    ids = np.full((1, manifest.geometry.sequence), manifest.model.pad_token_id, np.int64)
    ids[0, : len(prompt)] = prompt
    logits = request.prefill(ids, np.array([len(prompt)]), features, kept)
    tokens: list[int] = []
    while (token := int(logits[0].argmax())) not in manifest.model.eos_token_ids:
        tokens.append(token)
        if len(tokens) == manifest.geometry.new_tokens:
            break
        logits = session.decode(request, np.array([token]))
    return session.processor.prompts.decode(tokens).strip()
