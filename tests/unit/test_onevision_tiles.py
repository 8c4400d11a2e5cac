"""LLaVA-OneVision: an image that is alone in its prompt, in tiles; a row behind every line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import Geometry, read_source
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.trace import Traced, trace_model
from secateur.passes.recipes import RECIPES
from secateur.passes.tile_rows import TileMap
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.request import Request
from secateur.runtime.tiles import TilePipeline

from .layout_checks import NEW, check_answers, check_found, load_model
from .tiny_onevision import PATCHES, SIDE, load_processor, write_config, write_model

SIZE = (40, 50)
GEOMETRY = Geometry(batch=2, image_size=SIZE, text_tokens=24, new_tokens=NEW)
SIZES = [(40, 50), (90, 20), (30, 30), (33, 100), (31, 30), (20, 61), (200, 90), (57, 64)]
PROMPTS = ("<image>what is it?", "tell <image> more")
FEW = "anyres_max_1"
"""With two tiles a picture of more than 1.1 * 1.1 times nine tokens is then resized."""


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole model directory that leaves pictures as they are, and one that resizes them."""
    folder = tmp_path_factory.mktemp("tiles")
    return {mode: write_model(folder / mode, layers=3, vision_aspect_ratio=mode) for mode in ("anyres_max_9", FEW)}


@pytest.fixture(scope="module")
def source(sources: dict[str, Path]) -> Path:
    return sources["anyres_max_9"]


@pytest.fixture(scope="module")
def traced(sources: dict[str, Path]) -> Callable[[str], Traced]:
    return functools.cache(lambda mode: trace_model(read_source(sources[mode]), GEOMETRY))


# -- the processor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers(source: Path, size: tuple[int, int]) -> None:
    theirs = load_processor(source).image_processor
    want = theirs(picture(0, size), return_tensors="np")["pixel_values"][0]
    ours = TilePipeline.from_config(theirs.to_dict(), size, PATCHES)
    np.testing.assert_allclose(ours(picture(0, size)), want, rtol=0, atol=1e-6)
    assert ours.tiles == len(want)


def test_resolutions_that_no_file_names_are_those_of_transformers() -> None:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    ours = TilePipeline.from_config({"image_processor_type": "LlavaOnevisionImageProcessor"}, (9, 9), 729)
    assert [list(size) for size in ours.resolutions] == LlavaOnevisionImageProcessorPil().image_grid_pinpoints


# -- how tokens are laid out ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "before", "after"),
    [((40, 50), (3, 4), (2, 3)), ((30, 60), (3, 6), (2, 4)), ((60, 30), (6, 3), (4, 2)), ((30, 30), (3, 3), None)],
)
def test_a_picture_of_more_tokens_than_tiles_may_have_is_resized(
    sources: dict[str, Path], size: tuple[int, int], before: tuple[int, int], after: tuple[int, int] | None
) -> None:
    facts = read_source(sources[FEW], Geometry(image_size=size)).vision
    assert facts.tiles is not None
    rows, columns = after or before
    assert (facts.extra_rows, facts.tokens_per_item) == (rows, PATCHES + rows * columns)
    assert (None if facts.tiles.picture is None else (facts.tiles.picture.before, facts.tiles.picture.after)) == (
        after and (before, after)
    )
    whole = load_processor(sources[FEW], vision_aspect_ratio=FEW)
    assert facts.tokens_per_item + facts.extra_rows == whole._get_number_of_features(*size, SIDE, SIDE)


def test_what_tiles_have_is_resized_as_their_picture_is(sources: dict[str, Path]) -> None:
    facts = read_source(sources[FEW], Geometry(image_size=(30, 60))).vision
    joined = TileMap.of(facts)
    assert joined is not None
    values = torch.rand(3, 2, PATCHES, generator=torch.Generator().manual_seed(0))
    image = values[1:].permute(1, 0, 2).reshape(2, 2, 3, 3).transpose(1, 2).reshape(1, 2, 3, 6)
    want = torch.nn.functional.interpolate(image, size=(2, 4), mode="bilinear").reshape(1, 2, 8)
    torch.testing.assert_close(joined.join(values, 2), torch.cat((values[:1], want), 2), rtol=0, atol=1e-6)
    paid = joined.join(values, 2, True)
    torch.testing.assert_close(paid[..., :PATCHES], values[:1], rtol=0, atol=0)
    torch.testing.assert_close(paid.sum(2), values.sum((0, 2))[None], rtol=0, atol=1e-5)


# -- the unpruned model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["anyres_max_9", FEW])
def test_an_unpruned_bundle_answers_as_transformers_does(
    sources: dict[str, Path], traced: Callable[[str], Traced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: traced(mode))
    pipeline.compile(sources[mode], tmp_path / "bundle", geometry=GEOMETRY)
    processor = load_processor(sources[mode], vision_aspect_ratio=mode)
    images = [picture(row, SIZE) for row in range(2)]

    def feed(row: int, inputs: Any) -> Any:
        found = processor(text=PROMPTS[row], images=images[row], return_tensors="pt")
        assert inputs.prompt_ids(row) == found["input_ids"][0].tolist()
        return found

    check_answers(tmp_path / "bundle", load_model(sources[mode]), PROMPTS, [[image] for image in images], feed)
    manifest = read_manifest(tmp_path / "bundle")
    assert Geometry.of(manifest) == GEOMETRY
    sizes = manifest.geometry
    assert sizes.tokens_per_image + sizes.extra_rows == sizes.features
    assert manifest.notes == []


# -- pruned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "names"),
    [("anyres_max_9", ("fastv", "divprune")), (FEW, ("vispruner_siglip",))],
)
def test_pruned_programs_are_the_oracles(traced: Callable[[str], Traced], mode: str, names: tuple[str, ...]) -> None:
    whole = traced(mode)
    model, weights = load_recording_model(whole.source), Weights(whole.source, whole.model)
    for name in names:
        recipe = RECIPES[name]
        pruned = pipeline.prune(whole, recipe, 0.5 if recipe.stages else None, expose=True)
        told = outline(pruned.job, pruned.programs)
        ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, weights), told))
        found = Parity()
        compare_runs(ours, OracleRun(Oracle(pruned.job, model)), random_rows(told, 2, 2, seed=1), 2, found)
        check_found(found, 2, name)


def test_several_images_videos_and_sizes_are_refused(source: Path) -> None:
    with pytest.raises(UserError, match=r"alone in its prompt only.*leave it out, or compile for one image per row"):
        read_source(source, Geometry(images=2, image_size=(40, 50)))
    with pytest.raises(UserError, match="have the size its configuration says"):
        read_source(source, Geometry(frames=4, image_size=(40, 50)))


def test_modes_that_are_not_supported_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, vision_aspect_ratio="square")
    with pytest.raises(UserError, match=r"vision_aspect_ratio is 'square' .available: anyres_max_<tiles>"):
        read_source(tmp_path, Geometry(image_size=SIZE))
    write_config(tmp_path, vision_aspect_ratio=FEW, image_grid_pinpoints=[[5 * SIDE, SIDE]])
    with pytest.raises(UserError, match="would leave 11 lines of 0 tokens"):
        read_source(tmp_path, Geometry(image_size=(5 * SIDE, 1)))
