"""A newcomer's checkpoint and photographs: Qwen2.5-VL as transformers 4.57 saves it, at a path of any spelling, from
the hub's cache, and pictures a camera turned."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import secateur
from secateur.runtime.session import Session

from . import tiny_qwen
from .tiny_model import write_json

SIZE = (140, 112)
"""Height and width the photographs have once upright, in whole tokens."""
ORIENTATION = 0x0112


def write_saved_by_457(directory: Path) -> Path:
    """The files, fields and tensor names that ``save_pretrained`` of transformers 4.57.6 writes."""
    tiny_qwen.write_model(directory)
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        heads = {name.split(".")[0] for name in tensors.keys()}  # noqa: SIM118  # not a dictionary
        assert heads == {"lm_head", "model", "visual"}
        assert "model.embed_tokens.weight" in tensors.keys()  # noqa: SIM118
    config = tiny_qwen.make_config()
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {
        "architectures": config.pop("architectures"), "layer_types": ["full_attention"] * 4, "hidden_act": "silu",
        "rope_scaling": {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"},
        "rope_theta": rope["rope_theta"], "sliding_window": None, "use_sliding_window": False, "use_cache": True,
        "max_window_layers": 80,
    }  # fmt: skip
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        del config[name]
    config["vision_config"] |= {"model_type": "qwen2_5_vl", "in_channels": 3, "hidden_act": "silu"}
    write_json(directory, "config.json", {**config, "dtype": "float32", "transformers_version": "4.57.6"})
    defaults = json.loads((directory / "generation_config.json").read_text())
    write_json(
        directory, "generation_config.json",
        {**defaults, "do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05},
    )  # fmt: skip
    pixels = json.loads((directory / "preprocessor_config.json").read_text())
    pixels |= {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    }  # fmt: skip
    write_json(directory, "preprocessor_config.json", pixels)
    video = {name: value for name, value in pixels.items() if name != "image_processor_type"}
    video |= {"video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False}
    write_json(directory, "video_preprocessor_config.json", video)
    (directory / "chat_template.json").unlink()
    words = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "chat_template.jinja").write_text(words.pop("chat_template"))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    added = {each["content"]: each for each in tokenizer["added_tokens"]}
    words["added_tokens_decoder"] = {
        str(each["id"]): {key: value for key, value in each.items() if key != "id"} for each in added.values()
    }
    words |= {"additional_special_tokens": [*added], "extra_special_tokens": {}, "unk_token": "<|endoftext|>"}
    write_json(directory, "tokenizer_config.json", words)
    write_json(directory, "added_tokens.json", {name: each["id"] for name, each in added.items()})
    whole = {
        name: {key: value for key, value in each.items() if key not in ("id", "special")}
        for name, each in added.items()
    }
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {"additional_special_tokens": [*whole.values()], **{key: whole[name] for key, name in names.items()}}
    write_json(directory, "special_tokens_map.json", special)
    vocabulary = {name: id for name, id in tokenizer["model"]["vocab"].items() if name not in added}
    write_json(directory, "vocab.json", vocabulary)
    tokenizer["model"]["vocab"] = vocabulary  # the special tokens stand beside it alone
    write_json(directory, "tokenizer.json", tokenizer)
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return directory


def answer_by_transformers(model_dir: Path, photo: Path, new_tokens: int) -> list[int]:
    """Greedy tokens of the unpruned model on "what?" about a file."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    pixels = Qwen2VLImageProcessorPil.from_pretrained(model_dir)(load_image(str(photo)), return_tensors="pt")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    count = int(pixels["image_grid_thw"].prod()) // 4
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt").input_ids
    kinds = (ids == model.config.image_token_id).int()
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **pixels,
        max_new_tokens=new_tokens, do_sample=False,
    )  # fmt: skip
    return list(answer[0, ids.shape[1] :].tolist())


def write_photo(directory: Path, orientation: int) -> Path:
    """A JPEG whose picture, once turned as its EXIF tag says, has :data:`SIZE`."""
    height, width = SIZE if orientation < 5 else SIZE[::-1]
    rough = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = directory / f"photo né {orientation}.jpg"
    Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(file, exif=exif, quality=92)
    return file


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with spaces and letters that are not ASCII, for model, bundle and pictures."""
    root = tmp_path_factory.mktemp("road") / "my models né 模型"
    write_saved_by_457(root / "Qwen 2.5 VL ü")
    return root


@pytest.fixture(scope="module")
def session(road: Path) -> Iterator[Session]:
    geometry = secateur.Geometry(image_size=SIZE, new_tokens=8)
    secateur.compile(road / "Qwen 2.5 VL ü", road / "a bundle ö", recipe="none", geometry=geometry)
    with Session(road / "a bundle ö", threads=1) as opened:
        yield opened


def test_a_checkpoint_that_names_its_class_in_the_decoder_alone(session: Session) -> None:
    assert session.manifest.model.architecture == "Qwen2_5_VLForConditionalGeneration"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_transformers_does(road: Path, session: Session, orientation: int) -> None:
    photo = write_photo(road, orientation)
    model = road / "Qwen 2.5 VL ü"
    theirs = Qwen2VLImageProcessorPil.from_pretrained(model)(load_image(str(photo)), return_tensors="np")
    for source in (photo, str(photo), photo.read_bytes()):
        ours = session.processor(["what?"], [[source]])
        pixels = np.asarray(ours.pixel_values).reshape(theirs["pixel_values"].shape)
        np.testing.assert_allclose(pixels, theirs["pixel_values"], atol=1e-6)


@pytest.mark.parametrize("part", ["path", "file address", "data address", "Hugging Face"])
def test_a_message_is_answered_as_by_transformers(road: Path, session: Session, part: str) -> None:
    photo = write_photo(road, 6)
    data = "data:image/jpeg;base64," + base64.b64encode(photo.read_bytes()).decode()
    seen: dict[str, Any] = {
        "path": {"type": "image_url", "image_url": {"url": str(photo)}},
        "file address": {"type": "image_url", "image_url": {"url": photo.as_uri()}},
        "data address": {"type": "image_url", "image_url": {"url": data}},
        "Hugging Face": {"type": "image", "image": photo},
    }[part]
    message = {"role": "user", "content": [seen, {"type": "text", "text": "what?"}]}
    ours = session.generate([message], max_new_tokens=8).tokens
    assert list(ours) == answer_by_transformers(road / "Qwen 2.5 VL ü", photo, 8)


@pytest.mark.parametrize("weights", ["reference", "copy"])
def test_weights_behind_the_links_of_a_snapshot(road: Path, tmp_path: Path, weights: str) -> None:
    """The bundle holds the blob's bytes under the snapshot's name, not a link that ends when the cache is emptied."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((road / "Qwen 2.5 VL ü").iterdir())):
        (blobs / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    secateur.compile(
        snapshot, tmp_path / "bundle", recipe="divprune", keep=0.5, weights=weights,
        geometry=secateur.Geometry(image_size=(56, 56), new_tokens=4),
    )  # fmt: skip
    (held,) = (tmp_path / "bundle").rglob("model.safetensors")
    assert not held.is_symlink()
    assert held.samefile(snapshot / "model.safetensors") == (weights == "reference")
    assert held.read_bytes() == (snapshot / "model.safetensors").read_bytes()
    with Session(tmp_path / "bundle", threads=1) as opened:
        assert opened.generate("what?", Image.new("RGB", (56, 56), "red"), max_new_tokens=2).tokens
