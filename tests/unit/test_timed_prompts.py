"""Prompts that say when things are seen and heard, held against transformers' own processors and ``generate``: videos
of Qwen3-VL behind texts with their times, videos of Qwen3-Omni with their sound."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("onnxruntime")

from secateur.compiler import pipeline
from secateur.compiler.pipeline import Geometry
from secateur.runtime.errors import UserError
from secateur.runtime.session import Session

from . import tiny_qwen_more, transformers_video
from .tiny_qwen import AUDIO, IMAGE, MEL_BINS, VIDEO

SIDES, FRAMES, NEW, RATE = (64, 96), 6, 3, 16000
_VIDEOS = {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}


def write_bundle(directory: Path, kind: str, **geometry: Any) -> Path:
    few = {"depth": 2, "deepstack_visual_indexes": [0]}
    source = tiny_qwen_more.write_model(directory / "model", kind, layers=2, vision=few)
    (source / "video_preprocessor_config.json").write_text(json.dumps(_VIDEOS))
    sizes = Geometry(image_size=SIDES, frames=FRAMES, text_tokens=128, new_tokens=NEW, **geometry)
    pipeline.compile(source, directory / "bundle", geometry=sizes)
    return directory / "bundle"


def film(frames: int) -> NDArray[np.uint8]:
    return np.random.default_rng(4).integers(0, 256, (frames, *SIDES, 3), dtype=np.uint8)


def as_pads(ids: torch.Tensor) -> list[int]:
    """Ids with one placeholder for everything, as the programs take them."""
    return [IMAGE if token in (VIDEO, AUDIO) else token for token in ids.tolist()]


def ask_transformers(source: Path, ids: torch.Tensor, given: Mapping[str, Any], auto: str) -> list[int]:
    import transformers

    model = getattr(transformers, auto).from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        answer = model.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], do_sample=False, min_new_tokens=NEW,
            max_new_tokens=NEW, **given,
        )  # fmt: skip
    return answer[0, len(ids) :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("timed"), "qwen3_vl", fps=2.0)


def test_a_video_of_qwen3_vl_is_told_as_by_transformers(timed: Path) -> None:
    from transformers import AutoTokenizer, Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    tokenizer = AutoTokenizer.from_pretrained(timed.parent / "model")
    processor: Any = object.__new__(Qwen3VLProcessor)
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    marks = {
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    vars(processor).update(marks)
    told = VideoMetadata(total_num_frames=40, fps=12.5)
    sampler = transformers_video.load("qwen3_vl").Qwen3VLVideoProcessor
    told.frames_indices = sampler.sample_frames(SimpleNamespace(fps=2), told, num_frames=FRAMES).tolist()
    grid = torch.tensor([[FRAMES // 2, SIDES[0] // 16, SIDES[1] // 16]])
    shown = processor.replace_video_token({"video_grid_thw": grid, "video_metadata": [told]}, 0)

    with Session(timed, threads=1) as session:
        prompts, clip = session.processor.prompts, film(40)
        inputs = session.processor(["what?"], videos=[[clip]], video_fps=12.5)
        answer = session.generate("what?", videos=clip, video_fps=12.5, ignore_eos=True)
        nominal = session.processor.encode("what?")
        with pytest.raises(UserError, match=r"the prompt has \d+ text tokens, the bundle was compiled for at most"):
            session.generate("what? " * 20, videos=clip, video_fps=12.5)
        text, _ = prompts.render("what?", session.manifest.items)
    assert text.count("<|video_pad|>") == 1
    (whole,), _ = processor.get_text_with_replacements([text], videos_replacements=[shown])
    assert "<|vision_start|><0.3 seconds><|vision_start|>" in whole
    ids = torch.tensor(tokenizer(whole, add_special_tokens=False).input_ids)
    assert inputs.prompt_ids(0) == as_pads(ids)
    assert "<0.2 seconds>" in tokenizer.decode(nominal)  # the middle of frames at 0 and 0.5 s
    assert "<2.2 seconds>" in tokenizer.decode(nominal)

    given = {
        "pixel_values_videos": torch.from_numpy(inputs.pixel_values), "video_grid_thw": grid,
        "mm_token_type_ids": 2 * (ids == VIDEO).int()[None],
    }  # fmt: skip
    want = ask_transformers(timed.parent / "model", ids, given, "AutoModelForImageTextToText")
    assert answer.tokens == want


def test_a_bucket_that_times_alone_fill(timed: Path) -> None:
    sizes = Geometry(image_size=SIDES, frames=FRAMES, text_tokens=45, new_tokens=NEW)
    with pytest.raises(UserError, match="between the media of a row take 45 text tokens already; give more"):
        pipeline.compile(timed.parent / "model", timed.parent / "none", geometry=sizes)


def test_a_video_of_qwen3_omni_is_told_as_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen3OmniMoeProcessor, WhisperFeatureExtractor
    from transformers.models.qwen3_omni_moe import processing_qwen3_omni_moe as theirs

    seconds = FRAMES // 2
    bundle = write_bundle(tmp_path, "qwen3_omni_moe_thinker", fps=2.0, audio_seconds=seconds - 1)
    sound = np.random.default_rng(6).uniform(-0.5, 0.5, RATE * (seconds - 1)).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS)
    heard = extractor([sound], return_tensors="pt", **Qwen3OmniMoeProcessor.audio_kwargs)
    lengths = heard["attention_mask"].sum(-1)
    grid = torch.tensor([[FRAMES // 2, SIDES[0] // 16, SIDES[1] // 16]])
    processor: Any = object.__new__(Qwen3OmniMoeProcessor)
    processor.video_processor = SimpleNamespace(merge_size=2)
    marks = {"video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>", "image_token": "<|IMAGE|>"}
    vars(processor).update(marks | {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"})
    counts = {"num_audio_tokens": theirs._get_feat_extract_output_lengths(lengths).tolist()}
    seen = {"video_grid_thw": grid.numpy(), "video_second_per_grid": [2 / 2.0]}
    shown = processor.replace_video_token(
        seen, 0, counts, [0], load_audio_from_video=True, position_id_per_seconds=processor.position_id_per_seconds
    )

    with Session(bundle, threads=1) as session:
        inputs = session.processor(["what?"], videos=[[film(FRAMES)]], audio=[[sound]])
        answer = session.generate("what?", videos=film(FRAMES), audio=sound, ignore_eos=True)
        text, _ = session.processor.prompts.render("what?", session.manifest.items)
    np.testing.assert_allclose(inputs.input_features, heard["input_features"], atol=1e-4)
    (whole,), _ = processor.get_text_with_replacements([text], videos_replacements=[shown])
    ids = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "model")(whole, add_special_tokens=False).input_ids)
    assert inputs.prompt_ids(0) == as_pads(ids)
    assert int((ids == AUDIO).sum()) == 13 * (seconds - 1)

    given = {
        "pixel_values_videos": torch.from_numpy(inputs.pixel_values), "video_grid_thw": grid,
        "input_features": heard["input_features"], "feature_attention_mask": heard["attention_mask"],
        "video_second_per_grid": torch.tensor([2 / 2.0]), "use_audio_in_video": True,
    }  # fmt: skip
    assert answer.tokens == ask_transformers(tmp_path / "model", ids, given, "AutoModelForMultimodalLM")
