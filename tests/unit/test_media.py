"""Prompts with images of any size, videos and sound: laid out and answered as transformers does."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from secateur.compiler.bundle import outline
from secateur.compiler.geometry import Geometry
from secateur.compiler.pipeline import load_recipe, prune
from secateur.compiler.runs import EagerBackend, Weights
from secateur.compiler.trace import Traced, read_source, trace_model
from secateur.runtime.manifest import Manifest
from secateur.runtime.processing import Processor
from secateur.runtime.request import Request

from . import tiny_qwen

NEW, TEXT, RATE = 3, 130, 16000
TOLERANCE = 2e-5
QUESTION = "What happens, and to whom?"
VL, OMNI = "qwen2_5_vl", "qwen2_5_omni_thinker"
SIZE = (84, 56)
TOKENS = 6
"""Of an image or grid of that size."""
GEOMETRIES = {
    "image": Geometry(image_size=(84, 140), text_tokens=TEXT, new_tokens=NEW),
    "images": Geometry(batch=2, images=2, image_size=SIZE, text_tokens=TEXT, new_tokens=NEW),
    "video": Geometry(frames=8, fps=2.0, image_size=SIZE, text_tokens=TEXT, new_tokens=NEW),
    "slow video": Geometry(frames=4, fps=0.5, image_size=SIZE, text_tokens=TEXT, new_tokens=NEW),
    "video with sound": Geometry(
        frames=12, fps=2.0, image_size=SIZE, audio_seconds=6, text_tokens=TEXT, new_tokens=NEW
    ),
    "video and sound": Geometry(
        frames=4, image_size=SIZE, audio_seconds=2, audio_in_video=False, text_tokens=TEXT, new_tokens=NEW
    ),
    "image and sound": Geometry(image_size=SIZE, audio_seconds=4, text_tokens=TEXT, new_tokens=NEW),
}


@cache
def trace(source: Path, geometry: Geometry) -> Traced:
    return trace_model(read_source(source), geometry)


class Opened:
    """A pruned model that is run in PyTorch, fed as a bundle is."""

    def __init__(self, source: Path, geometry: Geometry, recipe: str, keep: float | None) -> None:
        traced = trace(source, geometry)
        pruned = prune(traced, load_recipe(recipe), keep)
        self.manifest: Manifest = outline(pruned.job, pruned.programs)
        self.processor = Processor(source, self.manifest)
        self.backend = EagerBackend(pruned.programs.programs, Weights(traced.source, traced.model))

    def answer(self, prompts: list[Any], **media: Any) -> tuple[list[list[int]], list[np.ndarray[Any, Any]]]:
        """Greedy tokens of each row, and the logits [B, vocab] they were chosen by."""
        inputs, request = self.processor(prompts, **media), Request(self.backend, self.manifest)
        request.encode(inputs.pixel_values, inputs.input_features)
        logits = [request.prefill(inputs.input_ids, inputs.lengths)]
        while len(logits) < NEW:
            logits.append(request.decode(logits[-1].argmax(-1)))
        return np.stack([step.argmax(-1) for step in logits], axis=1).tolist(), logits


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_qwen.write_model(tmp_path_factory.mktemp(kind) / "m", kind=kind) for kind in (VL, OMNI)}


@pytest.fixture(scope="module")
def models(sources: dict[str, Path]) -> dict[str, Any]:
    return {kind: tiny_qwen.make_model(source, seed=0) for kind, source in sources.items()}


@lru_cache(maxsize=4)
def opened(source: Path, name: str, recipe: str = "none", keep: float | None = None) -> Opened:
    return Opened(source, GEOMETRIES[name], recipe, keep)


def draw_media(name: str, row: int = 0) -> dict[str, list[Any]]:
    """A row's images, video and sound, exactly of the compiled size and length."""
    geometry, random = GEOMETRIES[name], np.random.default_rng(row)
    height, width = geometry.image_size or (0, 0)
    found: dict[str, list[Any]] = {"images": [], "videos": [], "audio": []}
    if geometry.frames:
        found["videos"] = [random.integers(0, 256, (geometry.frames, height, width, 3), dtype=np.uint8)]
    else:
        found["images"] = list(random.integers(0, 256, (geometry.images, height, width, 3), dtype=np.uint8))
    if geometry.audio_seconds:
        found["audio"] = [random.uniform(-0.5, 0.5, geometry.audio_seconds * RATE).astype(np.float32)]
    return found


def as_rows(name: str) -> dict[str, list[list[Any]]]:
    rows = [draw_media(name, row) for row in range(GEOMETRIES[name].batch)]
    return {kind: [row[kind] for row in rows] for kind in rows[0]}


# -- what transformers makes of a prompt ------------------------------------------------------------------


def lay_out(source: Path, name: str, question: str) -> list[int]:
    """Ids of the prompt as transformers' processors lay them out, with a place for every token of the media."""
    from transformers import PreTrainedTokenizerFast

    geometry, tokenizer = GEOMETRIES[name], PreTrainedTokenizerFast.from_pretrained(source)
    parts = [{"type": "image"}] * (0 if geometry.frames else geometry.images)
    parts += [{"type": "video"}] * bool(geometry.frames)
    parts += [{"type": "audio"}] * bool(geometry.audio_seconds and not geometry.interleaves)
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    spelled = tokenizer.convert_ids_to_tokens([tiny_qwen.IMAGE, tiny_qwen.VIDEO])
    height, width = geometry.image_size or (0, 0)
    places = height * width // 28**2
    replacements = {spelled[0]: spelled[0] * places, spelled[1]: spelled[1] * (geometry.frames // 2 * places)}
    if geometry.interleaves:
        replacements[spelled[1]] = interleave(geometry)
    elif geometry.audio_seconds:
        replacements["<|AUDIO|>"] = "<|AUDIO|>" * (25 * geometry.audio_seconds)
    for placeholder, whole in replacements.items():
        text = text.replace(placeholder, whole)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def interleave(geometry: Geometry) -> str:
    """What stands for a video with sound, by transformers' processor itself."""
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

    height, width = geometry.image_size or (0, 0)
    owner = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2), video_token="<|VIDEO|>", audio_token="<|AUDIO|>",
        audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>",
    )  # fmt: skip
    owner.get_chunked_index = lambda *given: Qwen2_5OmniProcessor.get_chunked_index(owner, *given)
    video = {
        "video_grid_thw": np.array([[geometry.frames // 2, height // 14, width // 14]]),
        "video_second_per_grid": [2 / geometry.fps],
    }
    sound = {"num_audio_tokens": [25 * geometry.audio_seconds]}
    return Qwen2_5OmniProcessor.replace_video_with_audio_token(
        owner, video, 0, sound, 0, position_id_per_seconds=25, seconds_per_chunk=2.0
    )


def answer_by_transformers(
    model: Any, name: str, ids: list[int], pixels: Any, sound: Any
) -> tuple[list[int], list[np.ndarray[Any, Any]]]:
    """Greedy tokens and the logits of each, by ``generate``."""
    geometry, given = GEOMETRIES[name], torch.tensor([ids])
    height, width = geometry.image_size or (0, 0)
    patches, side = torch.from_numpy(pixels), [height // 14, width // 14]
    feed: dict[str, Any] = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, *side]] * geometry.images)}
    if geometry.frames:
        feed = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[geometry.frames // 2, *side]])}
    if "omni" in model.config.model_type:
        if geometry.frames:
            feed["video_second_per_grid"] = torch.tensor([2 / geometry.fps])
        if sound is not None:
            heard = torch.from_numpy(sound)
            feed |= {"input_features": heard, "feature_attention_mask": torch.ones(heard.shape[::2], dtype=torch.long)}
        feed["use_audio_in_video"] = geometry.interleaves
    else:
        feed["mm_token_type_ids"] = (given == tiny_qwen.IMAGE).int() + 2 * (given == tiny_qwen.VIDEO).int()
        if geometry.frames:
            feed["second_per_grid_ts"] = torch.tensor([2 / geometry.fps])
    with torch.no_grad():
        made = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=NEW,
            max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **feed,
        )  # fmt: skip
    return made.sequences[0, len(ids) :].tolist(), [step[0].numpy() for step in made.logits]


CASES = [
    (VL, "image"), (VL, "images"), (VL, "video"), (VL, "slow video"), (OMNI, "images"), (OMNI, "video"),
    (OMNI, "video with sound"), (OMNI, "video and sound"), (OMNI, "image and sound"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_unpruned_model_answers_as_transformers_does(
    kind: str, name: str, sources: dict[str, Path], models: dict[str, Any]
) -> None:
    check_answers(opened(sources[kind], name), sources[kind], models[kind], name)


@pytest.mark.parametrize(
    ("kind", "name", "recipe"),
    [(VL, "images", "fastv"), (VL, "video", "idpruner"), (OMNI, "video with sound", "fastv")],
)
def test_a_recipe_that_keeps_everything_changes_nothing(
    kind: str, name: str, recipe: str, sources: dict[str, Path], models: dict[str, Any]
) -> None:
    check_answers(opened(sources[kind], name, recipe, 1.0), sources[kind], models[kind], name)


def check_answers(ours: Opened, source: Path, model: Any, name: str) -> None:
    rows = GEOMETRIES[name].batch
    prompts = [QUESTION[: len(QUESTION) - 5 * row] for row in range(rows)]
    media = as_rows(name)
    inputs = ours.processor(prompts, **media)
    tokens, logits = ours.answer(prompts, **media)
    pixels = np.split(inputs.pixel_values, rows)
    sound = [None] * rows if inputs.input_features is None else np.split(inputs.input_features, rows)
    for row, prompt in enumerate(prompts):
        ids = lay_out(source, name, prompt)
        as_one = {tiny_qwen.VIDEO: tiny_qwen.IMAGE, tiny_qwen.AUDIO: tiny_qwen.IMAGE}
        assert inputs.prompt_ids(row) == [as_one.get(token, token) for token in ids]
        wanted, steps = answer_by_transformers(model, name, ids, pixels[row], sound[row])
        assert tokens[row] == wanted
        for step, want in enumerate(steps):
            np.testing.assert_allclose(logits[step][row], want, rtol=0, atol=TOLERANCE * np.abs(want).max())


def test_pixels_and_sound_are_those_of_transformers(sources: dict[str, Path]) -> None:
    from transformers import WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    media = draw_media("image and sound")
    inputs = opened(sources[OMNI], "image and sound").processor([QUESTION], **as_rows("image and sound"))
    want = Qwen2VLImageProcessorPil.from_pretrained(sources[OMNI])(media["images"], return_tensors="np")
    np.testing.assert_allclose(inputs.pixel_values, want["pixel_values"], rtol=0, atol=1e-6)
    heard = WhisperFeatureExtractor.from_pretrained(sources[OMNI])(
        media["audio"], sampling_rate=RATE, padding="max_length", return_attention_mask=True, return_tensors="np"
    )
    frames = int(heard["attention_mask"].sum())
    assert inputs.input_features is not None
    np.testing.assert_allclose(inputs.input_features, heard["input_features"][:, :, :frames], rtol=0, atol=1e-4)
