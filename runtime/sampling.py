"""Choosing the next token from logits: greedy, or temperature, top-k and top-p, with a repetition penalty.

The order and the edge cases are those of transformers' logits processors, so the same settings keep the
same set of candidates there and here. NumPy, one row at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from secateur.runtime.errors import UserError

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Sampling:
    """How to choose. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off.

    ``repetition_penalty`` divides the positive and multiplies the negative logits of every token that
    stands in the prompt or was generated; 1 is off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, valid, want in (
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]; 1 is off"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0; 1 is off"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)}", where="sampling", fix=f"it must be {want}")


class Sampler:
    """Draws tokens for a batch. Every row has its own random stream and its own history."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._sampling = sampling
        self._seen = np.zeros((len(prompts), vocab_size), dtype=bool)
        for row, prompt in enumerate(prompts):
            ids = np.asarray(prompt, dtype=np.int64)
            self._seen[row, ids[(ids >= 0) & (ids < vocab_size)]] = True
        streams = SeedSequence(sampling.seed).spawn(len(prompts))
        self._random = [Generator(PCG64(stream)) for stream in streams]

    def draw(self, logits: Floats) -> NDArray[np.int64]:
        """Next token of every row: ``logits`` [B, vocab] float32 -> int64 [B]."""
        tokens = np.array([self._draw_row(row, logits[row]) for row in range(len(logits))], dtype=np.int64)
        self._seen[np.arange(len(tokens)), tokens] = True
        return tokens

    def _draw_row(self, row: int, logits: Floats) -> int:
        how = self._sampling
        if how.repetition_penalty != 1.0:
            logits = penalize_repetition(logits, self._seen[row], how.repetition_penalty)
        if how.temperature == 0.0:
            return int(np.argmax(logits))
        probabilities = softmax(filter_logits(logits, how))
        # The inverse of the cumulative distribution at one uniform number; the last step of the
        # search guards against a sum that rounding left below 1.
        cumulative = np.cumsum(probabilities)
        index = int(np.searchsorted(cumulative, self._random[row].random() * cumulative[-1], side="right"))
        return min(index, int(np.flatnonzero(probabilities)[-1]))


def penalize_repetition(logits: Floats, seen: NDArray[np.bool_], penalty: float) -> Floats:
    """Make seen tokens less likely, once each: ``logits`` [vocab], ``seen`` bool [vocab]."""
    return np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: Floats, how: Sampling) -> Floats:
    """Temperature, then top-k, then top-p: [vocab] -> float64 [vocab], dropped candidates at -inf."""
    scores = np.asarray(logits, dtype=np.float64) / how.temperature
    if 0 < how.top_k < scores.size:
        # Ties with the k-th stay, as in transformers.
        scores = np.where(scores < np.partition(scores, -how.top_k)[-how.top_k], -np.inf, scores)
    if how.top_p < 1.0:
        order = np.argsort(scores, kind="stable")
        drop = np.cumsum(softmax(scores[order])) <= 1.0 - how.top_p
        drop[-1] = False
        scores = scores.copy()
        scores[order[drop]] = -np.inf
    return scores


def softmax(scores: Floats) -> Floats:
    """Over the last axis, in the scores' own precision."""
    exponent = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exponent / exponent.sum(axis=-1, keepdims=True))
