"""Sampling against slow definitions, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secateur.runtime.errors import UserError
from secateur.runtime.sampling import Sampler, Sampling, filter_logits, penalize_repetition, softmax

LOGITS = st.lists(st.integers(-6, 6).map(lambda x: x / 2), min_size=1, max_size=12)


def slow_filter(logits: list[float], how: Sampling) -> list[float] | None:
    """Straight from the definitions: at least the k largest, then the fewest largest whose mass reaches p. None where
    a sum is so near p that rounding decides; :data:`AT_THE_EDGE` has sums that are p exactly."""
    scores = [x / how.temperature for x in logits]
    if how.top_k:
        floor = sorted(scores, reverse=True)[min(how.top_k, len(scores)) - 1]
        scores = [s if s >= floor else -math.inf for s in scores]
    if how.top_p < 1.0:
        top = max(scores)
        mass = [math.exp(s - top) for s in scores]
        total = math.fsum(mass)
        # The candidates from the least likely up (ties by index) go while all that went stays within 1 - p.
        gone = []
        order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
        for i in order[:-1]:
            gone.append(mass[i] / total)
            if abs(math.fsum(gone) - (1.0 - how.top_p)) < 1e-12:
                return None
            if math.fsum(gone) < 1.0 - how.top_p:
                scores[i] = -math.inf
    return scores


@settings(max_examples=300, deadline=None)
@given(LOGITS, st.sampled_from([0.5, 1.0, 1.7]), st.integers(0, 14), st.sampled_from([0.05, 0.31, 0.5, 0.83, 1.0]))
def test_filters_follow_their_definitions(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    want = slow_filter(logits, how)
    assume(want is not None)
    got = filter_logits(np.array(logits, dtype=np.float32), how)
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    np.testing.assert_allclose(got, want)
    assert np.isfinite(got).any()


NONE = -math.inf
AT_THE_EDGE: list[tuple[list[float], float, list[int]]] = [
    # Every chance is a power of two, so that sums are exact. Of equal ones the first go first.
    ([0, 0, 0, 0], 0.75, [1, 2, 3]),
    ([0, 0, 0, 0], 0.5, [2, 3]),
    ([0, 0, 0, 0], 0.25, [3]),
    ([0, 0, 0, 0], 0.50001, [1, 2, 3]),
    ([0, 0, 0, 0], 0.49999, [2, 3]),
    ([0, 0, 0, 0], 0.24999, [3]),
    ([0, 0, 0, 0], 0.75001, [0, 1, 2, 3]),
    ([0, 0, 0, 0], 1e-12, [3]),
    ([0, 0, 0, 0], 0.0, [3]),
    ([0, 0, 0, 0], 1 - 1e-12, [0, 1, 2, 3]),
    ([0, 0, 0, 0], 1.0, [0, 1, 2, 3]),
    ([0, NONE, 0], 0.5, [2]),
    ([0, NONE, 0], 0.5001, [0, 2]),
    ([NONE, 0, NONE], 0.5, [1]),
    ([0, -1000, 0, -1000], 0.999, [0, 2]),
    ([0, -1000, 0, -1000], 1.0, [0, 1, 2, 3]),
    ([5], 0.1, [0]),
]


@pytest.mark.parametrize(("logits", "top_p", "kept"), AT_THE_EDGE)
def test_a_sum_that_is_p_exactly_is_enough(logits: list[float], top_p: float, kept: list[int]) -> None:
    """The fewest likeliest whose mass reaches p: one more is not needed, one less is not enough."""
    got = filter_logits(np.array(logits, dtype=np.float32), Sampling(temperature=1.0, top_p=top_p))
    assert np.flatnonzero(np.isfinite(got)).tolist() == kept


@pytest.mark.parametrize("power", range(1, 7))
def test_of_equal_chances_as_many_stay_as_p_asks_for(power: int) -> None:
    count = 2**power
    for number in range(count + 1):
        got = filter_logits(np.zeros(count, dtype=np.float32), Sampling(temperature=1.0, top_p=number / count))
        assert np.isfinite(got).sum() == max(1, number)


def test_the_penalty_is_applied_once_and_by_sign() -> None:
    logits = np.array([2.0, -2.0, 0.0, 3.0], dtype=np.float32)
    seen = np.array([True, True, True, False])
    np.testing.assert_allclose(penalize_repetition(logits, seen, 2.0), [1.0, -4.0, 0.0, 3.0])


def test_greedy_takes_the_first_of_the_largest() -> None:
    sampler = Sampler(Sampling(), [[0], [1]], 4)
    assert sampler.draw(np.array([[0, 2, 2, 1], [5, 4, 3, 2]], dtype=np.float32)).tolist() == [1, 0]


def test_the_history_of_a_row_counts_prompt_and_answer_but_not_other_rows() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10.0), [[0, 99], [3]], 4)
    logits = np.array([[9.0, 8.0, 7.0, 1.0], [9.0, 8.0, 7.0, 1.0]], dtype=np.float32)
    drawn = [sampler.draw(logits).tolist() for _ in range(3)]
    assert drawn == [[1, 0], [2, 1], [3, 2]]


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [[]], 4)
    count = np.bincount([sampler.draw(logits)[0] for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(count, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_top_k_never_draws_outside() -> None:
    logits = np.array([[1.0, 2.0, 3.0, 0.0]], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=5.0, top_k=2, seed=0), [[]], 4)
    assert {int(sampler.draw(logits)[0]) for _ in range(200)} == {1, 2}


def test_a_seed_repeats_and_rows_do_not_share_a_stream() -> None:
    logits = np.zeros((2, 50), dtype=np.float32)

    def draw(seed: int) -> list[list[int]]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [[], []], 50)
        return [sampler.draw(logits).tolist() for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert any(a != b for a, b in draw(1))


def test_rows_that_are_done_cannot_fail() -> None:
    sampler = Sampler(Sampling(temperature=1.0, suppress_tokens=[0, 1]), [[], []], 3)
    logits = np.array([[0.0, 0.0, -np.inf], [0.0, 0.0, 1.0]], dtype=np.float32)
    assert sampler.draw(logits, np.array([True, False])).tolist() == [0, 2]
    with pytest.raises(UserError, match="every token is ruled out"):
        sampler.draw(logits)


def test_softmax_of_masked_scores() -> None:
    np.testing.assert_allclose(softmax(np.array([0.0, -np.inf, 0.0])), [0.5, 0.0, 0.5])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.1}, "top_p is -0.1; it must be in [0, 1]"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range(options: dict[str, float], says: str) -> None:
    with pytest.raises(UserError) as caught:
        Sampling(**options)  # type: ignore[arg-type]
    assert says in str(caught.value)
