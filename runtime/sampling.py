"""Choosing the next token from logits: greedy or drawn, after everything that rules tokens out or weighs them.

The order and the edge cases are those of transformers' logits processors, so the same settings keep the
same set of candidates there and here. NumPy, one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from secateur.runtime.errors import UserError
from secateur.runtime.generation_fields import APPLIED
from secateur.runtime.logits_processors import PROCESSORS, Context, penalize_repetition
from secateur.runtime.logits_warpers import WARPERS, log_softmax, softmax

__all__ = ["Sampler", "Sampling", "check_tokens", "filter_logits", "penalize_repetition", "softmax"]

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Sampling:
    """How to choose. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off.

    All but ``seed`` are named, and mean, what they do in transformers' GenerationConfig; as they stand here they are
    off. What is said of drawing (``top_k`` to ``eta_cutoff``) is not looked at when the choice is greedy.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    top_h: float | None = None
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    sequence_bias: Sequence[tuple[Sequence[int], float]] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_eos_token_id: Sequence[int] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False

    def __post_init__(self) -> None:
        if not (self.seed is None or (type(self.seed) is int and self.seed >= 0)):
            raise UserError(f"seed is {self.seed}", where="sampling", fix="it must be 0 or more")
        for name in (field.name for field in fields(self) if field.name in APPLIED):
            value, rule = getattr(self, name), APPLIED[name]
            greedy = name == "temperature" and value == 0
            if not (greedy or value == rule.off or rule.valid(value)):
                want = "0 (greedy) or more" if name == "temperature" else rule.want
                raise UserError(f"{name} is {value!r}", where="sampling", fix=f"it must be {want}")

    def active(self, names: Iterable[str]) -> list[tuple[str, Any]]:
        """Those of ``names`` that change something, with their values, in the order of ``names``."""
        found = [(name, getattr(self, name)) for name in names]
        return [(n, v) for n, v in found if v is not None and not (v == APPLIED[n].off or (_is_empty(v)))]


class Sampler:
    """Draws tokens for a batch. Every row has its own random stream and its own history.

    ``prompts`` are every row's tokens, as the checkpoint's own processor writes them. ``length`` is how many tokens
    transformers counts of the longest prompt, None for as many as there are. ``max_new_tokens`` and ``eos`` are where
    a row ends. Raises UserError where a setting names a token outside the vocabulary.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        *,
        length: int | None = None,
        max_new_tokens: int = 0,
        eos: Iterable[int] = (),
    ) -> None:
        check_tokens(sampling, vocab_size)
        self._sampling = sampling
        self._histories = [[int(token) for token in prompt] for prompt in prompts]
        self._prompts = [len(prompt) for prompt in prompts]
        self._length = max(self._prompts, default=0) if length is None else length
        self._room, self._eos = max_new_tokens, np.array(sorted(set(eos)), dtype=np.int64)
        self._processors: list[tuple[Callable[..., Floats], Any]] = [
            (PROCESSORS[name], value) for name, value in sampling.active(PROCESSORS)
        ]
        streams = SeedSequence(sampling.seed).spawn(len(prompts))
        self._random = [Generator(PCG64(stream)) for stream in streams]

    def draw(self, logits: Floats, done: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Next token of every row: ``logits`` [B, vocab] float32 -> int64 [B]. Rows that are ``done``, bool [B], get
        0, whatever theirs are."""
        ended = np.zeros(len(logits), dtype=bool) if done is None else done
        tokens = [0 if ended[row] else self._draw_row(row, logits[row]) for row in range(len(logits))]
        for history, token in zip(self._histories, tokens, strict=True):
            history.append(token)
        return np.array(tokens, dtype=np.int64)

    def weigh(self, row: int, logits: Floats) -> Floats:
        """What the next token of a row is chosen by: ``logits`` [vocab] float32 -> [vocab]; float64 when drawing."""
        if self._processors:
            ids = np.array(self._histories[row], dtype=np.int64)
            new = len(ids) - self._prompts[row]
            context = Context(ids, self._prompts[row], self._length + new, self._room, self._eos)
            for process, value in self._processors:
                logits = process(logits, context, value)
        if self._sampling.temperature > 0.0:
            logits = filter_logits(logits, self._sampling)
        if self._sampling.renormalize_logits:
            _require_candidate(logits)
            logits = log_softmax(np.asarray(logits, dtype=np.float64))
        return logits

    def _draw_row(self, row: int, logits: Floats) -> int:
        scores = self.weigh(row, logits)
        if self._sampling.temperature == 0.0:
            return int(np.argmax(scores))
        probabilities = softmax(scores)
        # The inverse of the cumulative distribution at one uniform number; the last step of the
        # search guards against a sum that rounding left below 1.
        cumulative = np.cumsum(probabilities)
        index = int(np.searchsorted(cumulative, self._random[row].random() * cumulative[-1], side="right"))
        return min(index, int(np.flatnonzero(probabilities)[-1]))


def filter_logits(logits: Floats, how: Sampling) -> Floats:
    """Temperature, then the filters of ``WARPERS``: [vocab] -> float64 [vocab], dropped candidates at -inf."""
    scores: Floats = np.asarray(logits, dtype=np.float64)
    _require_candidate(scores)
    for name, value in how.active(WARPERS):
        scores = WARPERS[name](scores, value)
    return scores


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not value


def check_tokens(sampling: Sampling, vocab_size: int, where: str = "sampling") -> None:
    """Raises UserError where a setting names a token that is none of the vocabulary's."""
    named = {
        "sequence_bias": [token for sequence, _ in sampling.sequence_bias for token in sequence],
        "bad_words_ids": [token for word in sampling.bad_words_ids for token in word],
        "forced_eos_token_id": list(sampling.forced_eos_token_id),
    }
    for name, tokens in named.items():
        if tokens and max(tokens) >= vocab_size:
            raise UserError(
                f"{name} names token {max(tokens)}", where=where,
                fix=f"the vocabulary's are 0 to {vocab_size - 1}",
            )  # fmt: skip


def _require_candidate(scores: Floats) -> None:
    if not np.isfinite(scores.max()):
        raise UserError(
            "every token is ruled out", where="sampling",
            fix="lift one of suppress_tokens, bad_words_ids, sequence_bias or no_repeat_ngram_size",
        )  # fmt: skip
