"""Rows for models that see and hear: against the oracle with video and sound, budgets of both kinds, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from secateur.compiler.budget import Budget
from secateur.compiler.bundle import outline
from secateur.compiler.inputs import random_rows
from secateur.compiler.layout import Layout
from secateur.compiler.oracle import Oracle, load_recording_model
from secateur.compiler.parity import Parity, compare_runs, expected_kinds
from secateur.compiler.pipeline import (
    Geometry,
    choose_keep,
    explain,
    load_recipe,
    plan_for,
    plan_job,
    prune,
    read_source,
    trace_model,
)
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.trace import Source
from secateur.passes.methods.per_modality import (
    nearest_target_in_window,
    top_k_and_uniform_per_window,
    top_k_per_modality,
)
from secateur.passes.methods.select import Selection
from secateur.passes.recipe_file import digest_recipe
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError
from secateur.runtime.request import Request

from . import tiny_qwen
from .layout_checks import check_found
from .rows import weights_file
from .test_methods_seats import heard_and_seen

MODEL = Path(__file__).parents[2] / "demo/omni/model"
CLIP = Geometry(image_size=(112, 112), frames=8, fps=2.0, audio_seconds=4)
SEEN, HEARD, LAYERS = 64, 100, 8
SMALL = Geometry(frames=8, image_size=(56, 56), audio_seconds=4, text_tokens=40, new_tokens=4)
PORTS = ("random_omni", "visionzip_omni", "fastv_omni")


@pytest.fixture(scope="module")
def source() -> Source:
    return read_source(MODEL, CLIP)


# -- programs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced_and_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = tiny_qwen.write_model(tmp_path_factory.mktemp("omni") / "model", kind="qwen2_5_omni_thinker")
    trace = trace_model(read_source(path), SMALL)
    return trace, load_recording_model(trace.source)


@pytest.mark.parametrize("name", ["visionzip_omni", "fastv_omni", "contextguard_proxy"])
def test_programs_with_video_and_sound_equal_the_oracle(traced_and_model: tuple[Any, Any], name: str) -> None:
    trace, model = traced_and_model
    pruned = prune(trace, RECIPES[name], 0.5, expose=True)
    oracle = Oracle(pruned.job, model)
    told = outline(pruned.job, pruned.programs)
    eager = Request(EagerBackend(pruned.programs.programs, Weights(trace.source, trace.model)), told)
    found = Parity(expects=expected_kinds(RECIPES[name]))
    compare_runs(OracleRun(oracle), CompiledRun(told, eager), random_rows(told, 1, 2, seed=1), 1, found, referee=oracle)
    check_found(found, 1)
    assert found.chose_equally == 1


# -- budgets ----------------------------------------------------------------------------------------------


def kept_of_kinds(source: Source, name: str, rates: tuple[float, float]) -> tuple[int, int, int]:
    """The layer of the cut, and what it leaves of what is seen and of what is heard."""
    recipe = RECIPES[name].with_rates(rates)
    job = plan_job(source, CLIP, recipe, choose_keep(source, CLIP, recipe, Budget(rates=rates)))
    stage = job.decoder_stages[-1]
    layout = stage.planned.layout
    assert layout is not None
    score = torch.rand(1, len(layout.frames), generator=torch.Generator().manual_seed(0))
    keep = stage.choose({"score": score})[0]
    kinds = Counter(layout.modalities[i] for i in keep.tolist())
    return stage.planned.site.layer or 0, kinds[0], kinds[1]


@pytest.mark.parametrize("name", PORTS)
@pytest.mark.parametrize("rates", [(0.3, 0.65), (0.4, 0.55)])
def test_means_over_layers_are_the_pair(source: Source, name: str, rates: tuple[float, float]) -> None:
    layer, seen, heard = kept_of_kinds(source, name, rates)
    assert layer == (2 if name == "fastv_omni" else 0)
    for kept, whole, rate in ((seen, SEEN, rates[0]), (heard, HEARD, rates[1])):
        mean = (layer * whole + (LAYERS - layer) * kept) / LAYERS / whole
        assert mean == pytest.approx(rate, abs=1.0 / whole)


@pytest.mark.parametrize("name", PORTS)
def test_the_published_pair_is_the_default_where_there_is_sound(source: Source, name: str) -> None:
    row = load_recipe(name)
    assert row.rates == (0.1, 0.45)
    asked = plan_for(source, CLIP, row, choose_keep(source, CLIP, row, Budget(rates=(0.1, 0.45))))
    assert [s.length_out for s in plan_for(source, CLIP, row, None).stages] == [s.length_out for s in asked.stages]


def test_a_mean_below_the_whole_layers_cannot_be_met() -> None:
    with pytest.raises(UserError, match="mean-keep"):
        explain("fastv_omni", MODEL, mean_keep=(0.06, 0.35), geometry=CLIP)


def test_published_settings_are_the_conversion_of_rates() -> None:
    settings = RECIPES["fastv_omni"].settings
    assert [round(s.keep * 26 / 28 + 2 / 28, 3) for s in settings] == [0.3, 0.2, 0.1]
    assert [s.keep for s in RECIPES["random_omni"].settings] == [0.3, 0.2, 0.1, 0.06]


# -- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 17, 40, 43])
def test_each_kind_keeps_one_and_counts_are_exact(k: int) -> None:
    layout = heard_and_seen(5, 6)
    count = len(layout.frames)
    assert count == 45
    score = torch.rand(2, count, generator=torch.Generator().manual_seed(k))
    for selection in (
        top_k_per_modality(score, k, layout, rates=(0.01, 0.9)),
        top_k_per_modality(score, k, layout, rates=(0.01, 0.9), share="removed"),
        top_k_and_uniform_per_window(score, k, layout, rates=(0.01, 0.9)),
    ):
        keep = selection.keep
        assert keep.shape == (2, k)
        assert (keep.diff(dim=1) > 0).all()
        for row in keep.tolist():
            assert len({layout.modalities[i] for i in row}) == min(k, 2)


def test_no_token_joins_another_window_or_kind() -> None:
    layout = heard_and_seen(4, 6)
    count = len(layout.frames)
    source = torch.Generator().manual_seed(0)
    score, tokens = torch.rand(1, count, generator=source), torch.randn(1, count, 5, generator=source)
    selection = top_k_and_uniform_per_window(score, 24, layout)
    mix = nearest_target_in_window(selection, tokens, layout)[0]
    windows = [(kind, frame // (2 if kind else 1)) for frame, kind in zip(*layout, strict=True)]
    assert selection.targets is not None
    assert int(selection.targets.sum()) == len(set(windows))
    for survivor, row in zip(selection.keep[0].tolist(), mix, strict=True):
        assert {windows[i] for i in row.nonzero()[:, 0].tolist()} == {windows[survivor]}
    assert set(mix.sum(dim=1).round(decimals=5).tolist()) <= {1.0, 2.0}
    normed = nearest_target_in_window(selection, tokens, layout, average="all")[0]
    torch.testing.assert_close(normed.sum(dim=1), torch.ones(24))
    alone = Selection(selection.keep, torch.zeros_like(selection.keep, dtype=torch.bool))
    assert (nearest_target_in_window(alone, tokens, layout).sum(dim=2) == 1).all(), "without targets nothing joins"


def test_without_sound_there_is_one_kind() -> None:
    layout = Layout.of_images(2, 8)
    score = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    shares: tuple[Literal["kept", "removed"], ...] = ("kept", "removed")
    for share in shares:
        keep = top_k_per_modality(score, 5, layout, rates=(0.1, 0.45), share=share).keep
        assert torch.equal(keep, score.topk(5).indices.sort().values)


# -- files, refusals --------------------------------------------------------------------------------------


def test_a_row_takes_a_file_of_weights_behind_its_name(tmp_path: Path) -> None:
    path = weights_file("echoingpixels", 12)
    recipe = load_recipe(f"echoingpixels:weights={path}")
    (copy := tmp_path / path.name).write_bytes(path.read_bytes())
    assert digest_recipe(recipe) == digest_recipe(load_recipe(f"echoingpixels:weights={copy}"))
    assert str(path.parent) not in str(recipe)
    parts = load_recipe(f"echoingpixels:weights={path}:keep=0.5+fastv:keep=0.5").parts
    assert [part.recipe for part in parts] == [recipe, RECIPES["fastv"]]
    assert [part.keep for part in parts] == [0.5, 0.5]
    inner = load_recipe(f"idpruner_learned:weights={weights_file('idpruner_learned', 12)}").stages[0].score
    assert inner is not None
    assert list(inner.of[0].options) == ["weights"]


def test_a_row_without_its_weights_says_what_the_file_holds() -> None:
    for name, tensors in (
        ("echoingpixels", r"norm.weight \[D\], up.weight \[W,D\], up.bias \[W\] and down.weight \[1,W\]"),
        ("idpruner_learned", r"q_proj.weight \[W,D\], q_proj.bias \[W\], k_proj.weight \[W,D\] and k_proj.bias \[W\]"),
    ):
        with pytest.raises(UserError, match=f"'weights', a safetensors file that holds {tensors}, floating-point") as e:
            explain(name, MODEL, geometry=CLIP)
        assert "write --recipe NAME:weights=FILE" in str(e.value)


def test_files_that_do_not_fit_a_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--recipe fastv:weights=a.safetensors: recipe fastv waits for no file"):
        load_recipe("fastv:weights=a.safetensors")
    with pytest.raises(UserError, match=r"cannot read a.safetensors: No such file"):
        load_recipe(f"echoingpixels:weights={tmp_path}/a.safetensors")


def test_what_compares_with_sound_is_refused_without(source: Source) -> None:
    with pytest.raises(UserError, match="unlike_sound compares what is seen with what is heard, and nothing is heard"):
        explain("contextguard_proxy", MODEL, geometry=replace(CLIP, audio_seconds=0))
    job = plan_job(source, CLIP, RECIPES["contextguard_proxy"], None)
    assert job.stages[0].planned.length_out == round(0.45 * (SEEN + HEARD))


@pytest.mark.parametrize("name", ["evs", "fastv_debiased"])
def test_what_needs_a_grid_is_refused_where_sound_lies_between(source: Source, name: str) -> None:
    """No stage before it removed anything."""
    with pytest.raises(UserError) as caught:
        plan_job(source, CLIP, RECIPES[name], None)
    assert str(caught.value).endswith(
        "needs the whole grid of patches, and in the decoder sound lies between them; compile without sound, or use "
        "another recipe, such as divprune"
    )
    plan_job(source.at(silent := replace(CLIP, audio_seconds=0)), silent, RECIPES[name], None)
