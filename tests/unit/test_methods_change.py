"""Scores by change, frame quotas, pivots, density centres and run means: what holds whatever the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compiler.layout import Grid
from secateur.compiler.plan_recipe import plan_recipe
from secateur.passes.methods.merge_pairs import merge_assigned
from secateur.passes.methods.merge_runs import run_mean
from secateur.passes.methods.score_change import frame_change, mean_query_importance, token_transition_variation
from secateur.passes.methods.select import Selection, max_min, top_k, weighted_max_min
from secateur.passes.methods.select_frames import frame_quotas
from secateur.passes.methods.select_pivots import density_centres, unlike_pivots
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import stage_function
from secateur.runtime.errors import UserError

SETTINGS = settings(max_examples=40, deadline=None)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def grids(draw: st.DrawFn) -> tuple[Grid, int, int]:
    """A layout, a number of groups, and how many tokens to keep."""
    grid = Grid(draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    count = grid.frames * grid.rows * grid.columns
    return grid, draw(st.integers(1, 2)), draw(st.one_of(st.just(1), st.just(count), st.integers(1, count)))


def check_keep(keep: torch.Tensor, groups: int, count: int, k: int) -> None:
    assert keep.shape == (groups, k)
    assert keep.dtype == torch.int64
    assert (keep >= 0).all()
    assert (keep < count).all()
    assert (keep[:, 1:] > keep[:, :-1]).all(), "not strictly increasing"


# Frames


def test_a_token_that_does_not_change_scores_nothing() -> None:
    frame = normal(1, 6, 8)
    moved = normal(1, 6, 8, seed=1)
    score = frame_change(torch.cat([frame, 2.0 * frame, moved, -moved], dim=1), Grid(4, 2, 3)).reshape(4, 6)
    assert (score[0] >= 3).all(), "the first frame has nothing to be compared with"
    torch.testing.assert_close(score[1], torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(score[3], torch.full((6,), 2.0))


def test_groups_of_four_compare_as_dycoke_does() -> None:
    tokens = normal(1, 10, 8)
    score = frame_change(tokens, Grid(10, 1, 1), compare="group_of_four")[0]
    alike = torch.cosine_similarity(tokens.transpose(0, 1), tokens, dim=-1)
    for frame, other in ((1, 0), (2, 0), (3, 2), (5, 4), (6, 4), (7, 6), (9, 8)):
        torch.testing.assert_close(score[frame], 1.0 - alike[frame, other])
    assert (score[[0, 4, 8]] >= 3).all()
    assert len(set(score[[0, 4, 8]].tolist())) == 3, "first frames tie"


def test_rows_of_a_single_image_take_the_place_of_frames() -> None:
    tokens = normal(2, 12, 8)
    assert torch.equal(frame_change(tokens, Grid(1, 4, 3)), frame_change(tokens, Grid(4, 3, 1)))


@pytest.mark.parametrize("count", [100, 576])
@pytest.mark.parametrize("kept", [3, 10, 47])
def test_too_small_a_budget_thins_the_first_frame_out_evenly(count: int, kept: int) -> None:
    score = frame_change(normal(1, 2 * count, 4), Grid(2, count, 1))
    keep = top_k(score, kept).keep[0].tolist()
    assert keep[-1] < count
    gaps = [b - a for a, b in zip(keep, [*keep[1:], keep[0] + count], strict=True)]
    assert max(gaps) <= 3 * count / kept


@SETTINGS
@given(grids(), st.integers(1, 5))
def test_frame_quotas_keep_first_frames_and_divide_the_rest(case: tuple[Grid, int, int], group: int) -> None:
    grid, groups, k = case
    frames = grid.frames if grid.frames > 1 else grid.rows
    count = grid.frames * grid.rows * grid.columns
    places = count // frames
    score = normal(groups, count)
    keep = frame_quotas(score, k, grid, group=group).keep
    check_keep(keep, groups, count, k)
    kept = torch.zeros(groups, count).scatter(1, keep, 1.0).reshape(groups, frames, places)
    by_frame = kept.sum(dim=-1)
    first = by_frame[:, ::group]
    others = by_frame[:, [f for f in range(frames) if f % group]]
    assert (others.sum() == 0) or (first == places).all()
    for quotas in (first, others):
        if quotas.numel():
            assert quotas.amax() - quotas.amin() <= 1
    lowest = score.reshape(kept.shape).masked_fill(kept == 0, torch.inf).amin(dim=-1)
    highest = score.reshape(kept.shape).masked_fill(kept > 0, -torch.inf).amax(dim=-1)
    assert (lowest >= highest).all()


@SETTINGS
@given(grids(), st.integers(0, 99))
def test_run_mean_averages_tokens_of_one_place(case: tuple[Grid, int, int], seed: int) -> None:
    grid, groups, k = case
    count = grid.frames * grid.rows * grid.columns
    places = grid.rows * grid.columns if grid.frames > 1 else grid.columns
    keep = top_k(normal(groups, count, seed=seed), k).keep
    mix = run_mean(Selection(keep), grid)
    assert mix.shape == (groups, k, count)
    torch.testing.assert_close(mix.sum(dim=-1), torch.ones(groups, k))
    assert ((mix > 0).sum(dim=1) <= 1).all(), "a token is in two runs"
    assert (mix.gather(2, keep.unsqueeze(-1)) > 0).all(), "a survivor is not in its own run"
    for group, row, token in (mix > 0).nonzero().tolist():
        gap = token - int(keep[group, row])
        assert gap >= 0
        assert gap % places == 0
    if k == count:
        assert torch.equal(mix, torch.eye(count).expand(groups, -1, -1))


# Pivots and centres


def pivot_signals(groups: int, count: int, text: int, rows: int, seed: int = 0) -> dict[str, Any]:
    return {
        "normed_tokens": normal(groups, count, 6, seed=seed),
        "normed_text": normal(groups, text, 6, seed=seed + 1),
        "keys": normal(groups, 2, count, 3, seed=seed + 2),
        "text_keys": normal(groups, 2, text, 3, seed=seed + 3),
        "text_rows": (torch.arange(text) < rows).expand(groups, text),
    }


@SETTINGS
@given(st.data())
def test_unlike_pivots_keep_the_visual_pivots(data: st.DataObject) -> None:
    groups, count, text = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 30)), data.draw(st.integers(1, 6))
    k = data.draw(st.one_of(st.just(1), st.just(count), st.integers(1, count)))
    visual, words = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 5))
    signals = pivot_signals(groups, count, text, rows=data.draw(st.integers(0, text)))
    keep = unlike_pivots(**signals, k=k, visual_pivots=visual, text_pivots=words).keep
    check_keep(keep, groups, count, k)
    strongest = signals["keys"].abs().sum(dim=(1, 3)).topk(min(k, visual)).indices
    for group in range(groups):
        assert set(strongest[group].tolist()) <= set(keep[group].tolist())


def test_text_that_does_not_count_is_no_pivot() -> None:
    signals = pivot_signals(2, 20, 5, rows=2)
    expected = unlike_pivots(**signals, k=12).keep
    for name in ("normed_text", "text_keys"):
        signals[name] = signals[name].clone()
        at = (slice(None), slice(2, None)) if name == "normed_text" else (slice(None), slice(None), slice(2, None))
        signals[name][at] = 100.0
    assert torch.equal(unlike_pivots(**signals, k=12).keep, expected)
    signals["text_rows"] = torch.ones_like(signals["text_rows"])
    assert not torch.equal(unlike_pivots(**signals, k=12).keep, expected)


@SETTINGS
@given(st.data())
def test_every_candidate_joins_a_centre(data: st.DataObject) -> None:
    groups, count = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 30))
    k = data.draw(st.one_of(st.just(1), st.just(count), st.integers(1, count)))
    share, reach = data.draw(st.floats(0.1, 1.0)), data.draw(st.sampled_from([0.0, 0.3, 2.0]))
    keys = normal(groups, 2, count, 3, seed=data.draw(st.integers(0, 99)))
    keys = keys[:, :, torch.arange(count) % data.draw(st.integers(1, count))]  # duplicates
    score = normal(groups, count)
    keep, targets, assigned = density_centres(score, k, keys, candidates=share, reach=reach)
    check_keep(keep, groups, count, k)
    assert targets is None
    assert assigned is not None
    assert (assigned.gather(1, keep) == torch.arange(k)).all(), "a centre joins another"
    number = max(k, int(share * count + 0.5))
    candidates = score.topk(number).indices
    assert (assigned.gather(1, candidates) < k).all()
    if reach == 2.0:
        assert (assigned < k).all()
    mix = merge_assigned(Selection(keep, None, assigned), torch.ones(groups, count), average="mean")
    torch.testing.assert_close(mix.sum(dim=-1), torch.ones(groups, k))


def test_centres_of_clear_clusters_are_one_each() -> None:
    middles = torch.eye(3).repeat_interleave(4, dim=0)
    keys = (middles + 0.05 * normal(12, 3))[None, None]
    keep, _, assigned = density_centres(normal(1, 12), 3, keys, candidates=1.0)
    assert assigned is not None
    assert [int(token) // 4 for token in keep[0]] == [0, 1, 2]
    assert assigned[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_weighted_k_center_with_equal_weights_is_k_center() -> None:
    tokens = normal(3, 20, 6)
    for k in (1, 2, 9, 20):
        assert torch.equal(weighted_max_min(torch.full((3, 20), 0.3), tokens, k).keep, max_min(tokens, k).keep)
    heavy = torch.full((3, 20), 0.01)
    heavy[:, 7] = 1.0
    assert (weighted_max_min(heavy, tokens, 1).keep == 7).all()


# Scores of the decoder


def test_the_importance_of_the_mean_query_by_its_formula() -> None:
    queries, keys, tokens = normal(2, 3, 9, 4), normal(2, 3, 9, 4, seed=1), normal(2, 9, 5, seed=2)
    logits = np.einsum("ghd,ghnd->ghn", queries.double().numpy().mean(axis=2), keys.double().numpy()) / 2
    raised = np.exp(logits)
    share = (raised / raised.sum(axis=2, keepdims=True)).mean(axis=1)
    want = share * np.sqrt((tokens.double().numpy() ** 2).sum(axis=2))
    np.testing.assert_allclose(mean_query_importance(queries, keys, tokens).numpy(), want, rtol=1e-5)


def test_heads_that_share_keys_are_repeated() -> None:
    queries, keys, tokens = normal(2, 6, 9, 4), normal(2, 3, 9, 4, seed=1), normal(2, 9, 5, seed=2)
    shared = mean_query_importance(queries, keys, tokens)
    torch.testing.assert_close(shared, mean_query_importance(queries, keys.repeat_interleave(2, dim=1), tokens))
    torch.testing.assert_close(shared * 3.0, mean_query_importance(queries, keys, 3.0 * tokens))


def test_transition_adds_up_and_leaves_padding_out() -> None:
    reads, adds = normal(2, 2, 10, 5), normal(2, 2, 10, 5, seed=1)
    real = (torch.arange(10) < 8).expand(2, 10)
    slots = torch.arange(2, 6).expand(2, 4)
    once = token_transition_variation(reads, adds, real, slots)
    torch.testing.assert_close(once.score.sum(dim=1), torch.ones(2))
    twice = token_transition_variation(reads, adds, real, slots, carried=once.carry)
    torch.testing.assert_close(twice.carry, 2 * once.carry)
    reads[:, :, 8:], adds[:, :, 8:] = 0.0, 100.0
    torch.testing.assert_close(token_transition_variation(reads, adds, real, slots).carry, once.carry)


def test_transition_grows_with_length_and_turn() -> None:
    reads = torch.ones(1, 2, 4, 2)
    adds = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [1.0, 1.0]]).expand(1, 2, 4, 2)
    everywhere = torch.arange(4).unsqueeze(0)
    score = token_transition_variation(reads, adds, torch.ones(1, 4, dtype=torch.bool), everywhere).score[0]
    assert score[1] == 2 * score[0]
    assert score[2] > score[0]
    assert score[3] == score[0]


# Rows


def test_transprune_watches_fewer_layers_of_a_shallow_decoder() -> None:
    def plan(layers: int) -> list[int | None]:
        stages = plan_recipe(
            RECIPES["transprune"], keep=None, images=1, tokens_per_image=16, vision_layers=4, decoder_layers=layers
        ).stages
        return [stage.site.layer for stage in stages]

    assert plan(32) == [7, 8, 9, 10, 11, 12]
    assert plan(24) == [5, 6, 7, 8, 9]
    assert plan(8) == [2, 3, 4]
    assert plan(4) == [1, 2, 3]
    with pytest.raises(UserError, match="3 layers are too few"):
        plan(3)


@pytest.mark.parametrize("name", ["dycoke", "evs", "framefusion"])
def test_rows_by_frames_refuse_tokens_without_a_grid(name: str) -> None:
    plan = plan_recipe(
        RECIPES[name], keep=None, images=1, tokens_per_image=16, vision_layers=4, decoder_layers=4, grid=None
    )
    with pytest.raises(UserError, match="needs the whole grid of patches"):
        stage_function(plan.stages[0])
