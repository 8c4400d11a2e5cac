"""LLaVA-OneVision: several images as transformers takes them; a row behind each image that no stage removes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.compiler import pipeline
from secateur.compiler.pipeline import Geometry, read_source
from secateur.runtime.errors import UserError
from secateur.runtime.images import ImagePipeline
from secateur.runtime.manifest import read_manifest
from secateur.runtime.session import Session

from . import tiny_model
from .layout_checks import NEW, TOLERANCE, bundle_maker, check_answers, load_model, pictures
from .tiny_model import IMAGE
from .tiny_onevision import PATCHES, VIDEO, load_processor, make_config, write_config, write_model

PROMPTS = ("<image>a<image>what?", "tell <image><image> more of it")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory; do not change it."""
    return write_model(tmp_path_factory.mktemp("onevision") / "model")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return load_model(source)


@pytest.fixture(scope="module")
def compile_for(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return bundle_maker(source, tmp_path_factory, text_tokens=32)


def write_recipe(directory: Path, site: str, positions: str = "original", share: float = 0.5) -> str:
    """A file of one stage that keeps random patches; the text of its path."""
    stage = f"{{site: '{site}', score: {{name: seeded_random, options: {{seed: 3}}}}, select: top_k, share: {share}}}"
    path = directory / "mine.yaml"
    path.write_text(f"name: mine\npositions: {positions}\nstages:\n  - {stage}\n")
    return str(path)


# -- the processor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"size": {"height": 20, "width": 20}, "resample": 2}, {"do_rescale": False}])
def test_several_images_are_processed_as_transformers_does(options: dict[str, Any]) -> None:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    theirs = LlavaOnevisionImageProcessorPil(**options)
    images = pictures(0, 4)
    want = theirs([images], return_tensors="np")["pixel_values"]
    assert want.shape[:2] == (4, 1)
    ours = ImagePipeline.from_config(theirs.to_dict())
    for image, expected in zip(images, want[:, 0], strict=True):
        np.testing.assert_allclose(ours(image), expected, rtol=0, atol=1e-6)


def test_prompts_are_processed_as_transformers_does(source: Path, compile_for: Callable[..., Path]) -> None:
    processor = load_processor(source)
    with Session(compile_for(batch=2), threads=1) as session:
        images = [pictures(0, 2), pictures(1, 2)]
        ours = session.processor(PROMPTS, images)
    for row, (prompt, given) in enumerate(zip(PROMPTS, images, strict=True)):
        want = processor(text=prompt, images=[given], return_tensors="np")
        assert ours.prompt_ids(row) == want["input_ids"][0].tolist()
        assert ours.prompt_ids(row).count(IMAGE) == 2 * (PATCHES + 1)
        np.testing.assert_allclose(ours.pixel_values[2 * row : 2 * row + 2], want["pixel_values"][:, 0], atol=1e-6)


# -- the unpruned model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_an_unpruned_bundle_answers_as_transformers_does(
    source: Path, model: Any, compile_for: Callable[..., Path], batch: int
) -> None:
    processor = load_processor(source)
    images = [pictures(row, 2) for row in range(batch)]

    def feed(row: int, inputs: Any) -> Any:
        return processor(text=PROMPTS[row], images=[images[row]], return_tensors="pt")

    check_answers(compile_for(batch=batch), model, PROMPTS[:batch], images, feed)


def test_the_row_behind_an_image_is_felt(model: Any, source: Path) -> None:
    """Else the tests above would not notice that it is missing."""
    feed = load_processor(source)(text=PROMPTS[0], images=[pictures(0)], return_tensors="pt")
    with torch.no_grad():
        with_row = model(**feed).logits[0, -1]
        newline = model.model.image_newline.detach().clone()
        model.model.image_newline.zero_()
        without = model(**feed).logits[0, -1]
        model.model.image_newline.copy_(newline)
    assert float((with_row - without).abs().max()) > 100 * TOLERANCE


# -- pruned: the row stays, with its position -------------------------------------------------------------


def run_pruned_reference(
    model: Any, ids: Sequence[int], pixels: np.ndarray[Any, Any], kept: Sequence[int], forced: Sequence[int],
    positions: str,
) -> list[np.ndarray[Any, Any]]:  # fmt: skip
    """transformers' language model on the unpruned prompt's rows without the patches that are not in ``kept``."""
    count = len(pixels)
    with torch.no_grad():
        features = model.model.get_image_features(
            torch.from_numpy(pixels)[:, None], torch.tensor([[1, 1]] * count), batch_num_images=torch.tensor([count])
        ).pooler_output
        rows = model.get_input_embeddings()(torch.tensor(list(ids)))
        rows[torch.tensor(list(ids)) == IMAGE] = torch.cat(list(features))
        stays, patch = [], -1
        for slot, token in enumerate(ids):
            if token != IMAGE:
                stays.append(slot)
                continue
            patch += 1
            image, place = divmod(patch, PATCHES + 1)
            if place == PATCHES or image * PATCHES + place in kept:
                stays.append(slot)
        numbers = torch.tensor(stays if positions == "original" else list(range(len(stays))))
        out = model.model.language_model(inputs_embeds=rows[stays][None], position_ids=numbers[None], use_cache=True)
        logits = [model.lm_head(out.last_hidden_state[0, -1]).numpy()]
        following = len(ids) if positions == "original" else len(stays)
        for step, token in enumerate(forced):
            out = model.model.language_model(
                input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[following + step]]),
                past_key_values=out.past_key_values, use_cache=True,
            )  # fmt: skip
            logits.append(model.lm_head(out.last_hidden_state[0, -1]).numpy())
    return logits


@pytest.mark.parametrize(
    ("site", "positions"),
    [
        ("vision.out", "original"), ("vision.out", "compact"), ("projector.out", "original"),
        ("decoder.layer[0]", "original"), ("decoder.layer[0]", "compact"),
    ],
)  # fmt: skip
def test_a_pruned_bundle_keeps_the_rows_behind_the_images(
    site: str, positions: str, source: Path, model: Any, compile_for: Callable[..., Path], tmp_path: Path
) -> None:
    path = compile_for(write_recipe(tmp_path, site, positions), batch=2)
    processor = load_processor(source)
    images = [pictures(2), pictures(3)]
    forced = np.array([[70, 71, 72], [80, 81, 82]])
    with Session(path, threads=1) as session:
        inputs = session.processor(PROMPTS, images)
        request = session.request()
        seen = [session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)]
        seen += [session.decode(request, forced[:, step]) for step in range(forced.shape[1])]
        kept = request.kept["stage0"]
        metrics = session.generate(list(PROMPTS), images, max_new_tokens=1)[0].metrics
    left = 2 * 5  # half of nine patches, rounded
    assert kept.shape == (2, left)
    assert kept.max() < 2 * PATCHES
    assert list(metrics.visual_tokens.values()) == [left]
    assert session.manifest.segments[-1].length == 32 + left + 2
    for row in range(2):
        ids = processor(text=PROMPTS[row], images=[images[row]])["input_ids"][0]
        want = run_pruned_reference(
            model, ids, inputs.pixel_values[2 * row : 2 * row + 2], kept[row].tolist(), forced[row].tolist(), positions
        )
        for step, logits in enumerate(want):
            np.testing.assert_allclose(seen[step][row], logits, rtol=0, atol=TOLERANCE)


def test_features_made_elsewhere_come_with_their_patches(compile_for: Callable[..., Path], tmp_path: Path) -> None:
    with Session(compile_for(write_recipe(tmp_path, "vision.out")), threads=1) as session:
        inputs = session.processor([PROMPTS[0]], [pictures(0)])
        request = session.request()
        want = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        features, kept = request.read("vision", "features"), request.kept["stage0"]
        assert features.shape == (1, 12, 64)
        other = session.request()
        got = session.prefill(other, inputs.input_ids, inputs.lengths, features=features, kept=kept)
        np.testing.assert_array_equal(got, want)
        with pytest.raises(UserError, match=r"prefill: kept is int64\[1, 12\]; give int64\[1, 10\]"):
            session.prefill(other, inputs.input_ids, inputs.lengths, features=features, kept=np.zeros((1, 12), int))


# -- what the bundle says ---------------------------------------------------------------------------------


def test_the_manifest_tells_patches_from_rows_behind_them(compile_for: Callable[..., Path], tmp_path: Path) -> None:
    manifest = read_manifest(compile_for(write_recipe(tmp_path, "vision.out")))
    geometry = manifest.geometry
    assert (geometry.tokens_per_image, geometry.features_per_image, geometry.extra_rows) == (9, 6, 1)
    assert (geometry.features, geometry.patches, geometry.fixed_tokens, geometry.sequence) == (12, 10, 34, 44)
    assert (manifest.model.family, manifest.model.video_token_id) == ("llava_onevision", VIDEO)
    assert manifest.position_offset == 8
    assert manifest.notes == []


def test_the_vision_program_reads_no_more_of_the_tower_than_it_needs(tmp_path: Path) -> None:
    """Neither the norm behind the last layer nor the pooling head."""
    source = read_source(write_config(tmp_path, vision={"vision_use_head": True}))
    traced = pipeline.trace_model(source, Geometry(images=2))
    names = set(pipeline.prune(traced, pipeline.RECIPES["none"]).programs["vision"].weights())
    assert "model.image_newline" in names
    assert "model.vision_tower.encoder.layers.2.mlp.fc2.weight" in names
    assert [n for n in names if "post_layernorm" in n or ".head." in n] == []


def test_explain_counts_the_rows_behind_the_images_apart(source: Path) -> None:
    found = pipeline.explain("none", source, geometry=Geometry(images=2, text_tokens=32, new_tokens=NEW))
    assert found.mean_keep == 1.0
    assert found.visual_tokens == (18,) * 4
    assert "layers 0-3: 18 visual + 32 text + 2 behind the images" in str(found)
    assert found.as_json()["layers"][0] == {"layer": 0, "visual": 18, "text": 32, "length": 52, "cached": 52}


def test_the_grid_of_patches_is_known(tmp_path: Path) -> None:
    assert read_source(write_config(tmp_path / "onevision")).vision.grid == (3, 3)
    assert read_source(tiny_model.write_config(tmp_path / "llava")).vision.grid == (4, 4)


# -- refused, or said ------------------------------------------------------------------------------------


def test_one_image_is_its_base_view_and_the_bundle_says_so(
    compile_for: Callable[..., Path], caplog: pytest.LogCaptureFixture, source: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        path = compile_for(images=1)
    note = "transformers cuts an image that is alone in its prompt into tiles"
    assert [r.message[: len(note)] for r in caplog.records if r.name.startswith("secateur")] == [note]
    assert [n[: len(note)] for n in read_manifest(path).notes] == [note]
    image = pictures(0)[0]
    want = load_processor(source).image_processor([[image, image]], return_tensors="np")["pixel_values"][0, 0]
    with Session(path, threads=1) as session:
        inputs = session.processor(["<image>?"], [[image]])
        np.testing.assert_allclose(inputs.pixel_values[0], want, atol=1e-6)
        assert inputs.prompt_ids(0).count(IMAGE) == PATCHES + 1
        assert len(session.generate("<image>?", image, max_new_tokens=2).tokens) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]; only a single feature layer"),
        ({"vision_feature_layer": -5}, "vision_feature_layer -5 does not exist in a tower of 3 layers"),
        ({"vision_config": tiny_model.make_config()["vision_config"]}, "'clip_vision_model' is unknown"),
    ],
)
def test_layouts_that_are_not_supported_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config() | changes))
    with pytest.raises(UserError, match=message):
        read_source(tmp_path)


def test_scores_by_the_cls_token_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="received_attention"):
        pipeline.compile(source, tmp_path / "out", recipe="fastervlm", geometry=Geometry(images=2))


def test_videos_are_refused(compile_for: Callable[..., Path]) -> None:
    parts = [{"type": "video"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    with Session(compile_for(), threads=1) as session:
        with pytest.raises(
            UserError,
            match=r"placeholders in the prompt: 2 image.s. and 1 video.s., the bundle was compiled for 2 image",
        ):
            session.generate("<image><image><video>what?", pictures(0))
        with pytest.raises(UserError, match=r"a message holds video .available: image, text"):
            session.processor.encode([{"role": "user", "content": parts}])
        with pytest.raises(UserError, match=r"messages\[0\].content\[0\]: the video part holds nothing"):
            session.generate([{"role": "user", "content": parts}], pictures(0))


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_images_is_refused(compile_for: Callable[..., Path], count: int) -> None:
    with Session(compile_for(), threads=1) as session, pytest.raises(UserError, match=f"compile with --images {count}"):
        session.generate("<image>" * count + "?", pictures(0, count))
