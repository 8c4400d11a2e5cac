"""LLaVA-NeXT: an image in tiles, its tokens put together without padding, a row behind every line."""

from __future__ import annotations

import logging
from dataclasses import replace
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
from secateur.compiler.trace import trace_model
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.request import Request
from secateur.runtime.session import Session
from secateur.runtime.tiles import TilePipeline, choose_resolution, unpad

from .layout_checks import check_found
from .tiny_model import IMAGE
from .tiny_next import PINPOINTS, write_model

NEW, TEXT = 6, 24
SIZES = [(40, 50), (90, 20), (64, 64), (33, 100), (31, 30), (20, 61), (200, 90), (57, 64)]
PROMPTS = ("<image>what is it?", "tell <image> more")


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def their_processor(path: Path) -> Any:
    from transformers import LlavaNextProcessor, PreTrainedTokenizerFast
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil.from_pretrained(path),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(path, extra_special_tokens={"image_token": "<image>"}),
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("next") / "model", layers=8)


# -- the processor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers(source: Path, size: tuple[int, int]) -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    theirs = their_processor(source).image_processor
    want = theirs(picture(0, size), return_tensors="np")["pixel_values"][0]
    ours = TilePipeline.from_config(theirs.to_dict(), size, 16)
    np.testing.assert_allclose(ours(picture(0, size)), want, rtol=0, atol=1e-6)
    assert ours.tiles == len(want)
    best = choose_resolution(size, [(h, w) for h, w in PINPOINTS])
    assert best == tuple(select_best_resolution(size, PINPOINTS))
    grid = (best[0] // 8, best[1] // 8)
    assert unpad(size, grid) == tuple(unpad_image(torch.zeros(1, *grid), size).shape[1:])


def test_an_image_with_other_tiles_is_fitted_into_the_compiled_size(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = TilePipeline.from_config(their_processor(source).image_processor.to_dict(), (64, 64), 16)
    tall = Image.new("RGB", (20, 80), (255, 255, 255))
    with caplog.at_level(logging.WARNING):
        pixels = [ours(tall), ours(tall)][0]
    assert [r.message[:34] for r in caplog.records] == ["an image of 80x20 has other tiles t"[:34]]
    assert pixels.shape == (5, 3, 32, 32)
    whole = np.concatenate([np.concatenate(list(pixels[[1, 2]]), 2), np.concatenate(list(pixels[[3, 4]]), 2)], 1)
    bright = whole.max(0) > 0
    assert bright[:, 24:40].all()
    assert not bright[:, :23].any()
    assert not bright[:, 41:].any()


# -- the unpruned model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 50), (20, 61)])
def test_an_unpruned_bundle_answers_as_transformers_does(source: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    from transformers import AutoModelForImageTextToText

    geometry = Geometry(batch=2, image_size=size, text_tokens=TEXT, new_tokens=NEW)
    pipeline.compile(source, tmp_path / "bundle", geometry=geometry)
    processor, images = their_processor(source), [picture(row, size) for row in range(2)]
    theirs = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    with Session(tmp_path / "bundle", threads=1) as session:
        answers = session.generate(list(PROMPTS), [[image] for image in images], ignore_eos=True)
        inputs = session.processor(PROMPTS, [[image] for image in images])
        request = session.request()
        logits = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
    for row, image in enumerate(images):
        feed = processor(text=PROMPTS[row], images=image, return_tensors="pt")
        assert inputs.prompt_ids(row) == feed["input_ids"][0].tolist()
        with torch.no_grad():
            want = theirs.generate(
                **feed, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
        np.testing.assert_allclose(logits[row], want.logits[0][0].numpy(), rtol=0, atol=1e-4)
        assert answers[row].tokens == want.sequences[0, -NEW:].tolist()
    manifest = read_manifest(tmp_path / "bundle")
    assert Geometry.of(manifest) == geometry
    assert manifest.geometry.features == inputs.prompt_ids(0).count(IMAGE)
    assert manifest.geometry.tokens_per_image + manifest.geometry.extra_rows == manifest.geometry.features


# -- pruned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "names"),
    [
        (Geometry(batch=2, images=2, image_size=(40, 50), text_tokens=TEXT, new_tokens=4), ("none", "fastv")),
        (Geometry(batch=1, image_size=(90, 20), text_tokens=TEXT, new_tokens=4), ("fitprune", "sparsevlm")),
    ],
)
def test_pruned_programs_are_the_oracles(source: Path, geometry: Geometry, names: tuple[str, ...]) -> None:
    traced = trace_model(read_source(source), geometry)
    model = load_recording_model(traced.source)
    for name in names:
        recipe = RECIPES[name]
        pruned = pipeline.prune(traced, recipe, 0.5 if recipe.stages else None, expose=True)
        told = outline(pruned.job, pruned.programs)
        weights = Weights(traced.source, traced.model)
        ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, weights), told))
        found = Parity()
        rows = random_rows(told, 2, 2, seed=1)
        compare_runs(ours, OracleRun(Oracle(pruned.job, model)), rows, geometry.batch, found)
        check_found(found, 2, name)


def test_in_the_decoder_an_image_is_one_group(source: Path) -> None:
    geometry = Geometry(images=2, image_size=(40, 50), text_tokens=TEXT, new_tokens=4)
    at = read_source(source).at(geometry)
    fastv = RECIPES["fastv"]
    recipe = replace(fastv, stages=(replace(fastv.stages[0], scope="image"),))
    (stage,) = pipeline.plan_job(at, geometry, recipe, 0.5).plan.stages
    # Two by two tiles of four by four tokens; 40x50 pixels leave one of the eight lines empty at either edge.
    assert (at.vision.frames, at.vision.extra_rows) == (10, 6)
    assert (stage.groups, stage.length_in, stage.length_out) == (2, 16 + 6 * 8, 32)


def test_a_size_of_which_no_line_is_left_is_refused(source: Path) -> None:
    with pytest.raises(UserError, match="would leave no line of an image of 1x600"):
        read_source(source, Geometry(image_size=(1, 600)))


def test_videos_and_sound_are_refused(source: Path) -> None:
    with pytest.raises(UserError, match="takes images only; leave --frames out"):
        read_source(source, Geometry(frames=4))
