"""What holds for every selector and merge, whatever the input: order, range, number, ties, sums."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.passes.methods.merge import nearest_target
from secateur.passes.methods.score import seeded_random
from secateur.passes.methods.select import Selection, max_min, top_k, top_k_and_uniform

SETTINGS = settings(max_examples=40, deadline=None)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    count = draw(st.integers(1, 40))
    return draw(st.integers(1, 3)), count, draw(st.one_of(st.just(1), st.just(count), st.integers(1, count)))


@st.composite
def scores(draw: st.DrawFn, groups: int, count: int) -> torch.Tensor:
    """Random, constant, or with few different values, so that ties abound."""
    values = torch.rand(groups, count, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    levels = draw(st.sampled_from([0, 1, 3]))
    return (values * levels).round() if levels else values


def check_keep(keep: torch.Tensor, groups: int, count: int, k: int) -> None:
    assert keep.shape == (groups, k)
    assert keep.dtype == torch.int64
    assert (keep >= 0).all()
    assert (keep < count).all()
    assert (keep[:, 1:] > keep[:, :-1]).all(), "not strictly increasing"


@SETTINGS
@given(st.data())
def test_top_k_keeps_exactly_the_highest(data: st.DataObject) -> None:
    groups, count, k = data.draw(sizes())
    score = data.draw(scores(groups, count))
    keep, targets, _ = top_k(score, k)
    check_keep(keep, groups, count, k)
    assert targets is None
    kept = torch.zeros(groups, count, dtype=torch.bool).scatter(1, keep, True)
    lowest_kept = score.masked_fill(~kept, torch.inf).amin(dim=1)
    highest_dropped = score.masked_fill(kept, -torch.inf).amax(dim=1)
    assert (lowest_kept >= highest_dropped).all()


@SETTINGS
@given(st.data(), st.floats(0.01, 0.99))
def test_top_k_and_uniform_marks_its_share(data: st.DataObject, contextual: float) -> None:
    groups, count, k = data.draw(sizes())
    score = data.draw(scores(groups, count))
    keep, targets, _ = top_k_and_uniform(score, k, contextual=contextual)
    check_keep(keep, groups, count, k)
    assert targets is not None
    number = targets.sum(dim=1)
    assert (number == number[0]).all()
    assert (number[0] == 0) if k == 1 else (1 <= number[0] <= k - 1)
    dominant = score.gather(1, keep).masked_fill(targets, torch.inf).amin(dim=1)
    others = score.scatter(1, keep, -torch.inf).amax(dim=1)
    assert (dominant >= others).all()


@SETTINGS
@given(st.data())
def test_max_min_keeps_k_different_tokens(data: st.DataObject) -> None:
    groups, count, k = data.draw(sizes())
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    tokens = torch.randn(groups, count, 6, generator=source)
    different = data.draw(st.integers(1, count))
    tokens = tokens[:, torch.randint(different, (count,), generator=source)]  # duplicates
    if data.draw(st.booleans()):
        tokens[:, 0] = 0.0
    keep = max_min(tokens, k).keep
    check_keep(keep, groups, count, k)
    # Other neighbours, the same batch: a matrix product of another shape may round otherwise and part duplicates.
    assert (max_min(tokens.flip(0), k).keep.flip(0) == keep).all(), "groups are not independent"
    unlike = torch.randn(groups, count, 6, generator=source)
    keep = max_min(unlike, k).keep
    for group in range(groups):
        assert (max_min(unlike[group : group + 1], k).keep[0] == keep[group]).all(), "groups are not independent"


@SETTINGS
@given(st.data(), st.sampled_from(["assigned", "all"]), st.booleans())
def test_mix_rows_sum_as_documented(data: st.DataObject, average: str, marked: bool) -> None:
    groups, count, k = data.draw(sizes())
    selection = top_k_and_uniform(data.draw(scores(groups, count)), k, contextual=0.3)
    if not marked:
        selection = Selection(selection.keep)
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    keys = torch.randn(groups, 2, count, 4, generator=source)
    mix = nearest_target(selection, keys, average=average)
    assert mix.shape == (groups, k, count)
    assert (mix >= 0).all()
    received = (mix > 0).sum(dim=-1) > 1
    expected = torch.where(received, 2.0, 1.0) if average == "assigned" else torch.ones(groups, k)
    torch.testing.assert_close(mix.sum(dim=-1), expected)
    assert (mix.gather(2, selection.keep.unsqueeze(-1)) > 0).all(), "a survivor lost its own token"
    if selection.targets is not None:
        assert not received[~selection.targets].any(), "a survivor that is no target received something"
        into = (mix > 0).any(dim=1).sum(dim=-1)
        assert (into == (count if k > 1 else 1)).all(), "a token went nowhere"
    if k == count:
        assert (mix == torch.eye(count)).all()


@SETTINGS
@given(st.integers(1, 60), st.integers(0, 99))
def test_seeded_random_is_an_order_without_ties(count: int, seed: int) -> None:
    score = seeded_random(torch.zeros(2, count, 3), seed=seed)
    assert score.dtype == torch.float32
    assert score[0].sort().values.tolist() == list(range(count))
    assert (score[0] == score[1]).all()
    assert (score == seeded_random(torch.ones(2, count, 3), seed=seed)).all()


def test_seeds_differ() -> None:
    tokens = torch.zeros(1, 64, 1)
    assert (seeded_random(tokens, seed=0) != seeded_random(tokens, seed=1)).any()


def test_equal_scores_still_give_exactly_k() -> None:
    for count, k in ((1, 1), (576, 57), (577, 577)):
        check_keep(top_k(torch.zeros(2, count), k).keep, 2, count, k)
        check_keep(top_k_and_uniform(torch.zeros(2, count), k).keep, 2, count, k)
