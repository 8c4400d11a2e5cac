"""Pairing selectors and the merges that read them: extremes, rounds, options, and what is left when K is forced."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.compiler.plan_recipe import plan_recipe
from secateur.passes.methods.merge_pairs import (
    SELECTORS,
    bipartite_keys,
    bipartite_tokens,
    complete_graph_keys,
    merge_assigned,
    merge_by_importance,
)
from secateur.passes.methods.select import Selection
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import stage_function
from secateur.runtime.errors import UserError

from .transcriptions import View
from .transcriptions.draw import draw_signals
from .transcriptions.tower import ROWS, cosine, tome

SETTINGS = settings(max_examples=40, deadline=None)
PAIR: dict[str, Callable[[Tensor, Tensor, int], Selection]] = {
    "bipartite_keys": lambda keys, _score, k: bipartite_keys(keys, k),
    "bipartite_tokens": lambda keys, _score, k: bipartite_tokens(keys[:, 0], k),
    "complete_graph_keys": lambda keys, score, k: complete_graph_keys(keys, score, k),
}


def draw_rows(seed: int, groups: int, count: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    keys = torch.randn(groups, 2, count, 5, generator=source)
    return keys, torch.rand(groups, count, generator=source)


def test_every_selector_is_tried_here() -> None:
    assert set(PAIR) == set(SELECTORS)


@SETTINGS
@given(st.data(), st.sampled_from(sorted(PAIR)))
def test_every_token_joins_one_survivor(data: st.DataObject, name: str) -> None:
    groups, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 33))
    k = data.draw(st.one_of(st.just(1), st.just(count), st.integers(1, count)))
    keys, score = draw_rows(data.draw(st.integers(0, 999)), groups, count)
    if data.draw(st.booleans()):
        keys = keys[:, :, torch.arange(count) % data.draw(st.integers(1, count))]  # duplicates
    if data.draw(st.booleans()):
        keys[:, :, 0] = 0.0
    selection = PAIR[name](keys, score, k)
    keep, assigned = selection.keep, selection.assigned
    assert assigned is not None
    assert keep.shape == (groups, k)
    assert assigned.shape == (groups, count)
    assert keep.dtype == assigned.dtype == torch.int64
    assert ((keep >= 0) & (keep < count)).all()
    assert (keep[:, 1:] > keep[:, :-1]).all(), "not strictly increasing"
    assert ((assigned >= 0) & (assigned < k)).all()
    assert (assigned.gather(1, keep) == torch.arange(k)).all(), "a survivor does not join itself"
    for group in range(groups):
        alone = PAIR[name](keys[group : group + 1], score[group : group + 1], k)
        assert (alone.keep[0] == keep[group]).all(), "groups are not independent"
    for mix in (
        merge_assigned(selection, torch.ones(groups, count), average="mean"),
        merge_assigned(selection, score + 1.0, average="size"),
        merge_by_importance(selection, torch.full((groups, count), 3.0), score),
    ):
        torch.testing.assert_close(mix.sum(dim=2), torch.ones(groups, k))
        if k == count:
            torch.testing.assert_close(mix, torch.eye(count).expand(groups, -1, -1))
    # No weight is zero, so the sizes of the next stage count every token that went in.
    assert ((merge_assigned(selection, score + 1.0) != 0).sum(dim=(1, 2)) == count).all()


@pytest.mark.parametrize("sources", ["even", "odd"])
def test_one_round_takes_sources_of_one_side(sources: str) -> None:
    keys, _ = draw_rows(1, 1, 12)
    selection = bipartite_tokens(keys[:, 0], 6, sources=sources)  # type: ignore[arg-type]
    assert selection.keep[0].tolist() == list(range(1 if sources == "even" else 0, 12, 2))


@pytest.mark.parametrize("count", [16, 17, 30])
def test_two_rounds_as_aim_merges_a_frame(count: int) -> None:
    """N/2 and then N/4 of what is there merge, even places into odd ones, by the rows at hand; means of means.

    As two stages, which is how a recipe writes it: each rows' metric is that of the rows the stage before made.
    """
    source = torch.Generator().manual_seed(count)
    rows = torch.randn(1, count, 8, generator=source)
    expected = rows[0].double().numpy()
    for number in (count // 2, count // 4):
        k = expected.shape[0] - number
        selection = bipartite_tokens(rows, k)
        rows = merge_assigned(selection, torch.ones(1, len(expected)), average="mean") @ rows
        expected = merge_once(expected, number)
        np.testing.assert_allclose(rows[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def merge_once(rows: np.ndarray, number: int) -> np.ndarray:
    sides = range(0, len(rows), 2), range(1, len(rows), 2)
    found = []
    for a in sides[0]:
        similarity, b = max((cosine(rows[a], rows[b]), b) for b in sides[1])
        found.append((similarity, a, b))
    found = sorted(found, reverse=True)[:number]
    gone = {a for _, a, _ in found}
    return np.array(
        [
            np.mean([rows[i], *(rows[a] for _, a, b in found if b == i)], axis=0)
            for i in range(len(rows))
            if i not in gone
        ]
    )


def test_mutual_nearest_tokens_do_not_wait_for_each_other() -> None:
    """Two pairs of twins: one of each pair goes, the lower index because equals rank by index."""
    angles = torch.tensor([0.0, 2.0, 0.01, 2.01])
    keys = torch.stack([angles.cos(), angles.sin()], dim=1).reshape(1, 1, 4, 2)
    selection = complete_graph_keys(keys, torch.zeros(1, 4), 2)
    assert selection.keep.tolist() == [[2, 3]]
    assert selection.assigned is not None
    assert selection.assigned.tolist() == [[0, 1, 0, 1]]


def test_important_tokens_are_not_sources() -> None:
    keys, score = draw_rows(2, 1, 10)
    score[0, 3] = 5.0
    assert 3 in complete_graph_keys(keys, score, 2).keep[0].tolist()


def test_importance_of_a_pair_is_a_softmax() -> None:
    selection = Selection(torch.tensor([[1]]), assigned=torch.tensor([[0, 0]]))
    mix = merge_by_importance(selection, torch.ones(1, 2), torch.tensor([[1.0, 3.0]]))
    first = math.exp(1) / (math.exp(1) + math.exp(3))
    torch.testing.assert_close(mix, torch.tensor([[[first, 1 - first]]]))


def test_sizes_weigh_as_the_paper_says() -> None:
    selection = Selection(torch.tensor([[0, 3]]), assigned=torch.tensor([[0, 0, 1, 1]]))
    mix = merge_assigned(selection, torch.tensor([[1.0, 3.0, 2.0, 2.0]]))
    assert mix.tolist() == [[[0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]]


def test_dropped_tokens_are_left_out() -> None:
    selection = Selection(torch.tensor([[0, 3]]), assigned=torch.tensor([[0, 2, 0, 1]]))
    for mix in (
        merge_assigned(selection, torch.ones(1, 4)),
        merge_by_importance(selection, torch.ones(1, 4), torch.zeros(1, 4)),
    ):
        torch.testing.assert_close(mix, torch.tensor([[[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]]))


def test_a_merge_without_pairs_says_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"merge: this merge needs a selector that pairs tokens \(available: bipartite"):
        merge_assigned(Selection(torch.tensor([[0]])), torch.ones(1, 3))


@pytest.mark.parametrize("name", ["tome", "crossget"])
def test_forced_survivors_take_nothing_with_them(name: str) -> None:
    plan = plan_recipe(
        RECIPES[name], keep=0.5, images=1, tokens_per_image=20, vision_layers=2, decoder_layers=32, grid=(4, 5)
    )
    stage = stage_function(plan.stages[0])
    signals = draw_signals(stage, 1, seed=0)
    own = stage(signals)
    forced = torch.arange(plan.stages[0].length_out).unsqueeze(0)
    assert not torch.equal(own.keep, forced)
    found = stage.with_keep(signals, forced)
    assert found.mix is not None
    torch.testing.assert_close(found.mix, torch.eye(20)[: forced.shape[1]].unsqueeze(0))
    again = stage.with_keep(signals, own.keep)
    assert own.mix is not None
    assert again.mix is not None
    torch.testing.assert_close(again.mix, own.mix)


@pytest.mark.parametrize("count", [16, 17, 25])
@pytest.mark.parametrize("has_cls", [True, False])
def test_tome_counts_places_with_cls_where_the_tower_has_one(has_cls: bool, count: int) -> None:
    plan = plan_recipe(
        RECIPES["tome"], keep=0.5, images=1, tokens_per_image=count, vision_layers=3, decoder_layers=2,
        grid=(1, count), has_cls=has_cls,
    )  # fmt: skip
    for planned in plan.stages:
        stage = stage_function(planned)
        signals = draw_signals(stage, 1, seed=count)
        view = View(planned.index, planned.length_out, planned.grid, {n: v[0].numpy() for n, v in signals.items()})
        found, expected = stage(signals), tome(view, has_cls)
        assert found.keep[0].tolist() == list(expected.keep)
        assert found.mix is not None
        assert expected.rows is not None
        np.testing.assert_allclose((found.mix @ signals["tokens"])[0].numpy(), expected.rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [*range(2, 40), 196, 729, 730, 731])
def test_aim_removes_half_and_a_quarter_rounded_down(count: int) -> None:
    """729 tokens become 365 and 183."""
    plan = plan_recipe(
        RECIPES["aim"], keep=None, images=max(1, 40 // count), tokens_per_image=count, vision_layers=2,
        decoder_layers=28, grid=(1, count),
    )  # fmt: skip
    left = count - count // 2
    assert [stage.length_out for stage in plan.stages[:2]] == [left, left - count // 4]


@pytest.mark.parametrize(
    ("name", "entering", "left"),
    [("gprune", 729, 364), ("zoo_prune", 100, 33), ("evs", 102, 25), ("echoingpixels", 101, 21), ("divprune", 576, 56)],
)
def test_counts_are_rounded_as_the_authors_do(name: str, entering: int, left: int) -> None:
    """int(0.5 N), int(ratio N), int(N (1 - q)), ceil(0.2 N); round(ratio N) for DivPrune."""
    plan = plan_recipe(
        RECIPES[name], keep=None, images=1, tokens_per_image=entering, vision_layers=2, decoder_layers=28,
        grid=(1, entering),
    )  # fmt: skip
    assert plan.stages[-1].length_out == left


def test_a_share_that_is_nearest_to_one_token_is_not_rounded_to_none() -> None:
    plan = plan_recipe(
        RECIPES["zoo_prune"], keep=0.06, images=1, tokens_per_image=16, vision_layers=2, decoder_layers=2, grid=(4, 4)
    )
    assert plan.stages[0].length_out == 1


@pytest.mark.parametrize("name", ["tome", "crossget"])
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_rows_of_several_sizes_follow_the_paper(name: str, keep: float) -> None:
    """The table's own test draws tokens of size 1."""
    plan = plan_recipe(
        RECIPES[name], keep=keep, images=1, tokens_per_image=25, vision_layers=24, decoder_layers=32, grid=(5, 5)
    )
    planned = plan.stages[1]
    stage = stage_function(planned)
    signals = draw_signals(stage, 2, seed=1)
    source = torch.Generator().manual_seed(2)
    signals["size"] = torch.randint(1, 9, (2, planned.length_in), generator=source).float()
    keep_found, mix = stage(signals)
    assert mix is not None
    for group in range(2):
        one = {signal: value[group].numpy() for signal, value in signals.items()}
        expected = ROWS[name](View(1, planned.length_out, None, one))
        assert keep_found[group].tolist() == list(expected.keep)
        assert expected.rows is not None
        rows = (mix[group] @ signals["tokens"][group]).numpy()
        np.testing.assert_allclose(rows, expected.rows, rtol=1e-4, atol=1e-4)
