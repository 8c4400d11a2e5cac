"""Bundles of a model with experts against Hugging Face: pruned, with weights written anew and referred to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.compiler import pipeline
from secateur.compiler.pipeline import RECIPES, Geometry, explain, read_source, trace_model, verify
from secateur.exporters.weights import WEIGHTS_FILE
from secateur.runtime.manifest import read_manifest

from . import tiny_internvl

GEOMETRY = Geometry(batch=2, images=2, text_tokens=24, new_tokens=8)
LAYERS, TOKENS, CHOSEN, HIDDEN = 4, 2 * (24 + 2 * tiny_internvl.UNITS), 2, 24
TEXT = {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": HIDDEN,
    "head_dim": 16, "norm_topk_prob": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def experts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of InternVL3.5-30B-A3B: its decoder is Qwen3-MoE."""
    text = tiny_internvl.make_config(LAYERS)["text_config"] | TEXT
    return tiny_internvl.write_model(tmp_path_factory.mktemp("experts") / "model", text_config=text, shard_size="100KB")


@pytest.fixture(scope="module")
def trace(experts_dir: Path) -> Callable[..., Any]:
    """One trace for all tests of this file, in place of ``trace_model``."""
    traced = trace_model(read_source(experts_dir), GEOMETRY, "fp32")
    return lambda source, geometry, dtype: traced


@pytest.mark.parametrize(("recipe", "weights"), [("none", "stream"), ("fastv", "reference"), ("divprune", "reference")])
def test_a_bundle_computes_what_its_model_does(
    recipe: str, weights: str, experts_dir: Path, trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "trace_model", trace)
    keep = 0.4 if RECIPES[recipe].stages else None
    out = tmp_path / "bundle"
    pipeline.compile(experts_dir, out, recipe=recipe, keep=keep, geometry=GEOMETRY, weights=weights)
    first, *linked = read_manifest(out).weights
    assert first == WEIGHTS_FILE
    shards = len(list(experts_dir.glob("*.safetensors")))
    assert (0 < len(linked) < shards) == (weights == "reference"), "shards of experts are not linked, others are"
    for path in linked:
        assert os.path.samefile(out / path, experts_dir / Path(path).name)
    found = verify(out, experts_dir, recipe=recipe, rows=4, threads=1)
    assert found.parity is not None
    assert found.passed, found.parity
    assert found.parity.chose_differently == 0


def test_explain_counts_the_chosen_experts(experts_dir: Path, trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "trace_model", trace)
    width, heads, kv, head = 64, 4, 2, 16
    projections = 2 * width * heads * head + 2 * width * kv * head
    attention = 2 * 4 * heads * head * (TOKENS // 2) ** 2 // 2
    router, experts = width * TEXT["num_experts"], CHOSEN * 3 * width * HIDDEN  # type: ignore[operator]
    layer = 2 * TOKENS * (projections + router + experts) + attention
    text_head = 2 * 2 * width * (tiny_internvl.VIDEO + 1)
    assert explain("none", experts_dir, geometry=GEOMETRY).flops["prefill"].before == LAYERS * layer + text_head


def test_engines_of_a_model_with_experts_build(
    experts_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough rows for blocks, and an attention kernel beside them."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    pytest.importorskip("polygraphy", reason="needs the extra tensorrt-rtx")
    geometry = Geometry(text_tokens=96, new_tokens=8)
    out = tmp_path / "bundle"
    pipeline.compile(experts_dir, out, recipe="fastv", keep=0.4, geometry=geometry, target="tensorrt-rtx")
    assert {path.name for path in out.glob("*.engine")} == {"vision.engine", "prefill.engine", "decode.engine"}
