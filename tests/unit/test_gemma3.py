"""Gemma 3: tokens of an image that attend to each other, averaged squares of patches, two kinds of layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.pipeline import Geometry, read_source
from secateur.runtime.errors import UserError
from secateur.runtime.images import ImagePipeline
from secateur.runtime.session import Session

from . import tiny_model
from .tiny_gemma3 import END, SOFT, START, UNITS, load_processor, write_model

NEW = 8
PROMPTS = {1: "what is <start_of_image>?", 2: "<start_of_image>a<start_of_image>what?"}
SIZES = ((40, 57), (36, 36), (31, 90), (64, 9))
TOLERANCE = 1e-4


def pictures(seed: int, count: int) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    sizes = [SIZES[(seed + i) % len(SIZES)] for i in range(count)]
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory; do not change it."""
    return write_model(tmp_path_factory.mktemp("gemma3") / "model")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def compile_for(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``compile_for(recipe="none", images=2, keep=None, target="onnxruntime")`` -> a bundle; traced once per geometry."""
    made: dict[tuple[object, ...], Path] = {}
    traces: dict[Geometry, Any] = {}
    trace = pipeline.trace_model

    def make(recipe: str = "none", images: int = 2, keep: float | None = None, target: str = "onnxruntime") -> Path:
        key = (recipe, images, keep, target)
        if key not in made:
            geometry = Geometry(images=images, text_tokens=40, new_tokens=NEW)
            if geometry not in traces:
                traces[geometry] = trace(read_source(source), geometry)
            made[key] = tmp_path_factory.mktemp("bundles") / "bundle"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "trace_model", lambda *_: traces[geometry])
                pipeline.compile(source, made[key], recipe=recipe, geometry=geometry, keep=keep, target=target)
        return made[key]

    return make


# -- the processor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"size": {"height": 20, "width": 20}, "resample": 3}, {"do_rescale": False}])
def test_images_are_processed_as_transformers_does(options: dict[str, Any]) -> None:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    theirs = Gemma3ImageProcessorPil(**options)
    ours = ImagePipeline.from_config(theirs.to_dict())
    for image in pictures(0, 4):
        want = theirs([image], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(ours(image), want[0], rtol=0, atol=1e-6)


def test_crops_are_refused() -> None:
    config = {"image_processor_type": "Gemma3ImageProcessorFast", "do_pan_and_scan": True}
    with pytest.raises(UserError, match="do_pan_and_scan is on, and the crops it cuts are not supported"):
        ImagePipeline.from_config(config)


@pytest.mark.parametrize(
    "prompt",
    [
        "<start_of_image>a<start_of_image>what?",
        "tell\n<start_of_image><start_of_image> more",
        "behind <start_of_image>, <start_of_image>",
    ],
)
def test_prompts_are_processed_as_transformers_does(
    source: Path, compile_for: Callable[..., Path], prompt: str
) -> None:
    images = pictures(1, 2)
    with Session(compile_for(), threads=1) as session:
        ours = session.processor([prompt], [images])
    want = load_processor(source)(text=prompt, images=images, return_tensors="np")
    ids = ours.prompt_ids(0)
    assert ids == want["input_ids"][0].tolist()
    assert (ids.count(SOFT), ids.count(START), ids.count(END), ids.count(tiny_model.IMAGE)) == (2 * UNITS, 2, 2, 0)
    np.testing.assert_allclose(ours.pixel_values, want["pixel_values"], rtol=0, atol=1e-6)


def test_messages_name_images_by_the_templates_token(source: Path, compile_for: Callable[..., Path]) -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    with Session(compile_for("none", 1), threads=1) as session:
        ours = session.processor.encode([message])
    text = "user: <start_of_image>what?assistant:"
    want = load_processor(source)(text=text, images=pictures(0, 1), return_tensors="np")["input_ids"][0]
    assert ours == want.tolist()


# -- the model, unpruned and pruned -----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["none", "fastv", "divprune"])
@pytest.mark.parametrize("images", [1, 2])
def test_an_unpruned_bundle_answers_as_transformers_does(
    source: Path, model: Any, compile_for: Callable[..., Path], images: int, recipe: str
) -> None:
    given = pictures(3, images)
    with Session(compile_for(recipe, images, None if recipe == "none" else 1.0), threads=1) as session:
        answer = session.generate([PROMPTS[images]], [given], ignore_eos=True)[0]
        inputs = session.processor([PROMPTS[images]], [given])
        request = session.request()
        seen = [session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)]
        seen += [session.decode(request, np.array([token])) for token in answer.tokens[: NEW - 1]]
    feed = load_processor(source)(text=PROMPTS[images], images=given, return_tensors="pt")
    assert int(feed["token_type_ids"].sum()) == images * UNITS
    with torch.no_grad():
        want = model.generate(
            **feed, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    tokens = want.sequences[0, feed["input_ids"].shape[1] :].tolist()
    assert answer.tokens == tokens
    assert len(set(tokens)) > 2
    for ours, theirs in zip(seen, want.logits, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0].numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("target", ["onnxruntime", "plain"])
@pytest.mark.parametrize(
    "recipe", ["none", "fastv", "vispruner_siglip", "divprune", "pyramiddrop", "zoo_prune", "transprune", "todre"]
)
def test_bundles_compute_what_the_oracle_does(
    source: Path, compile_for: Callable[..., Path], recipe: str, target: str
) -> None:
    path = compile_for(recipe, keep=None if recipe == "none" else 0.5, target=target)
    found = pipeline.verify(path, source, threads=1).parity
    assert found is not None
    assert found.chose_differently == 0, found
    assert found.worst[1] <= TOLERANCE, found
