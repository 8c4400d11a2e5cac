"""Every selector, every score that puts tokens first, and calibration, against float64 at scores of 1e-6, 1 and 1e6.

Scores come nearly tied (float32 numbers in a row, or as near as sums and products of them stay exact), and spread over
many decades. Scales are powers of two and rows hold ones and minus ones, so that what is exact at one scale is at all.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.compiler import calibrate as calibration
from secateur.compiler.layout import Grid, Layout
from secateur.passes.methods.registry import SCORES, SELECTORS
from secateur.passes.methods.rows import Scored, prefer, ranks
from secateur.passes.methods.select import top_k
from secateur.passes.methods.select_greedy import determinant
from secateur.passes.methods.select_recycle import merge_windows

from . import float64_readings as readings

GROUPS, COUNT, WIDTH, HEADS, TEXT = 2, 72, 16, 3, 5
SCALES = {"1e-6": 2.0**-20, "1": 1.0, "1e6": 2.0**20}
EXACT = {
    "chunks_first", "complete_graph_keys", "coverage", "determinant", "farthest_by_score", "max_marginal_relevance",
    "product", "weighted_max_min", "weighted_sum", "window_modality_quotas", "windowed_max_min",
}  # fmt: skip
"""Functions that compute with scores: what is nearer than their rounding they may take for equal."""
LENGTHS = {"anchors_first": 40, "bipartite_keys": 40, "bipartite_tokens": 40, "complete_graph_keys": 40, "nothing": 0}
GRIDS = {"frame_quotas": Grid(6, 3, 4)}
LAYOUT = Layout(tuple(i // 12 for i in range(COUNT)), tuple(int(i % 12 >= 9) for i in range(COUNT)))


def draw_scores(scale: float, shape: str, exact: bool, seed: int) -> Tensor:
    """Scores ``[G,N]``, no two of a group equal, in random order."""
    source = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randperm(COUNT, generator=source) for _ in range(GROUPS)])
    if shape == "wide":  # seven decades, the highest at the scale
        return (scale * 10.0 ** (-7.0 * place.double() / COUNT)).float()
    return scale * (1.0 + place.float() * (2.0**-12 if exact else 2.0**-23))


def draw(name: str, function: Any, scale: float, shape: str, seed: int) -> dict[str, Any]:
    """Arguments for ``function``, in float32 with a group axis."""
    source = torch.Generator().manual_seed(seed)

    def signs(count: int) -> Tensor:
        return torch.randint(0, 2, (GROUPS, count, WIDTH), generator=source) * 2.0 - 1.0

    def normal(*sizes: int) -> Tensor:
        return torch.randn(GROUPS, *sizes, generator=source)

    scores = [draw_scores(scale, shape, name in EXACT, seed + i) for i in range(2)]
    exact_rows = {"coverage", "determinant", "farthest_by_score", "max_min", "max_sum", "weighted_max_min"}
    exact_rows |= {"max_marginal_relevance", "windowed_max_min"}
    made = {
        "score": scores[0],
        "carried": scores[0] if name == "carried_then_question" else (scores[1] > scores[1].median()).float(),
        "scores": tuple(scores),
        "tokens": signs(COUNT) if name in exact_rows else normal(COUNT, WIDTH),
        "normed_tokens": normal(COUNT, WIDTH), "normed_text": normal(TEXT, WIDTH),
        "keys": normal(HEADS, COUNT, WIDTH), "text_keys": normal(HEADS, TEXT, WIDTH),
        "text_tokens": normal(TEXT, WIDTH), "text_rows": torch.tensor([[True, False, True, True, True]] * GROUPS),
        "source": torch.arange(COUNT).expand(GROUPS, COUNT),
        "k": LENGTHS.get(name, 24), "grid": GRIDS.get(name, Grid(1, 12, 6)), "layout": LAYOUT,
    }  # fmt: skip
    found = {parameter: made[parameter] for parameter in inspect.signature(function).parameters if parameter in made}
    if name == "window_modality_quotas":
        found["temperature"] = 0.1 * scale  # the softmax of scores is what it is at scale 1
    return found


def of_group(given: dict[str, Any], group: int) -> dict[str, Any]:
    """The arguments of one group for a reading: float64."""

    def take(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, Grid | Layout):
            return tuple(take(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        return value[group].double().numpy() if value.is_floating_point() else value[group].numpy()

    filled = {"k": 24, "grid": Grid(1, 12, 6), "layout": LAYOUT, "tokens": torch.ones(GROUPS, COUNT, 1)}
    return {name: take(value) for name, value in {**filled, **given}.items()}


def made_of_scores() -> set[str]:
    """Scores that reorder another score, or one that an earlier stage carried."""
    found = set()
    for name, function in SCORES.items():
        parameters = set(inspect.signature(function).parameters)
        if parameters & {"score", "scores"} or {"carried", "k"} <= parameters:
            found.add(name)
    return found


def test_every_selector_and_every_score_of_scores_has_a_reading() -> None:
    """Add a reading to ``float64_readings.py`` for what is missing here."""
    assert set(readings.SELECTORS) == set(SELECTORS)
    assert set(readings.FIRST) | set(readings.VALUES) == made_of_scores()
    assert not set(readings.FIRST) & set(readings.VALUES)


@pytest.mark.parametrize("shape", ["near", "wide"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(readings.SELECTORS))
def test_selectors_keep_what_float64_keeps(name: str, scale: str, shape: str) -> None:
    function, options = SELECTORS[name], readings.OPTIONS.get(name, {})
    for seed in range(2):
        given = draw(name, function, SCALES[scale], shape, seed)
        keep = function(**given, **options).keep
        for group in range(GROUPS):
            assert keep[group].tolist() == list(readings.SELECTORS[name](of_group(given, group))), f"seed {seed}"


@pytest.mark.parametrize("shape", ["near", "wide"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(readings.FIRST))
def test_tokens_put_first_stay_in_the_order_of_their_scores(name: str, scale: str, shape: str) -> None:
    function, options = SCORES[name], readings.OPTIONS.get(name, {})
    for seed in range(2):
        given = draw(name, function, SCALES[scale], shape, seed)
        score = function(**given, **options)
        score = score.score if isinstance(score, Scored) else score
        k = int(given.get("k", 24))
        for group in range(GROUPS):
            expected = readings.FIRST[name](of_group(given | options, group))
            assert top_k(score, k).keep[group].tolist() == list(expected), f"seed {seed}"


@pytest.mark.parametrize("shape", ["near", "wide"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(readings.VALUES))
def test_scores_of_scores_are_what_float64_says(name: str, scale: str, shape: str) -> None:
    function, options = SCORES[name], readings.OPTIONS.get(name, {})
    given = draw(name, function, SCALES[scale], shape, 0)
    found = function(**given, **options)
    for group in range(GROUPS):
        expected = readings.VALUES[name](of_group(given, group))
        np.testing.assert_allclose(found[group].numpy(), expected, rtol=1e-5, atol=0)
        if "score" in given and name not in ("position_bias", "padding_mask", "sink_mask", "top_share"):
            falling = found[group][readings.order(given["score"][group].tolist())]
            assert (falling[1:] <= falling[:-1]).all(), "the order is lost"


@pytest.mark.parametrize("scale", SCALES)
def test_preferred_tokens_keep_their_order(scale: str) -> None:
    for shape in ("near", "wide"):
        score = draw_scores(SCALES[scale], shape, False, 0)
        weight = torch.randint(0, 3, score.shape, generator=torch.Generator().manual_seed(0)).float()
        lifted = prefer(score, weight)
        for group in range(GROUPS):
            ranked = sorted(range(COUNT), key=lambda t, g=group: (-float(weight[g, t]), -float(score[g, t]), t))
            assert lifted[group].argsort(descending=True).tolist() == ranked


def test_two_small_scores_among_preferred_ones_stay_apart() -> None:
    """Attention over hundreds of tokens: 0.00123456 and the next float32 number, the larger one behind."""
    low = torch.tensor(0.00123456)
    score = torch.stack([low, torch.nextafter(low, torch.tensor(1.0)), torch.tensor(0.9)])[None]
    assert prefer(score, torch.tensor([[1.0, 1.0, 0.0]])).argsort(descending=True).tolist() == [[1, 0, 2]]


def test_equal_scores_are_preferred_in_their_order_and_infinite_ones_stay_numbers() -> None:
    score = torch.tensor([[2.0, 2.0, -math.inf, math.inf, 2.0, -math.inf]])
    assert prefer(score, torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0, 0.0]])).tolist() == [[4, 9, 7, 5, 2, 0]]


def test_ranks_are_exact_for_many_tokens() -> None:
    score = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0))
    lifted = prefer(score, (score > 0).float() * 2)
    assert (lifted.argsort(descending=True) == score.argsort(descending=True, stable=True)).all()
    assert ranks(score).max() == 39_999


def test_tokens_inside_the_span_come_by_score_however_small() -> None:
    """Four rows span all; the others have scores too small to tell apart beside the highest."""
    tokens = torch.eye(4).repeat(1, 3, 1)
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2e-9, 1e-9, 4e-9, 3e-9, 2e-30, 5e-30, 4e-30, 3e-30]])
    assert determinant(tokens, score, 7).keep.tolist() == [[0, 1, 2, 3, 4, 6, 7]]
    assert determinant(tokens, score[:, [8, 9, 10, 11] * 3] * 1e-4, 2).keep.tolist() == [[1, 2]], "squares vanish"


def test_windows_of_a_large_grid_go_one_after_the_other() -> None:
    """Beyond some 8,700 tokens a window's number times theirs left what float32 counts."""
    side = 126
    rows, columns = np.divmod(np.arange(side * side), side)
    window = rows // 3 * (side // 3) + columns // 3
    # Windows are the more uniform, the higher their number; the first token of each is the odd one.
    turn = torch.from_numpy(np.where((rows % 3 == 0) & (columns % 3 == 0), 1.0 - window / (window.max() + 1), 0.0))
    tokens = torch.stack([torch.cos(turn), torch.sin(turn)], dim=1).float()[None]
    folded = 1_700
    gone = 8 * folded + 3
    kept = set(merge_windows(tokens, side * side - gone, Grid(1, side, side)).keep[0].tolist())
    for number in range(window.max() + 1):
        members = np.flatnonzero(window == number).tolist()
        last = window.max() - number
        left = members[:8] if last < folded else members[:3] if last == folded else []
        assert [token for token in members if token not in kept] == left
    assert len(kept) == side * side - gone


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3, 1e6])
def test_density_peaks_of_rows_of_any_size(size: float) -> None:
    function = SELECTORS["top_k_and_clusters"]
    given = draw("top_k_and_clusters", function, 1.0, "near", 5)
    given["tokens"] = given["tokens"] * size
    keep = function(**given).keep
    for group in range(GROUPS):
        assert keep[group].tolist() == readings.SELECTORS["top_k_and_clusters"](of_group(given, group))


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize("shape", ["near", "wide"])
@pytest.mark.parametrize("scale", SCALES)
def test_calibration_is_what_float64_says(scale: str, shape: str, curve: bool) -> None:
    planned = SimpleNamespace(length_in=COUNT, site=SimpleNamespace(kind="vision.out"))
    drawn = [draw_scores(SCALES[scale], shape, False, seed) for seed in range(3)]
    measured = calibration._Measured()
    for score in drawn:
        measured.add(score)
    found = calibration._describe(planned, measured, tau=20.0, mass=0.9, curve=curve)
    every = np.concatenate([score.double().numpy() for score in drawn])
    mean = every.mean(axis=0)
    np.testing.assert_allclose(found.mean_score, mean, rtol=1e-5)
    height = np.log(mean)
    if curve:
        place = np.linspace(-1, 1, COUNT)
        height = np.polyval(np.polyfit(place, height, 2), place)
    np.testing.assert_allclose(found.position_weights, np.exp(height.min() - height), rtol=1e-5)
    held = np.cumsum(np.sort(every, axis=1)[:, ::-1], axis=1)
    share = (held / held[:, -1:]).mean(axis=0)
    assert found.count == next(k for k in range(1, COUNT + 1) if share[k - 1] >= 0.9)
