"""InternVL3 with a size of images: the tiles and the thumbnail that transformers makes of such an image."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.pipeline import Geometry, read_source
from secateur.passes.recipes import RECIPES
from secateur.runtime.crops import CropPipeline
from secateur.runtime.manifest import read_manifest
from secateur.runtime.session import Session

from .layout_checks import check_found
from .tiny_internvl import END, SIDE, START, UNITS, load_processor, write_model
from .tiny_model import IMAGE

NEW = 6
SIZES = ((40, 57), (36, 36), (31, 90), (90, 20), (100, 130), (300, 301), (7, 200), (72, 72))
SIZE = (30, 58)
"""Of two tiles beside each other, and the thumbnail."""


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("internvl") / "model", layers=2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"min_patches": 2, "max_patches": 5}])
def test_tiles_are_those_of_transformers(source: Path, size: tuple[int, int], options: dict[str, int]) -> None:
    theirs = load_processor(source).image_processor
    for name, value in options.items():
        setattr(theirs, name, value)
    want = theirs([picture(0, size)], crop_to_patches=True, return_tensors="np")["pixel_values"]
    ours = CropPipeline.from_config(theirs.to_dict(), size)
    np.testing.assert_allclose(ours(picture(0, size)), want, rtol=0, atol=1e-6)
    assert ours.tiles == len(want)


def test_an_image_with_other_tiles_is_fitted_into_the_compiled_size(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = CropPipeline.from_config(load_processor(source).image_processor.to_dict(), SIZE)
    white = Image.new("RGB", (20, 80), (255, 255, 255))
    with caplog.at_level(logging.WARNING):
        pixels = [ours(white), ours(white)][0]
    assert [r.message[:37] for r in caplog.records] == ["an image of 80x20 has other tiles tha"]
    assert pixels.shape == (3, 3, SIDE, SIDE)
    bright = np.concatenate([*pixels[:2]], 2)[0] > 0
    assert bright[:, SIDE - 3 : SIDE + 3].all()
    assert not bright[:, : SIDE // 2].any()


def test_a_bundle_answers_as_transformers_does(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    geometry = Geometry(images=2, image_size=SIZE, text_tokens=32, new_tokens=NEW)
    pipeline.compile(source, tmp_path / "bundle", geometry=geometry)
    prompt, given = "tell <image> more<image>?", [picture(i, SIZE) for i in range(2)]
    with Session(tmp_path / "bundle", threads=1) as session:
        answer = session.generate([prompt], [given], ignore_eos=True)[0]
        inputs = session.processor([prompt], [given])
        request = session.request()
        logits = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
    feed = load_processor(source)(text=prompt, images=given, return_tensors="pt")
    ids = inputs.prompt_ids(0)
    assert ids == feed["input_ids"][0].tolist()
    np.testing.assert_allclose(inputs.pixel_values, feed["pixel_values"].numpy(), rtol=0, atol=1e-6)
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model.generate(
            **feed, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    np.testing.assert_allclose(logits[0], want.logits[0][0].numpy(), rtol=0, atol=1e-4)
    assert answer.tokens == want.sequences[0, -NEW:].tolist()
    manifest = read_manifest(tmp_path / "bundle")
    assert Geometry.of(manifest) == geometry
    assert (ids.count(IMAGE), ids.count(START), ids.count(END)) == (2 * 3 * UNITS, 2, 2)
    sizes = manifest.geometry
    assert (sizes.images, sizes.tiles, sizes.tokens_per_image) == (2, 3, 3 * UNITS)
    assert manifest.notes == []


def test_a_pruned_bundle_computes_what_the_oracle_does(source: Path, tmp_path: Path) -> None:
    geometry = Geometry(image_size=SIZE, text_tokens=16, new_tokens=4)
    pipeline.compile(source, tmp_path / "out", recipe="visionzip", keep=0.5, geometry=geometry)
    found = pipeline.verify(tmp_path / "out", source, threads=1).parity
    assert found is not None
    check_found(found)
    # Half of each tile's tokens, rounded up.
    assert read_manifest(tmp_path / "out").geometry.features_per_image == 3 * 5


def test_an_image_of_one_tile_has_no_thumbnail(source: Path) -> None:
    facts = read_source(source, Geometry(images=2, image_size=(36, 36))).vision
    assert facts.split is not None
    assert (facts.frames, facts.split.grids) == (2, 1)


def test_every_tile_is_an_image_to_stages(source: Path) -> None:
    geometry = Geometry(images=2, image_size=SIZE)
    (stage,) = pipeline.plan_job(read_source(source), geometry, RECIPES["divprune"], 0.5).plan.stages
    assert (stage.groups, stage.length_in, stage.length_out) == (6, UNITS, 5)
