"""InternVL3: squares of patches that become one token each, marks around every image, one tile an image."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.compiler import pipeline
from secateur.compiler.oracle import Oracle
from secateur.compiler.pipeline import Geometry, plan_job, read_source
from secateur.compiler.recording import load_recording_model
from secateur.passes.units import mean_units, sum_units
from secateur.runtime.errors import UserError
from secateur.runtime.images import ImagePipeline
from secateur.runtime.manifest import read_manifest
from secateur.runtime.session import Session

from . import tiny_model
from .layout_checks import NEW, bundle_maker, check_answers, check_parity, load_model, pictures
from .tiny_internvl import END, START, UNITS, VIDEO, load_processor, make_config, write_config, write_model
from .tiny_model import IMAGE

PROMPTS = {1: "what is <image>?", 2: "<image>a<image>what?"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory; do not change it."""
    return write_model(tmp_path_factory.mktemp("internvl") / "model")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return load_model(source)


@pytest.fixture(scope="module")
def compile_for(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return bundle_maker(source, tmp_path_factory, text_tokens=32)


# -- the processor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"size": {"height": 20, "width": 20}, "resample": 2}, {"do_rescale": False}])
def test_one_tile_is_processed_as_transformers_does(options: dict[str, Any]) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    theirs = GotOcr2ImageProcessorPil(**options)
    ours = ImagePipeline.from_config(theirs.to_dict())
    for image in pictures(0, 4):
        want = theirs([image], crop_to_patches=True, max_patches=1, return_tensors="np")["pixel_values"]
        assert len(want) == 1
        np.testing.assert_allclose(ours(image), want[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompt", ["<image>a<image>what?", "tell <image><image> more", "behind <image>, <image>"])
def test_prompts_are_processed_as_transformers_does(
    source: Path, compile_for: Callable[..., Path], prompt: str
) -> None:
    images = pictures(1, 2)
    with Session(compile_for(), threads=1) as session:
        ours = session.processor([prompt], [images])
    want = load_processor(source)(text=prompt, images=images, max_patches=1, return_tensors="np")
    ids = ours.prompt_ids(0)
    assert ids == want["input_ids"][0].tolist()
    assert (ids.count(IMAGE), ids.count(START), ids.count(END)) == (2 * UNITS, 2, 2)
    np.testing.assert_allclose(ours.pixel_values, want["pixel_values"], rtol=0, atol=1e-6)


def test_the_marks_around_an_image_count_as_text(compile_for: Callable[..., Path]) -> None:
    with Session(compile_for(), threads=1) as session:
        words = 32 - 5  # two images' marks and BOS
        session.processor.encode("<image><image>" + "x" * words)
        with pytest.raises(UserError, match="the prompt has 33 text tokens, the bundle was compiled for at most 32"):
            session.processor.encode("<image><image>" + "x" * (words + 1))


# -- the model, unpruned and pruned -----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["none", "fastv", "divprune"])
@pytest.mark.parametrize("images", [1, 2])
def test_an_unpruned_bundle_answers_as_transformers_does(
    source: Path, model: Any, compile_for: Callable[..., Path], images: int, recipe: str
) -> None:
    given = pictures(3, images)
    feed = load_processor(source)(text=PROMPTS[images], images=given, max_patches=1, return_tensors="pt")
    path = compile_for(recipe, images, keep=None if recipe == "none" else 1.0)
    check_answers(path, model, [PROMPTS[images]], [given], lambda row, inputs: feed)


@pytest.mark.parametrize("recipe", ["none", "fastv", "fastervlm", "visionzip", "divprune"])
def test_bundles_compute_what_the_oracle_does(source: Path, compile_for: Callable[..., Path], recipe: str) -> None:
    check_parity(compile_for(recipe, keep=None if recipe == "none" else 0.5), source)


# -- squares of patches -----------------------------------------------------------------------------------


def test_squares_lie_in_the_order_of_the_models_pixel_shuffle(model: Any) -> None:
    numbers = torch.arange(36.0)
    squares = model.model.pixel_shuffle(numbers.reshape(1, 6, 6, 1), scale_factor=0.5).reshape(9, 4)
    values = torch.rand(2, 36, 3, generator=torch.Generator().manual_seed(0))
    want = torch.stack([values[:, members.long()].sum(1) for members in squares], 1)
    torch.testing.assert_close(sum_units(values, (3, 3), 2, 1), want)
    torch.testing.assert_close(mean_units(values.transpose(1, 2), (3, 3), 2), want.transpose(1, 2) / 4)
    assert sum_units(values, (6, 6), 1, 1) is values


def test_the_towers_signals_are_per_square(source: Path, tmp_path: Path) -> None:
    """Against attention maps as transformers gives them, square by square."""
    names = {"cls_attention_mean": "cls_attention", "received_attention_mean": "received_attention"}
    job = plan_job(read_source(source), Geometry(), pipeline.load_recipe(write_recipe(tmp_path, *names)), None)
    model = load_recording_model(job.source)
    pixels = torch.randn(1, 3, 36, 36, generator=torch.Generator().manual_seed(1))
    row = Oracle(job, model).run([5, START, *[IMAGE] * 5, END, 6], pixels, keep_signals=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.model.vision_tower(pixels, output_attentions=True).attentions[-1]
    received = maps.mean(2)
    for i in range(3):
        for j in range(3):
            members = [1 + 6 * (2 * i + a) + 2 * j + b for a in (0, 1) for b in (0, 1)]
            seen = row.signals["stage0"]
            torch.testing.assert_close(seen["cls_attention"][..., 3 * i + j], maps[:, :, 0, members].sum(-1))
            torch.testing.assert_close(seen["received_attention"][..., 3 * i + j], received[..., members].sum(-1))


def write_recipe(directory: Path, *scores: str, site: str = "vision.out") -> str:
    """A file of one stage that keeps the half that ``scores`` (their sum) put first; the text of its path."""
    listed = ", ".join(f"{{name: {name}}}" for name in scores)
    score = f"{{name: weighted_sum, of: [{listed}]}}" if len(scores) > 1 else listed
    path = directory / "mine.yaml"
    path.write_text(f"name: mine\nstages:\n  - {{site: '{site}', score: {score}, select: top_k, share: 0.5}}\n")
    return str(path)


@pytest.mark.parametrize(
    "vision",
    [
        {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False},
        {"use_mean_pooling": False, "use_mask_token": True},
        {"use_absolute_position_embeddings": False, "image_size": 40, "patch_size": 6},
    ],
)
@pytest.mark.parametrize("layer", [-1, -2])
def test_other_towers_of_the_family(tmp_path: Path, vision: dict[str, Any], layer: int) -> None:
    """Norms of queries and keys, another norm, a norm behind the last layer, pixels behind the last whole patch."""
    path = write_model(tmp_path / "model", layers=2, vision=vision, vision_feature_layer=layer)
    side = read_source(path).vision.image_size[0]
    settings = json.loads((path / "preprocessor_config.json").read_text())
    settings["size"] = {"height": side, "width": side}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    pipeline.compile(path, out, recipe="fastervlm", geometry=Geometry(text_tokens=8, new_tokens=2), keep=0.5)
    check_parity(out, path, rows=3)


# -- what is said, and refused ----------------------------------------------------------------------------


def test_the_manifest_and_explain_count_squares(source: Path, compile_for: Callable[..., Path]) -> None:
    manifest = read_manifest(compile_for("fastervlm", keep=0.5))
    sizes, told = manifest.geometry, manifest.model
    assert (sizes.tokens_per_image, sizes.features_per_image, sizes.extra_rows, sizes.sequence) == (9, 5, 0, 42)
    assert (told.image_before, told.image_behind, told.video_token_id) == ([START], [END], VIDEO)
    facts = read_source(source).vision
    assert (facts.grid, facts.merge, facts.tokens_per_image) == ((3, 3), 2, UNITS)
    found = pipeline.explain("fastv", source, geometry=Geometry(images=2, text_tokens=32, new_tokens=NEW), keep=0.5)
    assert "images 2 of 9 tokens" in str(found)
    assert found.visual_tokens == (18, 9, 9, 9)


def test_flops_of_the_tower_count_patches_and_those_of_the_projector_squares(source: Path) -> None:
    found = pipeline.explain("none", source, geometry=Geometry(text_tokens=32))
    width, inner, patches, rows = 32, 48, 36, 37
    layer = 2 * rows * width * (4 * width + 2 * inner) + 4 * rows * rows * width
    projector = 2 * UNITS * (4 * width * 64 + 64 * 64)
    assert found.flops["vision"].before == 2 * patches * width * 3 * 36 + 3 * layer + projector


@pytest.mark.parametrize("images", [1, 2])
def test_the_bundle_says_that_an_image_is_one_tile(
    compile_for: Callable[..., Path], caplog: pytest.LogCaptureFixture, images: int
) -> None:
    note = "transformers cuts an image into up to max_patches tiles and a thumbnail"
    with caplog.at_level(logging.WARNING):
        path = compile_for("random", images)
    assert [r.message[: len(note)] for r in caplog.records if r.name.startswith("secateur")] == [note]
    assert [n[: len(note)] for n in read_manifest(path).notes] == [note]


def test_stages_inside_the_tower_are_refused(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "seeded_random", site="vision.layer[1]")
    with pytest.raises(UserError) as error:
        pipeline.explain(recipe, source)
    assert str(error.value) == (
        "stage0: no stage can stand at vision.layer[1]: behind this tower every 2 by 2 patches become one visual "
        "token, so its layers need them all (available: vision.out, projector.out, decoder.layer[k])"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]; only a single feature layer"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3; it is one divided by a whole number"),
        ({"downsample_ratio": 0.25}, "6x6 patches cannot be put together in squares of 4x4"),
        ({"vision_config": make_config(vision={"image_size": [36, 48]})["vision_config"]}, "6x8 patches cannot be put"),
        ({"vision_config": make_config(vision={"patch_size": [0, 6]})["vision_config"]}, "not two numbers each"),
        ({"vision_config": tiny_model.make_config()["vision_config"]}, "'clip_vision_model' is unknown"),
        ({"text_config": tiny_model.make_config()["text_config"]}, "'llama' is unknown"),
    ],
)
def test_layouts_that_are_not_supported_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config() | changes))
    with pytest.raises(UserError, match=message):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (None, "tokenizer_config.json: names no start_image_token; use the tokenizer that belongs"),
        (
            {"start_image_token": "<img>", "end_image_token": "<gone>"},
            # As in transformers, the tokenizer takes a named token in; the embedding has no row for it.
            "text_config.vocab_size: token 264, which stands beside media in every prompt, has no row among the 263",
        ),
    ],
)
def test_a_tokenizer_without_the_marks_is_refused(
    source: Path, tmp_path: Path, named: dict[str, str] | None, message: str
) -> None:
    path = write_config(tmp_path / "model")
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        (path / name).write_bytes((source / name).read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": named} if named else {}))
    with pytest.raises(UserError, match=message):
        pipeline.compile(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_videos_are_refused(compile_for: Callable[..., Path]) -> None:
    with (
        Session(compile_for(), threads=1) as session,
        pytest.raises(
            UserError,
            match=r"placeholders in the prompt: 2 image.s. and 1 video.s., the bundle was compiled for 2 image",
        ),
    ):
        session.generate("<image><image><video>what?", pictures(0, 2))
