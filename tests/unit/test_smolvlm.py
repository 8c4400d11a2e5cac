"""SmolVLM2: squares of three by three patches, marks around every image, the global view alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.pipeline import Geometry, read_source
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.images import ImagePipeline
from secateur.runtime.manifest import read_manifest
from secateur.runtime.session import Session

from . import tiny_model
from .layout_checks import bundle_maker, check_answers, check_parity, load_model, pictures
from .tiny_model import IMAGE
from .tiny_smolvlm import AROUND, GLOBAL, UNITS, VIDEO, make_config, write_config, write_model

PROMPTS = {1: "what is <image>?", 2: "<image>a<image>what?"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory; do not change it."""
    return write_model(tmp_path_factory.mktemp("smolvlm") / "model")


@pytest.fixture(scope="module")
def compile_for(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return bundle_maker(source, tmp_path_factory, text_tokens=32)


@pytest.mark.parametrize(
    "options", [{}, {"size": {"longest_edge": 50}, "max_image_size": {"longest_edge": 20}}, {"do_resize": False}]
)
def test_the_global_view_is_processed_as_transformers_does(options: dict[str, Any]) -> None:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    theirs = SmolVLMImageProcessorPil(**options)
    ours = ImagePipeline.from_config(theirs.to_dict())
    for image in pictures(0, 4):
        want = theirs([[image]], do_image_splitting=False, return_tensors="np")["pixel_values"][0]
        assert len(want) == 1
        np.testing.assert_allclose(ours(image), want[0], rtol=0, atol=1e-6)


def test_sizes_it_does_not_know_are_refused() -> None:
    config = {"image_processor_type": "SmolVLMImageProcessor", "size": {"height": 20, "width": 20}}
    with pytest.raises(BundleError, match=r"size \{'height': 20, 'width': 20\} is not supported"):
        ImagePipeline.from_config(config)


def test_an_image_stands_between_its_marks(compile_for: Callable[..., Path]) -> None:
    """As transformers writes an image of which it makes no tiles."""
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    with Session(compile_for(), threads=1) as session:
        ours = session.processor.encode("tell <image> or <image>")
        names = ("<fake_token_around_image>", "<image>", "<global-img>")
        image = get_image_prompt_string(0, 0, UNITS, names[0], names[1], names[2])
        assert ours == session.processor.prompts.encode(f"tell {image} or {image}", True)
    assert (ours.count(IMAGE), ours.count(AROUND), ours.count(GLOBAL)) == (2 * UNITS, 4, 2)


@pytest.mark.parametrize(
    "named", [{}, {"fake_image_token": {"__type": "AddedToken", "content": "<fake_token_around_image>"}}]
)
def test_marks_without_a_name_are_those_transformers_takes(source: Path, tmp_path: Path, named: dict[str, Any]) -> None:
    path = write_config(tmp_path / "model")
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        (path / name).write_bytes((source / name).read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": named}))
    job = pipeline.plan_job(read_source(path), Geometry(), pipeline.load_recipe("none"), None)
    told = outline(job).model
    assert (told.image_before, told.image_behind, told.video_token_id) == ([AROUND, GLOBAL], [AROUND], None)


@pytest.mark.parametrize("recipe", ["none", "fastv", "divprune"])
@pytest.mark.parametrize("images", [1, 2])
def test_an_unpruned_bundle_answers_as_transformers_does(
    source: Path, compile_for: Callable[..., Path], images: int, recipe: str
) -> None:
    def feed(row: int, inputs: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([inputs.prompt_ids(row)])
        pixels = torch.from_numpy(inputs.pixel_values)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    path = compile_for(recipe, images, None if recipe == "none" else 1.0)
    check_answers(path, load_model(source), [PROMPTS[images]], [pictures(3, images)], feed)


@pytest.mark.parametrize("recipe", ["none", "fastv", "random", "vispruner_siglip", "divprune"])
def test_bundles_compute_what_the_oracle_does(source: Path, compile_for: Callable[..., Path], recipe: str) -> None:
    check_parity(compile_for(recipe, keep=None if recipe == "none" else 0.5), source)


@pytest.mark.parametrize(("image", "patch", "merge"), [(60, 4, 3), (378, 14, 3), (36, 6, 2)])
def test_patches_stand_where_transformers_puts_them(tmp_path: Path, image: int, patch: int, merge: int) -> None:
    """Its rule rounds: at some sizes two patches share a position."""
    path = write_model(
        tmp_path,
        layers=1,
        vision={"image_size": image, "patch_size": patch, "num_hidden_layers": 1},
        scale_factor=merge,
    )
    found = read_source(path)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, image, image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, _ = found.family.vision_forward(model, pixels, found.vision, {})
        theirs = model.model.get_image_features(pixels[None]).pooler_output
    torch.testing.assert_close(ours.flatten(0, 1), torch.cat(list(theirs)))


def test_the_manifest_counts_squares(compile_for: Callable[..., Path]) -> None:
    manifest = read_manifest(compile_for("random", keep=0.5))
    sizes, told = manifest.geometry, manifest.model
    assert (sizes.tokens_per_image, sizes.features_per_image, sizes.sequence) == (9, 5, 42)
    assert (told.image_before, told.image_behind, told.video_token_id) == ([AROUND, GLOBAL], [AROUND], VIDEO)
    assert told.pad_token_id == tiny_model.PAD, "the configuration's own is outside the vocabulary"
    assert manifest.notes[0].startswith("transformers adds tiles of high resolution")


def test_what_needs_a_cls_token_or_single_patches_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="received_attention"):
        pipeline.explain("fastervlm", source)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\nstages:\n  - {site: 'vision.layer[1]', score: seeded_random, select: top_k, share: 0.5}"
    )
    with pytest.raises(UserError, match="behind this tower every 3 by 3 patches become one visual token"):
        pipeline.explain(str(recipe), source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": 2}, "9x9 patches cannot be put together in squares of 2x2"),
        ({"scale_factor": 0}, "9x9 patches cannot be put together in squares of 0x0"),
        ({"vision_config": make_config(vision={"patch_size": 40})["vision_config"]}, "cannot be cut into patches"),
        ({"vision_config": tiny_model.make_config()["vision_config"]}, "'clip_vision_model' is unknown"),
    ],
)
def test_layouts_that_are_not_supported_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_config() | changes))
    with pytest.raises(UserError, match=message):
        read_source(tmp_path)
