"""The runtime's processors give what transformers' own give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.runtime.images import ImagePipeline
from secateur.runtime.pictures import open_picture

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"


def clip(**options: Any) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**options)


def siglip(**options: Any) -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(**options)


CONFIGS: list[tuple[Any, dict[str, Any]]] = [
    (clip, {}),
    (clip, {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 20}}),
    (clip, {"size": {"height": 21, "width": 35}, "crop_size": 33, "resample": 2}),
    (clip, {"size": 40, "crop_size": 40, "do_rescale": False}),
    (clip, {"do_center_crop": False, "do_normalize": False, "rescale_factor": 0.01}),
    (clip, {"do_resize": False, "crop_size": 28, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}),
    (siglip, {}),
    (siglip, {"size": {"height": 48, "width": 48}, "resample": 0}),
]


@pytest.mark.parametrize(("make", "options"), CONFIGS)
@pytest.mark.parametrize("shape", [(40, 56), (57, 31), (30, 30), (1, 9)])
def test_pixels_equal_the_pillow_processors(make: Any, options: dict[str, Any], shape: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3), dtype=np.uint8))
    theirs = make(**options)
    want = theirs(image, return_tensors="np")["pixel_values"][0]
    got = ImagePipeline.from_config(theirs.to_dict())(image)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_modes_equal_the_pillow_processors(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    want = clip()(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(ImagePipeline.from_config(clip().to_dict())(image), want, rtol=0, atol=1e-6)


def test_files_are_read_as_load_image_reads_them(tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    image.convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    for name in ("a.png", "a.jpg"):
        np.testing.assert_array_equal(open_picture(tmp_path / name), np.asarray(load_image(str(tmp_path / name))))


def test_sampling_filters_equal_the_logits_processors() -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    from secateur.runtime.sampling import Sampling, filter_logits, penalize_repetition

    random = np.random.default_rng(0)
    for top_k, top_p, temperature, penalty in [
        (0, 0.9, 0.7, 1.0),
        (5, 1.0, 1.3, 1.2),
        (9, 0.5, 2.0, 0.8),
        (1, 0.1, 1.0, 1.0),
    ]:
        logits = random.standard_normal(64).astype(np.float32)
        ids = torch.tensor(random.integers(0, 64, (1, 20)))
        scores = torch.tensor(logits)[None]
        chain = [theirs.RepetitionPenaltyLogitsProcessor(penalty), theirs.TemperatureLogitsWarper(temperature)]
        chain += [theirs.TopKLogitsWarper(top_k)] if top_k else []
        chain += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
        for step in chain:
            scores = step(ids, scores)
        seen = np.zeros(64, dtype=bool)
        seen[ids.numpy()] = True
        got = filter_logits(
            penalize_repetition(logits, seen, penalty), Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        )
        np.testing.assert_allclose(got, scores[0].numpy(), rtol=1e-5)


def test_top_p_at_its_edge_equals_the_logits_processor() -> None:
    """Chances whose sums are exact in float32 as in float64; which of equal ones stay is a matter of order."""
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import TopPLogitsWarper

    from secateur.runtime.sampling import Sampling, filter_logits

    for count in (2, 4, 8, 16):
        for number in range(count):
            for nudge in (-1e-3, 0.0, 1e-3):
                top_p = min(max(number / count + nudge, 0.0), 1 - 1e-3)
                logits = np.zeros(count + 2, dtype=np.float32)
                logits[count // 2], logits[-1] = -np.inf, -200.0
                theirs = TopPLogitsWarper(top_p)(torch.zeros(1, 1), torch.tensor(logits)[None])[0]
                got = filter_logits(logits, Sampling(temperature=1.0, top_p=top_p))
                assert np.isfinite(got).sum() == int(torch.isfinite(theirs).sum()), (count, top_p)
                order = [int(i) for i in torch.sort(torch.tensor(logits), stable=True).indices]
                stays = order[len(order) - int(np.isfinite(got).sum()) :]
                assert sorted(stays) == np.flatnonzero(np.isfinite(got)).tolist()


@pytest.fixture(scope="module")
def demo_processor() -> Any:
    if not (DEMO / "tokenizer.json").is_file():
        pytest.skip("the demo model is not there")
    processor = transformers.AutoProcessor.from_pretrained(DEMO, backend="pil")
    return processor


MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is red?"}]}],
    [
        {"role": "user", "content": [{"type": "text", "text": "How many digits?"}, {"type": "image"}]},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "What colour is the 7?"},
    ],
]


@pytest.mark.parametrize("messages", MESSAGES)
def test_conversations_encode_as_the_processor_encodes_them(demo_processor: Any, messages: Any) -> None:
    from secateur.runtime.prompts import Prompts

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8))
    given = [
        {
            **message,
            "content": [{**part, "image": image} if part["type"] == "image" else part for part in message["content"]]
            if not isinstance(message["content"], str)
            else message["content"],
        }
        for message in messages
    ]
    want = demo_processor.apply_chat_template(
        given, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    prompts = Prompts(DEMO, demo_processor.image_token, demo_processor.image_token_id)
    text, special = prompts.render(messages, ["image"])
    ids = prompts.encode(text, special)
    patches = int((want["input_ids"][0] == demo_processor.image_token_id).sum())
    expanded = [t for i in ids for t in [i] * (patches if i == demo_processor.image_token_id else 1)]
    assert expanded == want["input_ids"][0].tolist()
    pipeline = ImagePipeline.from_config(demo_processor.image_processor.to_dict())
    np.testing.assert_allclose(pipeline(image), want["pixel_values"][0], rtol=0, atol=1e-6)


def test_plain_prompts_encode_as_the_processor_encodes_them(demo_processor: Any) -> None:
    from secateur.runtime.prompts import Prompts

    text = "USER: <image>\nWhich digit is red? ASSISTANT:"
    image = Image.new("RGB", (112, 112))
    want = demo_processor(text=text, images=image, return_tensors="np")["input_ids"][0].tolist()
    prompts = Prompts(DEMO, demo_processor.image_token, demo_processor.image_token_id)
    ids = prompts.encode(*prompts.render(text, ["image"]))
    patches = want.count(demo_processor.image_token_id)
    assert [t for i in ids for t in [i] * (patches if i == demo_processor.image_token_id else 1)] == want
    assert prompts.decode(want) == demo_processor.decode(want, skip_special_tokens=True)
