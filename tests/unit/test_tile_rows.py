"""Stages before the decoder choose among all tokens of an image in tiles; rows behind lines stay where they stood."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.families.family import Tiles
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import Geometry, read_source
from secateur.compiler.pruned import Job
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.tile_slots import slots_left
from secateur.compiler.trace import Traced, trace_model
from secateur.passes.recipes import RECIPES
from secateur.passes.tile_rows import TileMap, place_survivors
from secateur.runtime.errors import UserError
from secateur.runtime.request import Request
from secateur.runtime.session import Session

from .layout_checks import check_found
from .tiny_model import IMAGE
from .tiny_next import write_model

SMALL = Geometry(images=2, image_size=(20, 61), text_tokens=20, new_tokens=4)
"""Two tiles beside each other and the small view: 16 tokens, and of the tiles' eight columns four lines are left as
two, each with a row behind it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("next") / "model", layers=4)


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return load_recording_model(read_source(source))


@pytest.fixture(scope="module")
def traced(source: Path) -> Traced:
    return trace_model(read_source(source), SMALL)


def plan(source: Path, name: str, keep: float = 0.5, geometry: Geometry = SMALL) -> Job:
    return pipeline.plan_job(read_source(source), geometry, RECIPES[name], keep)


# -- where rows and tokens stand --------------------------------------------------------------------------


def test_survivors_and_rows_behind_lines_keep_their_order() -> None:
    # Six tokens: three of the small view, then lines of two and one with a row behind each.
    tiles = Tiles((8, 8), (0, 1, 2, 5, 4, -1, 7, -1))
    placed = place_survivors(torch.tensor([[0, 4, 5], [1, 2, 3]]), tiles)
    assert placed.slots.tolist() == [[0, 4, 5, 6, 7], [1, 2, 3, 5, 7]]
    assert placed.source.tolist() == [[0, 1, 3, 2, 3], [0, 1, 2, 3, 3]]
    assert placed.tokens.tolist() == [[True, True, False, True, False], [True, True, True, False, False]]


def test_both_ways_of_placing_survivors_agree(source: Path) -> None:
    facts = read_source(source).at(SMALL).vision
    assert facts.tiles is not None
    drawn = torch.Generator().manual_seed(3)
    for count in (1, 5, facts.tokens_per_item):
        kept = torch.stack([torch.randperm(facts.tokens_per_item, generator=drawn)[:count].sort().values] * 2)
        row = torch.cat([kept[0], kept[1] + facts.tokens_per_item])
        assert place_survivors(kept, facts.tiles).slots.tolist() == slots_left(facts, row)


@pytest.mark.parametrize("dim", [1, 2])
def test_what_tiles_have_is_put_together_in_the_order_of_the_prompt(dim: int) -> None:
    # Two images of two tiles of three tokens; the image leaves out the second token of its first tile.
    values = torch.arange(12).reshape(4, 1, 3) if dim == 2 else torch.arange(12).reshape(4, 3, 1)
    joined = TileMap(2, (0, 2, 4, 3, 5)).join(values, dim)
    assert joined.shape == ((2, 1, 5) if dim == 2 else (2, 5, 1))
    assert joined.flatten().tolist() == [0, 2, 4, 3, 5, 6, 8, 10, 9, 11]


def test_a_stage_sees_the_tokens_transformers_shows_the_decoder(source: Path, model: Any) -> None:
    job = plan(source, "divprune")
    ids = [IMAGE] * job.features_per_row + [5, 6]
    pixels = torch.rand(job.source.vision.input_of(1), generator=torch.Generator().manual_seed(0))
    seen = Oracle(job, model).run(ids, pixels, keep_signals=True).signals["stage0"]["tokens"]
    with torch.no_grad():
        features = model.model.get_image_features(
            pixels.reshape(2, 3, *pixels.shape[1:]), image_sizes=torch.tensor([[20, 61]] * 2),
            vision_feature_layer=model.config.vision_feature_layer, return_dict=True,
        ).pooler_output  # fmt: skip
    newline = model.model.image_newline
    for own, theirs in zip(seen, features, strict=True):
        torch.testing.assert_close(own, theirs[(theirs != newline).any(1)], rtol=0, atol=1e-5)


# -- parity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "keep"), [("gprune", 0.1), ("recoverable", 0.5)])
def test_pruned_programs_are_the_oracles(traced: Traced, model: Any, name: str, keep: float) -> None:
    pruned = pipeline.prune(traced, RECIPES[name], keep, expose=True)
    told = outline(pruned.job, pruned.programs)
    backend = EagerBackend(pruned.programs.programs, Weights(traced.source, traced.model))
    oracle, found = Oracle(pruned.job, model), Parity()
    rows = random_rows(told, 2, 2, seed=1)
    compare_runs(CompiledRun(told, Request(backend, told)), OracleRun(oracle), rows, 1, found, referee=oracle)
    check_found(found, 2)


@pytest.mark.parametrize(("name", "asked"), [("divprune", False), ("gprune", True), ("visiondrop", True)])
def test_places_of_survivors_are_an_input_only_where_they_are_read(traced: Traced, name: str, asked: bool) -> None:
    """With positions numbered anew, only a stage in the decoder asks which rows are visual tokens."""
    prefill = pipeline.prune(traced, RECIPES[name], 0.5).programs["prefill"]
    assert ("kept" in prefill.inputs) == asked
    assert all(node.users for node in prefill.graph.nodes if node.op == "placeholder")


def test_a_bundle_is_the_oracles(source: Path, model: Any, tmp_path: Path) -> None:
    geometry = Geometry(batch=3, image_size=(40, 50), text_tokens=20, new_tokens=4)
    pipeline.compile(source, tmp_path / "bundle", recipe="visionzip", keep=0.1, geometry=geometry)
    oracle, found = Oracle(plan(source, "visionzip", 0.1, geometry), model), Parity()
    with Session(tmp_path / "bundle", threads=1) as session:
        rows = random_rows(session.manifest, 3, 3, seed=2)
        compare_runs(CompiledRun(session.manifest, session.request()), OracleRun(oracle), rows, 3, found)
        sizes = session.manifest.geometry
    check_found(found, 3)
    # 64 tokens of the small view and of what 40x50 pixels leave of two by two tiles: six lines of eight.
    assert (sizes.tokens_per_image, sizes.features_per_image, sizes.extra_rows) == (64, 6 + 6, 6)


# -- plans ------------------------------------------------------------------------------------------------


def test_an_image_is_one_group_whatever_its_tiles(source: Path) -> None:
    job = plan(source, "visiondrop", 0.5)
    first, *inside = job.plan.stages
    assert (first.groups, first.length_in, first.grid) == (2, 32, None)
    assert inside[0].length_in == 2 * first.length_out == 2 * job.kept_per_item
    assert job.features_per_row == 2 * (first.length_out + 2)
    assert plan(source, "gprune").position_offset == 2 * 16


def test_what_needs_single_tiles_is_refused(source: Path) -> None:
    with pytest.raises(UserError, match=r"no stage can stand at vision.layer\[1\]: the tower sees the tiles"):
        plan(source, "tome")
    with pytest.raises(UserError, match="needs the whole grid of patches, and an image in tiles has several"):
        plan(source, "hired")
    recipe = RECIPES["divprune"]
    flow = RECIPES["flowcut"].stages[1]
    alone = replace(recipe, stages=(replace(recipe.stages[0], score=flow.score, select=flow.select),))
    with pytest.raises(UserError, match=r"signal 'cls_values' does not exist for an image in tiles"):
        pipeline.plan_job(read_source(source), SMALL, alone, 0.5)
