"""SEATS' words with what is seen and heard, against slow loops; budgets that are shared out; the schedule's row."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.compiler.layout import Layout, share_out
from secateur.compiler.plan_recipe import plan_recipe
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.passes.methods.select import top_k, weighted_max_min
from secateur.passes.methods.windows_in_time import (
    _repair,
    _split_windows,
    unlike_sound,
    window_modality_quotas,
    windowed_max_min,
)
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import stage_function
from secateur.runtime.errors import UserError

from .test_methods_onnx import call, run_onnx
from .transcriptions.draw import draw_signals
from .transcriptions.seats import halves_apart, kinds_kept, repair, split_window, stage_one, stage_two

SOUND = 3
"""Tokens of sound per moment."""


def heard_and_seen(moments: int, patches: int, silent: int | None = None, blind: int | None = None) -> Layout:
    """Chunk by chunk of two moments: what is seen in it, then what is heard; nothing is heard from the moment
    ``silent`` on, nothing is seen from ``blind`` on."""
    frames: list[int] = []
    modalities: list[int] = []
    for first in range(0, moments, 2):
        chunk = range(first, min(first + 2, moments))
        for kind, number in ((0, patches), (1, SOUND)):
            until = silent if kind else blind
            held = [moment for moment in chunk if until is None or moment < until]
            frames += [moment for moment in held for _ in range(number)]
            modalities += [kind] * (number * len(held))
    return Layout(tuple(frames), tuple(modalities))


def draw(layout: Layout, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[2,n]`` as small as attention is, tokens ``[2,n,6]``, and which tokens of the layout they are."""
    source = torch.Generator().manual_seed(seed)
    score = torch.softmax(2 * torch.randn(2, n, generator=source), 1)
    left = [torch.randperm(len(layout.frames), generator=source)[:n].sort().values for _ in range(2)]
    return score, torch.randn(2, n, 6, generator=source), torch.stack(left)


def cells_of(layout: Layout, frames: int = 2) -> list[tuple[int, int]]:
    return [(frame // frames, kind) for frame, kind in zip(*layout, strict=True)]


RATES = st.sampled_from([(1.0, 1.0), (0.06, 0.35), (0.3, 0.65)])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), RATES, st.integers(0, 2**16), st.data())
def test_stage_two_follows_the_loops(
    moments: int, patches: int, rates: tuple[float, float], seed: int, data: st.DataObject
) -> None:
    """Also where the sound ends before the video or the video before the sound, and where one kind is gone."""
    ends = {data.draw(st.sampled_from(["silent", "blind"])): data.draw(st.integers(1, moments))}
    layout = heard_and_seen(moments, patches, **ends)
    n = data.draw(st.integers(1, len(layout.frames)))
    k = data.draw(st.integers(1, n))
    temperature, frames = data.draw(st.sampled_from([0.1, 0.3])), data.draw(st.sampled_from([1, 2]))
    score, _, source = draw(layout, n, seed)
    kept, cells = kinds_kept(layout.modalities, k, rates), cells_of(layout, frames)
    of_rows = [[cells[i] for i in row] for row in source]
    for row, mine in enumerate(of_rows):
        if len({kind for _, kind in mine}) == 2:
            assume(halves_apart(score[row].tolist(), mine, k, kept, temperature) > 1e-4)
    lifted = window_modality_quotas(score, source, k, layout, temperature=temperature, frames=frames, rates=rates)
    for row, mine in enumerate(of_rows):
        assert top_k(lifted, k).keep[row].tolist() == stage_two(score[row].tolist(), mine, k, kept, temperature)


def test_a_window_without_sound_counts_as_much_as_one_with() -> None:
    """Of 56 tokens about 14 each for 4 windows of 24 seen tokens; the first two have 15 of sound besides."""
    frames = [
        moment for first in (0, 2) for moment in (*[first] * 12, *[first + 1] * 12, *[first] * 8, *[first + 1] * 7)
    ]
    kinds = [kind for _ in range(2) for kind in (*[0] * 24, *[1] * 15)]
    layout = Layout((*frames, *(f for f in range(4, 8) for _ in range(12))), (*kinds, *[0] * 48))
    assert len(layout.frames) == 8 * 12 + 30
    score, _, source = draw(layout, 126, 5)
    score = torch.cat([score, torch.full((1, 126), 1 / 126)])
    source = torch.arange(126).expand(3, 126)
    keep = top_k(window_modality_quotas(score, source, 56, layout, rates=(0.4, 0.6)), 56).keep
    for row in keep.tolist():
        windows = Counter(layout.frames[i] // 2 for i in row)
        assert all(abs(windows[window] - 14) <= 1 for window in range(4)), windows
        # Of the kinds' own 38 and 18 tokens the silent windows give sound none.
        assert 8 <= sum(layout.modalities[i] for i in row) <= 10


def test_windows_of_one_kind_share_by_their_weight() -> None:
    """Eight frames of six tokens, those of the second window the strongest by far: they stay, and one of each other."""
    layout = Layout.of_images(8, 6)
    score, _, source = draw(layout, 48, 9)
    score = torch.where(torch.tensor(layout.frames) // 2 == 1, score + 1.0, score)
    for row in top_k(window_modality_quotas(score, source, 15, layout), 15).keep.tolist():
        assert Counter(layout.frames[i] // 2 for i in row) == {0: 1, 1: 12, 2: 1, 3: 1}


@pytest.mark.parametrize("kind", [0, 1])
def test_with_one_kind_of_token_the_highest_scores_stay(kind: int) -> None:
    """As in the authors' code: without sound (or without anything seen) there are no windows."""
    layout = Layout(tuple(range(20)), (kind,) * 20)
    score, _, source = draw(layout, 20, 6)
    lifted = window_modality_quotas(score, source, 7, layout, alone="highest")
    assert torch.equal(top_k(lifted, 7).keep, top_k(score, 7).keep)
    both = heard_and_seen(6, 4)
    mine = torch.tensor([i for i, other in enumerate(both.modalities) if other == kind])
    score = torch.rand(1, len(mine), generator=torch.Generator().manual_seed(7))
    lifted = window_modality_quotas(score, mine.unsqueeze(0), 7, both)
    assert torch.equal(top_k(lifted, 7).keep, top_k(score, 7).keep), "an earlier stage took the other kind"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), RATES, st.integers(0, 2**16), st.data())
def test_stage_one_follows_the_loops(
    moments: int, patches: int, rates: tuple[float, float], seed: int, data: st.DataObject
) -> None:
    layout = heard_and_seen(moments, patches)
    n = len(layout.frames)
    k = data.draw(st.integers(1, n))
    score, tokens, _ = draw(layout, n, seed)
    keep = windowed_max_min(score, tokens, k, layout, rates=rates).keep
    assert keep.shape == (2, k)
    for row in range(2):
        assert keep[row].tolist() == stage_one(tokens[row].tolist(), score[row].tolist(), cells_of(layout), k, rates)


def test_one_window_of_one_kind_is_the_plain_selection() -> None:
    layout = Layout.of_images(2, 8)
    score, tokens, source = draw(layout, 16, 0)
    assert torch.equal(windowed_max_min(score, tokens, 5, layout).keep, weighted_max_min(score, tokens, 5).keep)
    lifted = window_modality_quotas(score, source, 5, layout)
    assert torch.equal(top_k(lifted, 5).keep, top_k(score, 5).keep)


def test_one_window_of_two_kinds_is_the_highest_of_each() -> None:
    layout = heard_and_seen(2, 10)  # 20 seen, 6 heard
    score, _, source = draw(layout, 26, 1)
    keep = top_k(window_modality_quotas(score, source, 8, layout, rates=(0.06, 0.35)), 8).keep
    seen = [i for i in range(26) if layout.modalities[i] == 0]
    for row in range(2):
        kinds = Counter(layout.modalities[i] for i in keep[row].tolist())
        assert kinds == kinds_kept(layout.modalities, 8, (0.06, 0.35)) == {0: 3, 1: 5}
        best = sorted(seen, key=lambda i: -float(score[row, i]))[:3]
        assert {i for i in keep[row].tolist() if i in seen} == set(best)


def test_no_window_and_no_kind_dies_out_and_a_strong_window_gets_more() -> None:
    layout = heard_and_seen(8, 6)
    score, _, source = draw(layout, len(layout.frames), 2)
    cells = cells_of(layout)
    score = torch.where(torch.tensor([window == 1 for window, _ in cells]), score + 0.4, score)
    keep = top_k(window_modality_quotas(score, source, 20, layout), 20).keep
    for row in range(2):
        counts = Counter(cells[i] for i in keep[row].tolist())
        assert set(counts) == set(cells)
        windows = Counter(cells[i][0] for i in keep[row].tolist())
        assert windows[1] > 2 * max(windows[w] for w in (0, 2, 3))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=8), st.data())
def test_budgets_are_repaired_as_one_by_one(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    """Windows without a token take no part in the loops, and get none."""
    size = [s for s, _ in parts]
    total = data.draw(st.integers(1, max(1, sum(size))))
    there = [(s, b) for s, b in parts if s]
    wanted = iter(repair([min(max(b, 1), s) for s, b in there], [s for s, _ in there], total))
    got = _repair(
        torch.tensor([[float(b) for _, b in parts]]), torch.tensor([[float(s) for s in size]]), total, max(size)
    )
    assert got[0].tolist() == [next(wanted) if s else 0 for s in size]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.data())
def test_a_window_is_split_as_one_by_one(seen: int, heard: int, p: float, q: float, data: st.DataObject) -> None:
    budget = data.draw(st.integers(min(1, seen + heard), seen + heard))
    part = budget * p / (p + q)
    assume(abs(part - math.floor(part) - 0.5) > 1e-4)
    got = _split_windows(
        torch.tensor([[float(budget)]]), torch.tensor([[[p, q]]]), torch.tensor([[[float(seen), float(heard)]]])
    )
    assert tuple(got[0, 0].tolist()) == split_window(budget, (p, q), (seen, heard))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0.01, 1.0)), min_size=1, max_size=8), st.data())
def test_budgets_are_shared_out_within_their_bounds(parts: list[tuple[int, float]], data: st.DataObject) -> None:
    most, weight = [m for m, _ in parts], [w for _, w in parts]
    assume(sum(most) > 0)
    total = data.draw(st.integers(1, sum(most)))
    fixed = share_out(weight, total, most)
    assert sum(fixed) == total
    assert all(0 <= one <= bound for one, bound in zip(fixed, most, strict=True))


def test_equal_remainders_go_to_the_first() -> None:
    assert share_out([1.0] * 3, 4, [9] * 3) == [2, 1, 1]


def test_sound_has_windows_of_its_own_in_stage_one() -> None:
    """One window of what is seen; of what is heard, windows of so many tokens, each with its part."""
    layout = Layout((0,) * 20 + (0,) * 24, (0,) * 20 + (1,) * 24)
    score, tokens, _ = draw(layout, 44, 8)
    keep = windowed_max_min(score, tokens, 22, layout, sound=8).keep
    cells = [(0, 0)] * 20 + [(i // 8, 1) for i in range(24)]
    for row in range(2):
        assert keep[row].tolist() == stage_one(tokens[row].tolist(), score[row].tolist(), cells, 22, (1.0, 1.0))
        assert Counter(cells[i] for i in keep[row].tolist()) == {(0, 0): 10, **{(i, 1): 4 for i in range(3)}}


# -- what sound foretells ---------------------------------------------------------------------------------


def test_what_sound_foretells_goes_first() -> None:
    """Token by token: cosine with the mean direction of what is heard in the window; of three windows one is silent."""
    whole = heard_and_seen(6, 4)
    layout = Layout(whole.frames, tuple(0 if frame >= 4 else kind for frame, kind in zip(*whole, strict=True)))
    n = 30
    _, tokens, source = draw(layout, n, 4)
    got = unlike_sound(tokens, source, layout)
    cells = cells_of(layout)
    for row in range(2):
        units = [torch.nn.functional.normalize(token.double(), dim=0) for token in tokens[row]]
        for i in range(n):
            window, kind = cells[source[row, i]]
            heard = [units[j] for j in range(n) if cells[source[row, j]] == (window, 1)]
            place = sum(kind == 1 for kind in layout.modalities[: int(source[row, i]) + 1])
            want = 3.0 + math.modf(place * (math.sqrt(5) - 1) / 2)[0] if kind == 1 else 1.0
            if heard and kind == 0:
                mean = torch.stack(heard).mean(dim=0)
                want = 1.0 - float(units[i] @ mean / mean.norm())
            assert float(got[row, i]) == pytest.approx(want, abs=1e-5)
    assert len({cells[i][0] for i in source[0].tolist() if cells[i][1] == 1}) == 2


def test_without_sound_all_tokens_are_alike_to_it() -> None:
    layout = Layout.of_images(2, 8)
    _, tokens, source = draw(layout, 16, 0)
    assert unlike_sound(tokens, source, layout).tolist() == [[1.0] * 16] * 2


# -- exported ---------------------------------------------------------------------------------------------

_ATTENTION = Term("last_query_attention_mean", {"heads": "mean"})
_PAIR = {"rates": (0.06, 0.35)}


@pytest.mark.parametrize(
    ("score", "select"),
    [
        (Term("carried_score"), Term("windowed_max_min", _PAIR)),
        (Term("window_modality_quotas", {"temperature": 0.1, **_PAIR}, of=(_ATTENTION,)), Term("top_k")),
        (Term("unlike_sound"), Term("top_k")),
    ],
)
def test_onnx_runtime_does_the_same_with_sound(score: Term, select: Term) -> None:
    layout = heard_and_seen(5, 6)
    row = Stage(Site("decoder.layer", 1), select, score, share=0.4, scope="whole")
    (planned,) = plan_recipe(
        Recipe("mine", "", "", (row,)), keep=None, images=1, tokens_per_image=len(layout.frames), vision_layers=2,
        decoder_layers=2,
    ).stages  # fmt: skip
    stage = stage_function(replace(planned, layout=layout))
    drawn = draw_signals(stage, 2, seed=3)
    signals = {name: drawn[name] for name in stage.signals}
    expected = call(stage, signals)
    for output, value in run_onnx(stage, signals, "tensorrt").items():
        torch.testing.assert_close(torch.from_numpy(value), expected[output], rtol=1e-4, atol=1e-5)


# -- rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "steps"),
    [("seats", 28, (0.9298, 0.7949, 0.2986)), ("seats_qwen3_omni", 48, (0.9255, 0.7813, 0.2390))],
)
def test_rows_leave_what_the_authors_schedule_does(name: str, depth: int, steps: tuple[float, ...]) -> None:
    recipe, tokens = RECIPES[name], 10_000
    for setting in recipe.settings:
        plan = plan_recipe(
            recipe, keep=setting.keep, images=8, tokens_per_image=tokens // 8, vision_layers=32, decoder_layers=depth,
            grid=(25, 50),
        )  # fmt: skip
        lengths = [stage.length_out for stage in plan.stages[1:]]
        average = float(setting.note.split()[2].rstrip(","))
        assert lengths[0] == pytest.approx(1.4 * average * tokens, abs=3)
        for before, after, step in zip(lengths, lengths[1:-1], steps, strict=False):
            assert after / before == pytest.approx(step, abs=0.003)
        assert lengths[-1] == 0
        sites = [stage.site.layer for stage in plan.stages[2:]]
        held = [(end - begin) * n for begin, end, n in zip([0, *sites[:-1]], sites, lengths, strict=False)]
        assert sum(held) / (depth * tokens) == pytest.approx(average, abs=0.001)


def test_a_function_of_every_moment_must_come_first() -> None:
    words = Term("windowed_max_min"), Term("seeded_random", {"seed": 0})
    first = Stage(Site("decoder.layer", 0), *words, share=0.5, scope="whole")
    second = Stage(Site("decoder.layer", 1), *words, share=0.25, scope="whole")
    plan = plan_recipe(
        Recipe("mine", "", "", (first, second)),
        keep=None,
        images=2,
        tokens_per_image=8,
        vision_layers=4,
        decoder_layers=4,
    )
    assert stage_function(plan.stages[0]).planned.layout == Layout.of_images(2, 8)
    with pytest.raises(UserError, match="takes every token at its moment, and an earlier stage removed some"):
        stage_function(plan.stages[1])
