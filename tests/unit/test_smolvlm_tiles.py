"""SmolVLM2 with a size of images: tiles with marks of row and column between them, the global view last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.pipeline import Geometry, read_source
from secateur.passes.recipes import RECIPES
from secateur.runtime.crops import CropPipeline
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.processing import Processor
from secateur.runtime.session import Session

from .layout_checks import check_found
from .tiny_model import IMAGE
from .tiny_smolvlm import AROUND, GLOBAL, SIDE, UNITS, write_model

NEW, TEXT = 6, 160
SIZES = ((40, 57), (36, 36), (31, 90), (90, 20), (100, 130), (300, 301), (7, 200), (145, 144))
SIZE = (20, 60)
"""Becomes 48x144 pixels, and then two rows of four tiles."""


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("smolvlm") / "model", layers=2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"do_resize": False}, {"size": {"longest_edge": SIDE}}])
def test_tiles_are_those_of_transformers(source: Path, size: tuple[int, int], options: dict[str, Any]) -> None:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    theirs = SmolVLMImageProcessorPil.from_pretrained(source, **options)
    want = theirs([[picture(0, size)]], return_tensors="np")["pixel_values"][0]
    ours = CropPipeline.from_config(theirs.to_dict(), size)
    np.testing.assert_allclose(ours(picture(0, size)), want, rtol=0, atol=1e-6)
    assert ours.tiles == len(want)


@pytest.mark.parametrize(("size", "grid"), [(SIZE, (2, 4)), ((80, 20), (4, 1)), ((36, 5), (4, 1))])
def test_prompts_are_written_as_transformers_writes_them(
    source: Path, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    geometry = Geometry(images=2, image_size=size, text_tokens=2 * TEXT)
    processor = Processor(source, outline(pipeline.plan_job(read_source(source), geometry, RECIPES["none"], None)))
    text = get_image_prompt_string(*grid, UNITS, "<fake_token_around_image>", "<image>", "<global-img>")
    ids = processor.encode("tell <image> and<image> more")
    assert ids == processor.prompts.encode(f"tell {text} and{text} more", True)
    tiles = grid[0] * grid[1] + 1
    assert (ids.count(IMAGE), ids.count(AROUND), ids.count(GLOBAL)) == (2 * tiles * UNITS, 2 * (tiles + 1), 2)


def test_a_bundle_answers_as_transformers_does(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    geometry = Geometry(image_size=(80, 20), text_tokens=TEXT, new_tokens=NEW)
    pipeline.compile(source, tmp_path / "bundle", recipe="gprune", keep=1.0, geometry=geometry)
    prompt, image = "tell <image> more", picture(0, (80, 20))
    with Session(tmp_path / "bundle", threads=1) as session:
        answer = session.generate(prompt, image, ignore_eos=True)
        inputs = session.processor([prompt], [[image]])
        request = session.request()
        logits = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
    ids = inputs.prompt_ids(0)
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            pixel_values=torch.from_numpy(inputs.pixel_values)[None],
            do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    np.testing.assert_allclose(logits[0], want.logits[0][0].numpy(), rtol=0, atol=1e-4)
    assert answer.tokens == want.sequences[0, len(ids) :].tolist()
    manifest = read_manifest(tmp_path / "bundle")
    assert Geometry.of(manifest) == geometry
    assert (manifest.geometry.tiles, manifest.geometry.features_per_run) == (5, UNITS)
    assert manifest.notes == []


def test_a_pruned_bundle_computes_what_the_oracle_does(source: Path, tmp_path: Path) -> None:
    """Positions are those of the unpruned prompt: text between two tiles counts all patches before it."""
    geometry = Geometry(image_size=(80, 20), text_tokens=TEXT, new_tokens=4)
    pipeline.compile(source, tmp_path / "out", recipe="gprune", keep=0.5, geometry=geometry)
    found = pipeline.verify(tmp_path / "out", source, rows=2, threads=1).parity
    assert found is not None
    check_found(found, 2)
    # Of the nine tokens of a tile int(4.5) stay: the row rounds down, as its authors do.
    assert read_manifest(tmp_path / "out").geometry.features_per_image == 5 * 4


def test_marks_that_leave_no_room_for_words_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the marks of 9 tiles are \d+ of 20 text tokens; compile with --text-tokens"):
        pipeline.compile(source, tmp_path / "out", geometry=Geometry(image_size=SIZE, text_tokens=20))
    assert not (tmp_path / "out").exists()


def test_a_processor_that_cuts_no_tiles_is_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    told = json.loads((source / "preprocessor_config.json").read_text()) | {"do_image_splitting": False}
    (path / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="do_image_splitting is off: an image has no tiles"):
        read_source(path, Geometry(image_size=SIZE))
