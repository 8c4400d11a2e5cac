"""Scores from attention slices, corrections of scores, selectors that recycle: edges that no row's default meets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.compiler.layout import Grid
from secateur.passes.methods import calibrate
from secateur.passes.methods.merge_pairs import merge_assigned
from secateur.passes.methods.rows import ranks
from secateur.passes.methods.score_attention import (
    global_query_attention,
    page_rank,
    rater_attention_corrected,
    rater_attention_mean,
    text_attention_mean,
    text_weighted_attention,
)
from secateur.passes.methods.select import Selection
from secateur.passes.methods.select_recycle import (
    merge_by_score,
    merge_windows,
    top_k_and_cells,
    top_k_and_clusters,
)
from secateur.runtime.errors import UserError

SETTINGS = settings(max_examples=40, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(*shape: int, seed: int = 0) -> Tensor:
    return torch.softmax(2 * normal(*shape, seed=seed), -1)


# Selectors that recycle


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Grid, int]:
    """A grid and how many of its tokens stay: one, all, or something between."""
    grid = Grid(draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    count = math.prod(grid)
    return grid, draw(st.one_of(st.just(1), st.just(count), st.integers(1, count)))


def check_selection(selection: Selection, groups: int, count: int, k: int) -> None:
    keep, _, assigned = selection
    assert keep.shape == (groups, k)
    assert keep.dtype == torch.int64
    assert (keep >= 0).all()
    assert (keep < count).all()
    assert (keep[:, 1:] > keep[:, :-1]).all(), "not strictly increasing"
    assert assigned is not None
    assert assigned.shape == (groups, count)
    assert (assigned >= 0).all()
    assert (assigned <= k).all()
    assert (assigned.gather(1, keep) == torch.arange(k)).all(), "a survivor joins another"
    mix = merge_assigned(selection, torch.ones(groups, count))
    torch.testing.assert_close(mix.sum(dim=2), torch.ones(groups, k))
    if k == count:
        assert (mix == torch.eye(count)).all(), "keeping everything is not the identity"


@SETTINGS
@given(layouts(), st.sampled_from([0, 1, 3]), st.integers(0, 99))
def test_recycling_selectors_keep_exactly_k(layout: tuple[Grid, int], levels: int, seed: int) -> None:
    grid, k = layout
    count = math.prod(grid)
    tokens = normal(2, count, 6, seed=seed)
    score = attention(2, count, seed=seed)
    score = (score * levels).round() if levels else score  # so that ties abound
    tokens = torch.round(tokens) if levels else tokens
    check_selection(top_k_and_clusters(score, tokens, k), 2, count, k)
    check_selection(top_k_and_cells(score, k, grid, cells=2.3), 2, count, k)
    check_selection(merge_windows(tokens, k, grid, side=3), 2, count, k)


def test_clusters_take_the_published_numbers() -> None:
    """SparseVLM's counts of version 1: what is kept outright, and the clusters that come on top."""
    for count, kept, clusters in ((576, 300, 9), (309, 200, 4), (204, 110, 3), (576, 66, 16)):
        selection = top_k_and_clusters(attention(1, count), normal(1, count, 4), kept + clusters)
        assert selection.assigned is not None
        sizes = torch.bincount(selection.assigned[0], minlength=kept + clusters + 1)
        recycled = math.floor(0.3 * (count - kept)) + 1
        assert sizes[:-1].sum() == kept + recycled
        assert sizes[-1] == count - kept - recycled
        assert (sizes[:-1] > 1).sum() <= clusters


def test_cells_fold_into_their_best_token() -> None:
    """A column of six tokens in two cells; one stays outright, each cell's best stands for what is left of it."""
    score, grid = torch.tensor([[0.9, 0.2, 0.1, 0.8, 0.3, 0.4]]), Grid(1, 6, 1)
    selection = top_k_and_cells(score, 3, grid, cells=2.0)
    assert selection.assigned is not None
    assert (selection.keep.tolist(), selection.assigned.tolist()) == ([[0, 1, 3]], [[0, 1, 1, 2, 2, 2]])
    mix = merge_by_score(selection, score)
    torch.testing.assert_close(mix[0, 1], torch.tensor([0.0, 2 / 3, 1 / 3, 0.0, 0.0, 0.0]))
    # A third place for two cells: the next best token fills it, by itself.
    selection = top_k_and_cells(score, 4, grid, cells=2.0)
    assert selection.assigned is not None
    assert (selection.keep.tolist(), selection.assigned.tolist()) == ([[0, 1, 3, 5]], [[0, 1, 1, 2, 2, 3]])
    # One place: the cell with the higher token wins, the other cell's tokens go.
    selection = top_k_and_cells(score, 2, grid, cells=2.0)
    assert selection.assigned is not None
    assert (selection.keep.tolist(), selection.assigned.tolist()) == ([[0, 3]], [[0, 2, 2, 1, 1, 1]])


def test_windows_merge_the_most_alike_first() -> None:
    tokens = normal(1, 36, 8)
    right_below = [21, 22, 23, 27, 28, 29, 33, 34, 35]
    tokens[0, right_below] = normal(8, seed=1) + 0.01 * normal(9, 8, seed=2)
    selection = merge_windows(tokens, 28, Grid(1, 6, 6))
    assert set(range(36)) - set(selection.keep[0].tolist()) == set(right_below[:-1])
    mix = merge_assigned(selection, torch.ones(1, 36))
    torch.testing.assert_close((mix @ tokens)[0, -1], tokens[0, right_below].mean(dim=0))
    half = merge_windows(tokens, 32, Grid(1, 6, 6))
    assert set(range(36)) - set(half.keep[0].tolist()) == set(right_below[:4])


def test_merging_by_score_without_any_score_changes_nothing() -> None:
    selection = Selection(torch.tensor([[1, 2]]), assigned=torch.tensor([[0, 0, 1]]))
    assert merge_by_score(selection, torch.zeros(1, 3)).tolist() == [[[0, 1, 0], [0, 0, 1]]]
    assert merge_by_score(Selection(selection.keep), torch.ones(1, 3)).tolist() == [[[0, 1, 0], [0, 0, 1]]]


# Combinations and corrections of scores


@SETTINGS
@given(st.integers(1, 30), st.integers(0, 99))
def test_normalisations(count: int, seed: int) -> None:
    score = attention(2, count, seed=seed)
    torch.testing.assert_close(calibrate.sum_to_one(score).sum(dim=1), torch.ones(2))
    assert ranks(score).sort(dim=1).values.tolist() == [list(range(count))] * 2
    order = score.argsort(dim=1, descending=True, stable=True)
    assert (ranks(score).argsort(dim=1, descending=True) == order).all()
    for normal_score in (calibrate.min_max(score), calibrate.rank(score)):
        assert (normal_score.argsort(dim=1, descending=True, stable=True) == order).all()
        assert (normal_score.amin(dim=1) == 0).all()
        assert (normal_score.amax(dim=1) == (1 if count > 1 else 0)).all()


def test_equal_scores_rank_in_their_order() -> None:
    """As a top-k keeps them: the lower index first."""
    assert ranks(torch.tensor([[1.0, 0.0, 1.0, 0.0]])).tolist() == [[3, 1, 2, 0]]
    assert calibrate.min_max(torch.full((1, 3), 7.0)).tolist() == [[0, 0, 0]]


def test_products_and_sums() -> None:
    one, two = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    assert calibrate.product((one, two)).tolist() == [[3, 10]]
    assert calibrate.weighted_sum((one, two)).tolist() == [[4, 7]]
    assert calibrate.weighted_sum((one, two), [2.0, -1.0]).tolist() == [[-1, -1]]
    with pytest.raises(UserError, match="1 weights for 2 scores"):
        calibrate.weighted_sum((one, two), [1.0])


@SETTINGS
@given(st.lists(st.floats(0.1, 2), min_size=1, max_size=9), st.integers(1, 20))
def test_position_bias_is_resampled_as_by_interpolation(weights: list[float], count: int) -> None:
    found = calibrate.position_bias(torch.ones(1, count), weights)[0].numpy()
    places = np.linspace(0, len(weights) - 1, count) if count > 1 else [0]
    np.testing.assert_allclose(found, np.interp(places, np.arange(len(weights)), weights), rtol=1e-5)


def test_padding_mask_counts_area() -> None:
    """A quarter above and below is padding: of four rows the outer ones go, of six the second is half valid."""
    four = calibrate.padding_mask(torch.ones(1, 16), Grid(1, 4, 4), top=0.25, bottom=0.25)
    assert four.reshape(4, 4)[:, 0].tolist() == [0, 1, 1, 0]
    six = calibrate.padding_mask(torch.ones(1, 72), Grid(2, 6, 6), top=0.25, bottom=0.25)
    assert six.reshape(2, 6, 6)[:, :, 3].tolist() == [[0, 1, 1, 1, 1, 0]] * 2
    corner = calibrate.padding_mask(torch.ones(1, 4), Grid(1, 2, 2), left=0.2, top=0.2, most=0.5)
    assert corner.tolist() == [[0, 1, 1, 1]]
    assert (calibrate.padding_mask(torch.ones(1, 9), Grid(1, 3, 3)) == 1).all()


def test_sink_mask_reads_given_or_found_dimensions() -> None:
    tokens, text = torch.ones(1, 3, 64), torch.ones(1, 2, 64)
    tokens[0, 1, 7] = -500.0  # a sink, in the dimension in which the first text token is large
    tokens[0, 2, 9] = 500.0  # large in another
    text[0, 0, 7] = 90.0
    score = torch.full((1, 3), 0.5)
    assert calibrate.sink_mask(score, tokens, text, found=1, tau=7.0).tolist() == [[0.5, 0, 0.5]]
    assert calibrate.sink_mask(score, tokens, text, dims=[9], tau=7.0).tolist() == [[0.5, 0.5, 0]]
    assert calibrate.sink_mask(score, tokens, text, dims=(7, 9), tau=7.0).tolist() == [[0.5, 0, 0]]
    assert calibrate.sink_mask(score, tokens, text, dims=[9], tau=8.0).tolist() == [[0.5] * 3], "above sqrt(64)"
    with pytest.raises(UserError, match="do not all exist in rows of 64"):
        calibrate.sink_mask(score, tokens, text, dims=[64])


def test_marked_tokens_come_first() -> None:
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert calibrate.top_share(score, 0.26).tolist() == [[0, 1, 0, 1]]
    spared, carry = calibrate.spare_carried(score, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert spared.argsort(dim=1, descending=True).tolist() == [[2, 0, 1, 3]]
    assert carry.tolist() == [[1, 0, 1, 0]]


# Scores


def test_rows_that_do_not_count_change_nothing() -> None:
    """Padding and text before the image may hold anything."""
    rows = torch.tensor([[False, True, True, False]])
    tokens, text = normal(1, 5, 6), normal(1, 4, 6, seed=1)
    text_attention, between = attention(1, 3, 4, 5), attention(1, 3, 4, 4)
    other_text, other, other_between = text.clone(), text_attention.clone(), between.clone()
    other_text[:, [0, 3]], other[:, :, [0, 3]] = 9.0, 0.9
    other_between[:, :, [0, 3]], other_between[:, :, :, [0, 3]] = 0.8, 0.8
    for reduce in ("mean", "sum", "max"):
        assert torch.equal(
            text_attention_mean(text_attention, rows, rows=reduce), text_attention_mean(other, rows, rows=reduce)
        )
    torch.testing.assert_close(
        rater_attention_mean(text_attention, rows, tokens, text), rater_attention_mean(other, rows, tokens, other_text)
    )
    torch.testing.assert_close(
        text_weighted_attention(text_attention, between, rows), text_weighted_attention(other, other_between, rows)
    )


def test_a_prompt_without_a_question_scores_finitely() -> None:
    none = torch.zeros(2, 4, dtype=torch.bool)
    tokens, text, text_attention = normal(2, 5, 6), normal(2, 4, 6), attention(2, 3, 4, 5)
    slots = torch.arange(1, 6).expand(2, 5)
    for score in (
        text_attention_mean(text_attention, none),
        rater_attention_mean(text_attention, none, tokens, text),
        rater_attention_corrected(text_attention, none, tokens, text, slots).score,
        text_weighted_attention(text_attention, attention(2, 3, 4, 4), none),
    ):
        assert score.shape == (2, 5)
        assert (score == 0).all()


def test_a_single_question_token_is_its_own_rater() -> None:
    rows = torch.tensor([[False, True]])
    text_attention = attention(1, 3, 2, 5)
    found = rater_attention_mean(text_attention, rows, normal(1, 5, 6), normal(1, 2, 6))
    torch.testing.assert_close(found, text_attention[:, :, 1].mean(dim=1))


def test_raters_are_the_rows_that_visual_tokens_resemble() -> None:
    tokens = torch.zeros(1, 4, 3)
    tokens[..., 0] = 5.0
    text = torch.eye(3).unsqueeze(0) * 5
    text_attention = attention(1, 2, 3, 4)
    found = rater_attention_mean(text_attention, torch.ones(1, 3, dtype=torch.bool), tokens, text)
    torch.testing.assert_close(found, text_attention[:, :, 0].mean(dim=1))


def test_the_gap_to_the_question_outlives_pruning() -> None:
    """Scoring survivors by what was carried equals scoring all and taking the survivors."""
    rows = torch.tensor([[False, True, True]])
    tokens, text, text_attention = normal(1, 8, 6), normal(1, 3, 6), attention(1, 2, 3, 8)
    text[:, 1] = text[:, 2]  # equal rows: both rate, whoever survives
    every, carry = rater_attention_corrected(
        text_attention, rows, tokens, text, torch.arange(1, 9).unsqueeze(0), head_share=1.0
    )
    assert carry.tolist() == [list(range(8, 0, -1))]
    keep = [0, 3, 4, 7]
    again, carried = rater_attention_corrected(
        text_attention[..., keep], rows, tokens[:, keep], text, torch.arange(1, 5).unsqueeze(0), carry[:, keep], 1.0
    )
    torch.testing.assert_close(again, every[:, keep])
    assert torch.equal(carried, carry[:, keep])


def test_global_tokens_are_those_that_receive_most() -> None:
    """Token 2 receives nearly everything: only its own row counts. With a high threshold all rows do."""
    maps = torch.full((1, 2, 4, 4), 0.02)
    maps[..., 2] = 0.94
    maps[:, :, 2] = torch.tensor([0.5, 0.1, 0.3, 0.1])
    torch.testing.assert_close(global_query_attention(maps, 2.0), torch.tensor([[0.5, 0.1, 0.3, 0.1]]))
    torch.testing.assert_close(global_query_attention(maps, 34.8), maps.mean(dim=(1, 2)))


def test_page_rank_ignores_padding_and_orders_what_nothing_reaches() -> None:
    logits = normal(1, 2, 6, 6) * 0.01
    hidden = torch.arange(6)[:, None] < torch.arange(6)
    hidden[:, 5] = True  # padding
    logits = logits.masked_fill(hidden, -torch.inf)
    slots, real = torch.arange(1, 4).unsqueeze(0), torch.tensor([[True] * 5 + [False]])
    short = page_rank(logits[:, :, :5, :5], slots, real[:, :5])
    torch.testing.assert_close(page_rank(logits, slots, real), short)
    logits[:, :, :5, 1:4] -= 1e4
    assert page_rank(logits, slots, real).tolist() == [[-1, -2, -3]]


def test_page_rank_walks_each_head_of_each_row() -> None:
    """By its definition, in float64: the ranks of two rows and two heads after three steps."""
    logits, real = normal(2, 2, 5, 5), torch.tensor([[True] * 5, [True, True, True, True, False]])
    logits[1, :, :, 4] = -torch.inf
    slots = torch.tensor([[1, 2, 4], [0, 2, 3]])
    want = np.zeros((2, 3))
    for row in range(2):
        ranks_of = []
        for head in range(2):
            raised = np.exp(logits[row, head].double().numpy() / 0.5)
            rank = real[row].double().numpy() / int(real[row].sum())
            for _ in range(3):
                rank = rank @ (raised / raised.sum(axis=1, keepdims=True))
            ranks_of.append(rank)
        want[row] = np.sqrt((np.array(ranks_of) ** 2).mean(axis=0))[slots[row].numpy()]
    got = page_rank(logits, slots, real, temperature=0.5, steps=3)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)
