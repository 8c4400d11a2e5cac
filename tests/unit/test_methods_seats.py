"""SEATS' words with what is seen and heard, against slow loops; budgets that are shared out; the schedule's row."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.compiler.layout import Layout, share_out
from secateur.compiler.plan_recipe import plan_recipe
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.passes.methods.select import top_k, weighted_max_min
from secateur.passes.methods.windows_in_time import _share_out, unlike_sound, window_modality_quotas, windowed_max_min
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import stage_function
from secateur.runtime.errors import UserError

from .test_methods_onnx import call, run_onnx
from .transcriptions.draw import draw_signals
from .transcriptions.seats import allot, kinds_kept, stage_one, stage_two

SOUND = 3
"""Tokens of sound per moment."""


def heard_and_seen(moments: int, patches: int) -> Layout:
    """Chunk by chunk of two moments: what is seen in it, then what is heard."""
    frames: list[int] = []
    modalities: list[int] = []
    for first in range(0, moments, 2):
        chunk = range(first, min(first + 2, moments))
        for kind, number in ((0, patches), (1, SOUND)):
            frames += [moment for moment in chunk for _ in range(number)]
            modalities += [kind] * (number * len(chunk))
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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), RATES, st.integers(0, 2**16), st.data())
def test_stage_two_follows_the_loops(
    moments: int, patches: int, rates: tuple[float, float], seed: int, data: st.DataObject
) -> None:
    layout = heard_and_seen(moments, patches)
    n = data.draw(st.integers(1, len(layout.frames)))
    k = data.draw(st.integers(1, n))
    temperature = data.draw(st.sampled_from([0.1, 0.3]))
    score, _, source = draw(layout, n, seed)
    lifted = window_modality_quotas(score, source, k, layout, temperature=temperature, rates=rates)
    kept, cells = kinds_kept(layout.modalities, k, rates), cells_of(layout)
    for row in range(2):
        want = stage_two(score[row].tolist(), [cells[i] for i in source[row]], k, kept, temperature)
        assert top_k(lifted, k).keep[row].tolist() == want


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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0.01, 1.0)), min_size=1, max_size=8), st.data())
def test_budgets_are_shared_out_within_their_bounds(parts: list[tuple[int, float]], data: st.DataObject) -> None:
    most, weight = [m for m, _ in parts], [w for _, w in parts]
    if sum(most) == 0:
        return
    total = data.draw(st.integers(1, sum(most)))
    least = [min(1, m) for m in most]
    got = _share_out(
        torch.tensor([weight]),
        torch.tensor([[float(total)]]),
        torch.tensor([least]).float(),
        torch.tensor([most]).float(),
    )[0].tolist()
    assert sum(got) == total
    assert all(0 <= one <= bound for one, bound in zip(got, most, strict=True))
    if sum(least) <= total:
        assert all(one >= bound for one, bound in zip(got, least, strict=True))
    fixed = share_out(weight, total, most)
    assert sum(fixed) == total
    assert all(0 <= one <= bound for one, bound in zip(fixed, most, strict=True))


def test_equal_remainders_go_to_the_first() -> None:
    cells = [(0, 0), (1, 0), (2, 0)]
    want = [2, 1, 1]
    assert list(allot(dict.fromkeys(cells, 1.0), 4, dict.fromkeys(cells, 1), dict.fromkeys(cells, 9)).values()) == want
    ones = torch.ones(1, 3)
    assert _share_out(ones, torch.tensor([[4.0]]), ones, 9 * ones)[0].tolist() == want
    assert share_out([1.0] * 3, 4, [9] * 3) == want


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
