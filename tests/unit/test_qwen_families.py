"""Qwen families: the compiled programs against transformers' own model, with images and videos, recipe by recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from secateur.compiler.bundle import outline
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle, load_recording_model
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import Geometry, load_recipe, prune
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.trace import Traced, read_source, trace_model
from secateur.runtime.request import Request

from .tiny_qwen_more import KINDS, write_model

TOLERANCE = 2e-5
GEOMETRIES = {
    "images": Geometry(batch=2, images=2, text_tokens=24, new_tokens=4),
    "video": Geometry(batch=1, frames=8, text_tokens=24, new_tokens=4, fps=1.0),
    "video with sound": Geometry(batch=2, frames=8, text_tokens=24, new_tokens=4, fps=2.0, audio_seconds=4),
    "images and sound": Geometry(batch=1, images=2, text_tokens=24, new_tokens=4, audio_seconds=2),
}
SEEN = ("images", "video")
HEARD = tuple(media for media in GEOMETRIES if media not in SEEN)
RECIPES = ("none", "fastv", "divprune", "seats")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: write_model(tmp_path_factory.mktemp("qwen") / kind, kind))


@pytest.fixture(scope="module")
def trace_of(model_of: Callable[[str], Path]) -> Callable[[str, str], tuple[Traced, Any]]:
    recording = cache(lambda kind: load_recording_model(read_source(model_of(kind))))

    def make(kind: str, media: str) -> tuple[Traced, Any]:
        source = read_source(model_of(kind))
        square = source.config.vision_config.patch_size * 2
        geometry = replace(GEOMETRIES[media], image_size=(3 * square, 5 * square))
        return trace_model(source, geometry), recording(kind)

    return cache(make)


def compare(traced: Traced, model: Any, recipe: str, rows: int = 4) -> Parity:
    """Random rows through the programs, before they are exported, and through the oracle."""
    row = load_recipe(recipe)
    pruned = prune(traced, row, 0.5 if row.stages else None, expose=True)
    told = outline(pruned.job, pruned.programs)
    backend = EagerBackend(pruned.programs.programs, Weights(traced.source, traced.model))
    ours, parity = CompiledRun(told, Request(backend, told)), Parity()
    items = random_rows(told, rows, 2, seed=1)
    compare_runs(ours, OracleRun(Oracle(pruned.job, model)), items, traced.geometry.batch, parity)
    return parity


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("kind", "media"),
    [(kind, media) for kind in KINDS for media in SEEN] + [("qwen3_omni_moe_thinker", media) for media in HEARD],
)
def test_programs_equal_the_oracle(
    trace_of: Callable[[str, str], tuple[Traced, Any]], kind: str, media: str, recipe: str
) -> None:
    parity = compare(*trace_of(kind, media), recipe)
    assert (parity.chose_differently, parity.chose_equally + parity.tied) == (0, 4)
    assert max(parity.features, parity.cache, parity.logits) <= TOLERANCE
    assert parity.kind("logits").scale > 0.1, "a comparison of zeros proves nothing"
