"""What leaves unlikely candidates out before one is drawn.

``WARPERS`` holds them by their names in transformers' GenerationConfig and in the order in which transformers applies
them; each leaves the candidates that the class of transformers leaves which its name stands for. NumPy, one row at a
time: ``scores`` [vocab] float64 -> [vocab], what is left out at minus infinity. One candidate stays always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.floating]"

_TOP_H_CANDIDATES = 100
"""Top-h looks at no more than this many, here and in transformers."""


def softmax(scores: Floats) -> Floats:
    """Over the last axis, in the scores' own precision."""
    exponent = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exponent / exponent.sum(axis=-1, keepdims=True))


def log_softmax(scores: Floats) -> Floats:
    """Over the last axis, in the scores' own precision."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def scale(scores: Floats, temperature: float) -> Floats:
    return np.asarray(scores, dtype=np.float64) / temperature


def keep_top_h(scores: Floats, top_h: float) -> Floats:
    """The likeliest candidates whose parts of the entropy add up to at most ``top_h`` of it (Top-H decoding)."""
    order = np.argsort(-scores, kind="stable")[:_TOP_H_CANDIDATES]
    logs = log_softmax(scores[order])
    chances = np.exp(logs)
    parts = np.where(chances > 0, -chances * np.where(chances > 0, logs, 0.0), 0.0)
    keep = np.cumsum(parts) <= parts.sum() * top_h
    keep[0] = True
    # Where a candidate has no chance left, transformers' sum is not a number, and ends there.
    keep &= (chances > 0) | (np.arange(len(order)) == 0)
    left = np.full_like(scores, -np.inf)
    left[order[keep]] = scores[order[keep]]
    return left


def keep_top_k(scores: Floats, top_k: int) -> Floats:
    """The ``top_k`` likeliest, and those as likely as the last of them."""
    if not 0 < top_k < scores.size:
        return scores
    return np.where(scores < np.partition(scores, -top_k)[-top_k], -np.inf, scores)


def keep_top_p(scores: Floats, top_p: float) -> Floats:
    """The fewest likeliest whose mass reaches ``top_p``."""
    order = np.argsort(scores, kind="stable")
    drop = np.cumsum(softmax(scores[order])) <= 1.0 - top_p
    drop[-1] = False
    scores = scores.copy()
    scores[order[drop]] = -np.inf
    return scores


def keep_min_p(scores: Floats, min_p: float) -> Floats:
    """Candidates with at least ``min_p`` times the chance of the likeliest."""
    chances = softmax(scores)
    return _leave_out(scores, chances < min_p * chances.max())


def keep_typical(scores: Floats, mass: float) -> Floats:
    """Those whose surprise is nearest the entropy, until their mass reaches ``mass`` (arXiv:2202.00666)."""
    logs = log_softmax(scores)
    chances = np.exp(logs)
    entropy = -np.nansum(np.where(chances > 0, chances * np.where(chances > 0, logs, 0.0), 0.0))
    away = np.abs(-logs - entropy)
    order = np.argsort(away, kind="stable")
    last = min(int((np.cumsum(chances[order]) < mass).sum()), scores.size - 1)
    drop = away > away[order[last]]
    drop[order[0]] = False
    return np.where(drop, -np.inf, scores)


def cut_epsilon(scores: Floats, epsilon: float) -> Floats:
    """Candidates with a chance of at least ``epsilon`` (arXiv:2210.15191)."""
    return _leave_out(scores, softmax(scores) < epsilon)


def cut_eta(scores: Floats, epsilon: float) -> Floats:
    """Those with a chance of at least the lesser of ``epsilon`` and ``sqrt(epsilon) * exp(-entropy)``
    (arXiv:2210.15191)."""
    logs = log_softmax(scores)
    chances = np.exp(logs)
    entropy = -np.where(chances > 0, chances * np.where(chances > 0, logs, 0.0), 0.0).sum()
    return _leave_out(scores, chances < min(epsilon, np.sqrt(epsilon) * np.exp(-entropy)))


WARPERS: dict[str, Callable[[Floats, float], Floats]] = {
    "temperature": scale,
    "top_h": keep_top_h,
    "top_k": keep_top_k,  # type: ignore[dict-item]  # whole numbers, checked before
    "top_p": keep_top_p,
    "min_p": keep_min_p,
    "typical_p": keep_typical,
    "epsilon_cutoff": cut_epsilon,
    "eta_cutoff": cut_eta,
}


def _leave_out(scores: Floats, drop: NDArray[np.bool_]) -> Floats:
    """Those to ``drop`` at minus infinity; the likeliest, and all as likely, stay."""
    return np.where(drop & (scores < scores.max()), -np.inf, scores)
