"""LLaVA-OneVision: an image that is alone in its prompt, in tiles; a row behind every line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import TOLERANCE, Parity, compare_runs
from secateur.compiler.pipeline import Geometry, read_source
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.trace import trace_model
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.request import Request
from secateur.runtime.tiles import TilePipeline

from .layout_checks import NEW, check_answers, load_model
from .tiny_onevision import PATCHES, load_processor, write_config, write_model

TEXT = 24
SIZES = [(40, 50), (90, 20), (30, 30), (33, 100), (31, 30), (20, 61), (200, 90), (57, 64)]
PROMPTS = ("<image>what is it?", "tell <image> more")


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiles") / "model")


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


# -- the unpruned model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 50), (20, 61)])
def test_an_unpruned_bundle_answers_as_transformers_does(source: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    geometry = Geometry(batch=2, image_size=size, text_tokens=TEXT, new_tokens=NEW)
    pipeline.compile(source, tmp_path / "bundle", geometry=geometry)
    processor, images = load_processor(source), [picture(row, size) for row in range(2)]

    def feed(row: int, inputs: Any) -> Any:
        found = processor(text=PROMPTS[row], images=images[row], return_tensors="pt")
        assert inputs.prompt_ids(row) == found["input_ids"][0].tolist()
        return found

    check_answers(tmp_path / "bundle", load_model(source), PROMPTS, [[image] for image in images], feed)
    manifest = read_manifest(tmp_path / "bundle")
    assert Geometry.of(manifest) == geometry
    sizes = manifest.geometry
    assert sizes.tokens_per_image + sizes.extra_rows == sizes.features
    assert manifest.notes == []


# -- pruned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "names"), [((40, 50), ("none", "fastv", "divprune", "vispruner_siglip"))])
def test_pruned_programs_are_the_oracles(source: Path, size: tuple[int, int], names: tuple[str, ...]) -> None:
    geometry = Geometry(image_size=size, text_tokens=TEXT, new_tokens=4)
    traced = trace_model(read_source(source), geometry)
    model = load_recording_model(traced.source)
    weights = Weights(traced.source, traced.model)
    for name in names:
        recipe = RECIPES[name]
        pruned = pipeline.prune(traced, recipe, 0.5 if recipe.stages else None, expose=True)
        told = outline(pruned.job, pruned.programs)
        ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, weights), told))
        found = Parity()
        compare_runs(ours, OracleRun(Oracle(pruned.job, model)), random_rows(told, 2, 2, seed=1), 1, found)
        assert (found.rows, found.chose_differently) == (2, 0), name
        assert max(found.features, found.hidden, found.cache, found.logits) <= TOLERANCE, name


def test_several_images_videos_and_sizes_are_refused(source: Path) -> None:
    with pytest.raises(UserError, match=r"alone in its prompt only.*leave it out, or compile for one image per row"):
        read_source(source, Geometry(images=2, image_size=(40, 50)))
    with pytest.raises(UserError, match="have the size its configuration says"):
        read_source(source, Geometry(frames=4, image_size=(40, 50)))


def test_a_picture_of_more_tokens_than_tiles_may_have_is_refused(source: Path, tmp_path: Path) -> None:
    write_config(tmp_path, vision_aspect_ratio="anyres_max_1")
    with pytest.raises(UserError, match=r"40x50 comes to 3 lines of 4 tokens.*give a smaller size"):
        read_source(tmp_path, Geometry(image_size=(40, 50)))
