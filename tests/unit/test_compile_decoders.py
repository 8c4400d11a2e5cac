"""Bundles of every decoder against the Hugging Face model: rows of two images, of different lengths, batch 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.compiler import pipeline
from secateur.compiler.pipeline import Geometry, verify

GEOMETRY = Geometry(batch=2, images=2, text_tokens=24, new_tokens=8)


def _last(projections: str, share: float) -> str:
    score = "score: {name: last_query_attention_mean, options: {heads: max}}, select: top_k, scope: whole"
    return f"{score}, share: {share}, signals: {{last_query_attention: {{projections: {projections}}}}}"


FILES = {
    # Survivors of the tower keep the numbers of their patches: prefill is told which they are.
    "original-positions": """
        name: original-positions
        positions: original
        stages:
          - {site: vision.out, score: {name: cls_attention_mean, options: {heads: mean}}, select: top_k, share: 0.25}
        """,
    # Both sides, then neighbouring layers with each kind of projections.
    "everywhere": f"""
        name: everywhere
        positions: original
        stages:
          - {{site: vision.out, score: {{name: seeded_random, options: {{seed: 3}}}}, select: top_k, share: 0.8}}
          - {{site: 'decoder.layer[1]', {_last("next", 0.6)}}}
          - {{site: 'decoder.layer[2]', {_last("own", 0.4)}}}
          - {{site: 'decoder.layer[3]', {_last("previous", 0.2)}}}
        """,
}


@pytest.mark.parametrize(
    ("decoder", "recipe"),
    [
        ("llama", "original-positions"), ("llama", "everywhere"), ("llama", "divprune"),
        ("mistral", "none"), ("mistral", "fastv"),
        ("qwen2", "none"), ("qwen2", "pyramiddrop"), ("qwen2", "visionzip"),
    ],
)  # fmt: skip
def test_a_bundle_computes_what_its_model_does(
    decoder: str, recipe: str, model_dir: Callable[..., Path], traced: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "trace_model", lambda source, geometry, dtype: traced(decoder, dtype, 2, 2))
    if recipe in FILES:
        path = tmp_path / f"{recipe}.yaml"
        path.write_text(FILES[recipe])
        recipe = str(path)
    out = tmp_path / "bundle"
    pipeline.compile(model_dir(decoder), out, recipe=recipe, geometry=GEOMETRY)
    found = verify(out, model_dir(decoder), recipe=recipe, rows=4, threads=1)
    assert found.parity is not None
    assert found.passed, found.parity
    assert found.parity.chose_differently == 0
