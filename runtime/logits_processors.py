"""What rules tokens out or makes them more or less likely before one is chosen, greedily or by drawing.

``PROCESSORS`` holds them by their names in transformers' GenerationConfig and in the order in which transformers
applies them; each equals the class of transformers that its name stands for. NumPy, one row at a time: ``scores``
[vocab] float32 -> [vocab].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.floating]"
Ints: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True)
class Context:
    """A row when its next token is chosen.

    ``ids`` int64 [N]: its prompt, media's placeholders among it, and its answer so far; the first ``prompt`` of them
    are the prompt's. ``length`` counts tokens of the whole sequence so far as transformers does: every placeholder of
    the unpruned model, and of a batch the longest prompt. ``eos`` int64 [E] are the tokens that end the row.
    """

    ids: Ints
    prompt: int
    length: int
    max_new_tokens: int
    eos: Ints

    @property
    def new(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.prompt


def ban(scores: Floats, tokens: Ints) -> Floats:
    """``tokens`` at minus infinity; those outside the vocabulary cannot be chosen anyway."""
    banned = scores.copy()
    banned[tokens[(tokens >= 0) & (tokens < scores.size)]] = -np.inf
    return banned


def add_sequence_bias(scores: Floats, context: Context, sequence_bias: Sequence[tuple[Sequence[int], float]]) -> Floats:
    """Adds a sequence's bias to its last token where the tokens before it are the end of ``context.ids``.

    Of a sequence that is there twice the last bias counts.
    """
    bias = np.zeros_like(scores)
    for sequence, value in {tuple(sequence): value for sequence, value in sequence_bias}.items():
        *before, last = sequence
        if len(before) <= len(context.ids) and [*context.ids[len(context.ids) - len(before) :]] == before:
            bias[last] += value
    return scores + bias


def penalize_prompt(scores: Floats, context: Context, penalty: float) -> Floats:
    """A token of the prompt is made more likely by ``penalty`` above 1: the repetition penalty's inverse."""
    return penalize_repetition(scores, _mark(scores, context.ids[: context.prompt]), 1 / penalty)


def penalize_seen(scores: Floats, context: Context, penalty: float) -> Floats:
    """The repetition penalty of every token of prompt and answer."""
    return penalize_repetition(scores, _mark(scores, context.ids), penalty)


def penalize_repetition(logits: Floats, seen: NDArray[np.bool_], penalty: float) -> Floats:
    """Make seen tokens less likely, once each: ``logits`` [vocab], ``seen`` bool [vocab]."""
    return np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)


def ban_repeated_ngrams(scores: Floats, context: Context, size: int) -> Floats:
    """No sequence of ``size`` tokens of prompt and answer comes again."""
    return _ban_ngrams_of(context.ids, scores, context, size)


def ban_ngrams_of_prompt(scores: Floats, context: Context, size: int) -> Floats:
    """No sequence of ``size`` tokens of the prompt is said again."""
    return _ban_ngrams_of(context.ids[: context.prompt], scores, context, size)


def ban_words(scores: Floats, context: Context, words: Sequence[Sequence[int]]) -> Floats:
    """No sequence of ``words`` is completed; those of one token that ends a row are left out, as in transformers."""
    ends = {int(token) for token in context.eos}
    kept = [(word, -np.inf) for word in words if not (len(word) == 1 and word[0] in ends)]
    return add_sequence_bias(scores, context, kept)


def hold_to_min_length(scores: Floats, context: Context, min_length: int) -> Floats:
    """No end before prompt and answer together have ``min_length`` tokens."""
    return ban(scores, context.eos) if context.length < min_length else scores


def hold_to_min_new_tokens(scores: Floats, context: Context, min_new_tokens: int) -> Floats:
    """No end before the answer has ``min_new_tokens`` tokens."""
    return ban(scores, context.eos) if context.new < min_new_tokens else scores


def force_end(scores: Floats, context: Context, forced: Sequence[int]) -> Floats:
    """The last token there is room for is one of ``forced``."""
    if context.new != context.max_new_tokens - 1:
        return scores
    only = np.full_like(scores, -np.inf)
    only[list(forced)] = 0
    return only


def remove_invalid(scores: Floats, context: Context, wanted: bool) -> Floats:
    """NaN becomes 0, infinities the largest and the smallest number of the type."""
    limits = np.finfo(scores.dtype)
    valid = np.clip(scores, limits.min, limits.max)  # NaN stays NaN
    return np.where(np.isnan(scores), scores.dtype.type(0), valid) if wanted else scores


def raise_end_with_length(scores: Floats, context: Context, penalty: tuple[int, float]) -> Floats:
    """Behind ``start`` new tokens the end gets likelier with each: ``|s| * (factor ** steps - 1)`` is added to it."""
    start, factor = penalty
    steps = context.new - start
    if steps <= 0:
        return scores
    raised = scores.copy()
    ends = context.eos[np.isfinite(scores[context.eos])]
    with np.errstate(over="ignore", invalid="ignore"):  # it may grow beyond all bounds
        raised[ends] += np.abs(scores[ends]) * scores.dtype.type(np.float64(factor) ** steps - 1)
    return raised


def suppress(scores: Floats, context: Context, tokens: Sequence[int]) -> Floats:
    return ban(scores, np.asarray(tokens, dtype=np.int64))


def suppress_at_begin(scores: Floats, context: Context, tokens: Sequence[int]) -> Floats:
    """Ruled out as the first token of an answer."""
    return suppress(scores, context, tokens) if context.new == 0 else scores


Process: TypeAlias = Callable[[Floats, Context, Any], Floats]

PROCESSORS: dict[str, Process] = {
    "sequence_bias": add_sequence_bias,
    "encoder_repetition_penalty": penalize_prompt,
    "repetition_penalty": penalize_seen,
    "no_repeat_ngram_size": ban_repeated_ngrams,
    "encoder_no_repeat_ngram_size": ban_ngrams_of_prompt,
    "bad_words_ids": ban_words,
    "min_length": hold_to_min_length,
    "min_new_tokens": hold_to_min_new_tokens,
    "forced_eos_token_id": force_end,
    "remove_invalid_values": remove_invalid,
    "exponential_decay_length_penalty": raise_end_with_length,
    "suppress_tokens": suppress,
    "begin_suppress_tokens": suppress_at_begin,
}


def _mark(scores: Floats, ids: Ints) -> NDArray[np.bool_]:
    """Which tokens of the vocabulary are among ``ids``."""
    seen = np.zeros(scores.size, dtype=bool)
    seen[ids[(ids >= 0) & (ids < scores.size)]] = True
    return seen


def _ban_ngrams_of(said: Ints, scores: Floats, context: Context, size: int) -> Floats:
    """What stands in ``said`` behind the last ``size - 1`` tokens of the sequence is ruled out."""
    if len(said) < size or len(context.ids) < size - 1:
        return scores
    grams = np.lib.stride_tricks.sliding_window_view(said, size)
    end = context.ids[len(context.ids) - (size - 1) :]
    return ban(scores, grams[(grams[:, :-1] == end).all(axis=1), -1])
