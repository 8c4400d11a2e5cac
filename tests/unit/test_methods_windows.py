"""Quotas, anchors, rounds of de-duplication and centres: larger grids than the table's test, options, extremes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.compiler.layout import Grid
from secateur.compiler.plan_recipe import plan_recipe
from secateur.passes.methods.merge_nearest import centres_by_keys, merge_centres, nearest_mean, top_k_and_centres
from secateur.passes.methods.rows import prefer
from secateur.passes.methods.score_tower import (
    cls_attention_layers_mean,
    question_similarity,
    received_attention_layers_mean,
    split_budget,
)
from secateur.passes.methods.select import Selection, top_k
from secateur.passes.methods.select_windows import (
    anchors_first,
    chunks_first,
    distinct,
    grid_first,
    grid_parts,
    rank_within,
    tiles_first,
    top_mask,
    windows_first,
)
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import stage_function

from .transcriptions import View, tower_attention
from .transcriptions.draw import draw_signals

SETTINGS = settings(max_examples=30, deadline=None)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, Grid, int]:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    count = rows * columns
    k = draw(st.one_of(st.just(1), st.just(count), st.integers(1, count)))
    return draw(st.integers(1, 3)), Grid(1, rows, columns), k


@pytest.mark.parametrize("keep", [0.11, 0.4, None])
@pytest.mark.parametrize("grid", [(14, 14), (12, 17)])
@pytest.mark.parametrize("name", sorted(tower_attention.ROWS))
def test_row_follows_its_paper_on_larger_grids(name: str, grid: tuple[int, int], keep: float | None) -> None:
    count = grid[0] * grid[1]
    plan = plan_recipe(
        RECIPES[name], keep=keep, images=1, tokens_per_image=count, vision_layers=24, decoder_layers=32, grid=grid
    )
    carried = None
    for planned in plan.stages:
        stage = stage_function(planned)
        signals = draw_signals(stage, 1, seed=planned.index, carried=carried)
        (kept, mix), carry = stage.run(signals)
        one = {signal: value[0].numpy() for signal, value in signals.items()}
        expected = tower_attention.ROWS[name](View(planned.index, planned.length_out, planned.grid, one))
        assert kept[0].tolist() == list(expected.keep)
        if mix is not None and expected.rows is not None:
            np.testing.assert_allclose((mix[0] @ signals["tokens"][0]).numpy(), expected.rows, rtol=1e-4, atol=1e-4)
        carried = None if carry is None else carry.gather(1, kept)


def test_layers_are_summed_or_read_alone() -> None:
    attention = random_rows(0, 2, 3, 4, 10).abs()
    for score in (cls_attention_layers_mean, received_attention_layers_mean):
        torch.testing.assert_close(score(attention), attention.mean(dim=2).sum(dim=1))
        torch.testing.assert_close(score(attention, heads="max"), attention.amax(dim=2).sum(dim=1))
        torch.testing.assert_close(score(attention, layers="first", heads="sum"), attention[:, 0].sum(dim=1))
        torch.testing.assert_close(score(attention, layers="last"), attention[:, 2].mean(dim=1))


def test_one_layer_is_first_and_last() -> None:
    """Of a shallow tower two published layers may become the same one."""
    attention = random_rows(0, 2, 1, 4, 10).abs()
    assert (cls_attention_layers_mean(attention, layers="first") == attention[:, 0].mean(dim=1)).all()
    assert (cls_attention_layers_mean(attention, layers="last") == attention[:, 0].mean(dim=1)).all()


def test_question_similarity_counts_marked_slots_only() -> None:
    tokens, text = random_rows(0, 1, 5, 4), random_rows(1, 1, 3, 4)
    marked = torch.tensor([[True, False, True]])
    got = question_similarity(tokens, text, marked)[0]
    for token in range(5):
        cosines = [torch.cosine_similarity(tokens[0, token], text[0, slot], dim=0) for slot in (0, 2)]
        torch.testing.assert_close(got[token], sum(cosines) / 2)
    assert (question_similarity(tokens, text, torch.zeros(1, 3, dtype=torch.bool)) == 0).all()


@SETTINGS
@given(sizes(), st.integers(0, 99), st.booleans())
def test_preferred_tokens_come_first_in_their_own_order(size: tuple[int, Grid, int], seed: int, negative: bool) -> None:
    groups, grid, _ = size
    count = grid.rows * grid.columns
    score = random_rows(seed, groups, count) * (1.0 if negative else 0.001)
    weight = torch.randint(0, 3, (groups, count), generator=torch.Generator().manual_seed(seed)).float()
    lifted = prefer(score, weight)
    for group in range(groups):
        order = sorted(range(count), key=lambda token, g=group: (-float(weight[g, token]), -float(score[g, token])))
        assert lifted[group].argsort(descending=True).tolist() == order


@SETTINGS
@given(sizes(), st.integers(0, 99))
def test_rank_within_counts_those_before_in_the_same_part(size: tuple[int, Grid, int], seed: int) -> None:
    groups, grid, _ = size
    count = grid.rows * grid.columns
    score = torch.randint(0, 4, (groups, count), generator=torch.Generator().manual_seed(seed)).float()
    part = grid_parts(grid, min(2, grid.rows), min(3, grid.columns))
    rank = rank_within(score, part)
    for group in range(groups):
        for token in range(count):
            mine = float(score[group, token])
            before = [
                other
                for other in range(count)
                if part[other] == part[token]
                and (float(score[group, other]) > mine or (float(score[group, other]) == mine and other < token))
            ]
            assert rank[group, token] == len(before)


def test_top_mask_of_nothing() -> None:
    assert (top_mask(random_rows(0, 2, 5), 0) == 0).all()


def test_grid_parts_are_even() -> None:
    assert grid_parts(Grid(1, 2, 4), 1, 2) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert grid_parts(Grid(2, 1, 2), 1, 1) == [0, 0, 1, 1], "frames share no window"
    counts = np.bincount(grid_parts(Grid(1, 14, 14), 4, 4))
    assert counts.min() == 9
    assert counts.max() == 16


@SETTINGS
@given(sizes(), st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 6))
def test_every_window_gives_its_quota(size: tuple[int, Grid, int], seed: int, share: float, side: int) -> None:
    groups, grid, k = size
    count = grid.rows * grid.columns
    local, everywhere = random_rows(seed, groups, count), random_rows(seed + 1, groups, count)
    keep = top_k(windows_first((local, everywhere), k, grid, side=side, share=share), k).keep
    down, across = max(1, int(grid.rows / side + 0.5)), max(1, int(grid.columns / side + 0.5))
    part = grid_parts(grid, down, across)
    for group in range(groups):
        kept = set(keep[group].tolist())
        assert len(kept) == k
        promised: set[int] = set()
        for window in range(down * across):
            inside = [token for token in range(count) if part[token] == window]
            inside.sort(key=lambda token, g=group: -float(local[g, token]))
            promised |= set(inside[: int(share * k) // (down * across)])
        assert promised <= kept
        others = sorted(set(range(count)) - promised, key=lambda token, g=group: -float(everywhere[g, token]))
        assert kept == promised | set(others[: k - len(promised)])


@SETTINGS
@given(sizes(), st.integers(0, 99), st.floats(0, 1))
def test_tiles_leave_the_best_of_the_whole_image(size: tuple[int, Grid, int], seed: int, alpha: float) -> None:
    groups, grid, k = size
    count = grid.rows * grid.columns
    spread, content = random_rows(seed, groups, count), random_rows(seed + 1, groups, count)
    keep = top_k(tiles_first((spread, content), k, grid, alpha=alpha), k).keep
    best = content.topk(int(alpha * k), dim=1).indices
    for group in range(groups):
        assert set(best[group].tolist()) <= set(keep[group].tolist())


def test_tiles_get_what_the_first_score_says() -> None:
    """The 8 tokens that count lie in the first and the last quarter; content prefers the other two."""
    grid = Grid(1, 4, 4)
    part = torch.tensor(grid_parts(grid, 2, 2))
    spread = ((part == 3) * 2.0 + (part == 0) * 1.0)[None]
    content = (part == 1) * 3.0 + (part == 2) * 2.0 + torch.arange(16) / 100.0
    keep = top_k(tiles_first((spread, content[None]), 8, grid, alpha=0.5), 8).keep[0]
    assert [int((part[keep] == quarter).sum()) for quarter in range(4)] == [2, 4, 0, 2]
    keep = top_k(tiles_first((spread, content[None]), 7, grid, alpha=0.5), 7).keep[0]
    assert [int((part[keep] == quarter).sum()) for quarter in range(4)] == [2, 3, 0, 2]


def test_one_tile_is_a_plain_ranking() -> None:
    score = random_rows(0, 2, 36)
    lifted = tiles_first((random_rows(1, 2, 36), score), 13, Grid(1, 6, 6), rows=1, columns=1)
    assert (top_k(lifted, 13).keep == top_k(score, 13).keep).all()


def test_anchors_bring_their_neighbours() -> None:
    objects, content = torch.zeros(1, 30), torch.zeros(1, 30)
    objects[0, 13] = 1.0  # row 2, column 3 of 6 rows of 5
    keep = top_k(anchors_first((objects, content), 5, Grid(1, 6, 5), alpha=1.0), 5).keep
    assert keep.tolist() == [[8, 12, 13, 14, 18]]


@pytest.mark.parametrize(("anchor", "around"), [(0, [0, 1, 5]), (4, [0, 3, 4, 5, 9]), (29, [24, 28, 29])])
def test_anchors_at_the_edge_wrap_and_clamp(anchor: int, around: list[int]) -> None:
    objects, content = torch.zeros(1, 30), torch.zeros(1, 30)
    objects[0, anchor] = 1.0
    keep = top_k(anchors_first((objects, content), 5, Grid(1, 6, 5), alpha=1.0), len(around)).keep
    assert keep.tolist() == [around]


@SETTINGS
@given(sizes(), st.integers(0, 99), st.integers(1, 20))
def test_chunks_share_out_exactly_k(size: tuple[int, Grid, int], seed: int, chunks: int) -> None:
    groups, grid, k = size
    count = grid.rows * grid.columns
    score = random_rows(seed, groups, count).softmax(dim=1)
    lifted = chunks_first(score, random_rows(seed + 1, groups, count, 6), k, chunks=chunks)
    chosen = (lifted >= count).sum(dim=1)
    assert (chosen <= k).all()
    assert torch.isfinite(lifted).all()
    if chunks == 1:
        assert (top_k(lifted, k).keep == top_k(score, k).keep).all()


def test_an_attended_chunk_gives_more() -> None:
    score = torch.full((1, 32), 0.01)
    score[0, 8:16] = 0.04
    keep = top_k(chunks_first(score, random_rows(0, 1, 32, 6), 14, chunks=4, variance=0.0), 14).keep[0]
    given = [int(((keep >= 8 * chunk) & (keep < 8 * chunk + 8)).sum()) for chunk in range(4)]
    assert given == [2, 8, 2, 2]


def test_what_a_full_chunk_cannot_give_goes_to_the_others() -> None:
    score = torch.full((1, 32), 0.001)
    score[0, :8] = 1.0
    score[0, 20:25] = 0.002
    keep = top_k(chunks_first(score, random_rows(0, 1, 32, 6), 13, chunks=4), 13).keep[0]
    assert keep.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 22, 23, 24]


@SETTINGS
@given(sizes(), st.integers(0, 99), st.sampled_from([0.0, 0.25, 1.0]))
def test_grid_first_takes_the_grid_and_the_best(size: tuple[int, Grid, int], seed: int, attention: float) -> None:
    groups, grid, k = size
    count = grid.rows * grid.columns
    score = random_rows(seed, groups, count)
    keep = top_k(grid_first(score, k, attention=attention), k).keep
    ranked = int(attention * (k - 1) + 0.5)
    places = k - 1 - ranked
    even = set(np.floor(np.arange(places) * count / max(places, 1) + 1e-9).astype(int).tolist())
    for group in range(groups):
        best = set(score[group].topk(ranked).indices.tolist())
        assert best | even <= set(keep[group].tolist())


@SETTINGS
@given(sizes(), st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 9))
def test_distinct_keeps_k_and_the_important(
    size: tuple[int, Grid, int], seed: int, important: float, step: int
) -> None:
    groups, grid, k = size
    count = grid.rows * grid.columns
    score, tokens = random_rows(seed, groups, count), random_rows(seed + 1, groups, count, 4)
    tokens[:, : count // 2] = tokens[:, count // 2 : count // 2 * 2]  # duplicates
    keep = distinct(score, tokens, k, important=important, step=step).keep
    assert keep.shape == (groups, k)
    assert keep.dtype == torch.int64
    assert (keep[:, 1:] > keep[:, :-1]).all()
    assert (keep >= 0).all()
    assert (keep < count).all()
    best = score.topk(int(important * k), dim=1).indices
    for group in range(groups):
        assert set(best[group].tolist()) <= set(keep[group].tolist())
        alone = distinct(score[group : group + 1], tokens[group : group + 1], k, important=important, step=step).keep
        assert (alone[0] == keep[group]).all(), "groups are not independent"


def test_distinct_drops_the_duplicate() -> None:
    tokens = torch.eye(6).unsqueeze(0)
    tokens[0, 3] = tokens[0, 0]
    score = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert distinct(score, tokens, 5, important=0.0).keep.tolist() == [[1, 2, 3, 4, 5]]
    assert distinct(score, tokens, 5, important=0.2).keep.tolist() != [[1, 2, 3, 4, 5]], "the best is kept"


@SETTINGS
@given(sizes(), st.integers(0, 99))
def test_nearest_mean_spends_every_token_once(size: tuple[int, Grid, int], seed: int) -> None:
    groups, grid, k = size
    count = grid.rows * grid.columns
    selection = top_k(random_rows(seed, groups, count), k)
    mix = nearest_mean(selection, random_rows(seed + 1, groups, count, 5))
    torch.testing.assert_close(mix.sum(dim=2), torch.ones(groups, k))
    assert ((mix > 0).sum(dim=1) == 1).all()
    assert (mix.gather(2, selection.keep.unsqueeze(-1)) > 0).all()
    if k == count:
        assert (mix == torch.eye(count)).all()


@SETTINGS
@given(sizes(), st.integers(0, 99), st.integers(1, 40), st.booleans())
def test_centres_and_leftover(size: tuple[int, Grid, int], seed: int, neighbours: int, marked: bool) -> None:
    groups, grid, k = size
    count = grid.rows * grid.columns
    score, weight = random_rows(seed, groups, count), random_rows(seed + 1, groups, count).abs() + 0.1
    selection = top_k_and_centres(score, k) if marked else top_k(score, k)
    plain = sum(split_budget(k, 0.5, 0.25)) if marked else 0
    mix = merge_centres(selection, score, weight, random_rows(seed + 2, groups, k, count), neighbours)
    assert mix.shape == (groups, k, count)
    for group in range(groups):
        keep = selection.keep[group].tolist()
        order = sorted(keep, key=lambda token, g=group: -float(score[g, token]))
        untouched, centres, last = order[:plain], order[plain:-1], order[-1] if plain < k else None
        for row, token in enumerate(keep):
            got = mix[group, row]
            if token == last:
                gone = [t for t in range(count) if t not in untouched + centres]
                expected = torch.zeros(count)
                expected[gone] = weight[group, gone]
                torch.testing.assert_close(got, expected)
            else:
                assert got[token] == 1
                others = (got > 0).sum() - 1
                candidates = count - 1 - len(untouched)
                assert others == (min(neighbours, candidates) if token in centres else 0)
                assert (got[untouched] == 0).all() if token in centres else True


def test_a_centre_gains_its_nearest_tokens_by_weight() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]).reshape(1, 1, 4, 2)
    attention = torch.tensor([[[0.4, 0.1, 0.2, 0.3]]])
    mix = centres_by_keys(Selection(torch.tensor([[0, 3]])), attention[:, 0], attention, keys, neighbours=1)
    assert mix.tolist() == [[[1.0, pytest.approx(0.1), 0.0, 0.0], [0.0, *map(pytest.approx, (0.1, 0.2, 0.3))]]]


def test_targets_are_what_the_two_rounds_did_not_take() -> None:
    score = random_rows(0, 2, 20)
    keep, targets, _ = top_k_and_centres(score, 12)
    assert targets is not None
    assert (targets.sum(dim=1) == 3).all()
    lowest_plain = score.gather(1, keep).masked_fill(targets, torch.inf).amin(dim=1)
    assert (score.gather(1, keep).masked_fill(~targets, -torch.inf).amax(dim=1) < lowest_plain).all()
    assert not top_k_and_centres(score, 1).targets.any()  # type: ignore[union-attr]
