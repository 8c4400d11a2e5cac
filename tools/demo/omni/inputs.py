"""From a clip to what the family's processor would hand the model, in NumPy, for the one geometry of the demo."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.tools.demo.omni.architecture import (
    AUDIO_TOKENS_PER_SECOND,
    GRID,
    MEL_BINS,
    MEL_FRAMES,
    MERGE_SIZE,
    PATCH_SIZE,
    PREPROCESSOR,
    SIDE,
    TEMPORAL_PATCH_SIZE,
    TOKENS_PER_GRID,
)
from secateur.tools.demo.omni.clips import SAMPLING_RATE, SECONDS, Audio, Video
from secateur.tools.demo.omni.language import CHAT_TEMPLATE

SECONDS_PER_CHUNK = 2
HOP = SAMPLING_RATE // 100  # samples between mel frames
CHUNK_VIDEO = SECONDS_PER_CHUNK * TOKENS_PER_GRID
CHUNK_AUDIO = SECONDS_PER_CHUNK * AUDIO_TOKENS_PER_SECOND
INK_SHOWS, INK_ABSENT = 0.06, 0.005  # share of a token's pixels under ink: from here on, and up to here


def cut_patches(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Normalised patches as the Qwen2-VL processor flattens them, float32 [T*H*W, 3*2*14*14], from frames uint8
    [2T, 112, 112, 3]: 2x2 patches of one token stand together, a patch is channel, frame, row, column."""
    mean, std = (np.asarray(PREPROCESSOR[name], np.float32) for name in ("image_mean", "image_std"))
    pixels = (frames.astype(np.float32) / np.float32(255) - mean) / std
    cells = pixels.reshape(-1, TEMPORAL_PATCH_SIZE, SIDE, MERGE_SIZE, PATCH_SIZE, SIDE, MERGE_SIZE, PATCH_SIZE, 3)
    #                       0  1                    2     3           4           5     6           7           8
    patches: NDArray[np.float32] = cells.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(len(frames) // 2 * GRID**2, -1)
    return patches


@cache
def _build_extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    names = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft", "padding_value", "dither")
    return WhisperFeatureExtractor(**{name: PREPROCESSOR[name] for name in names})


def hear_mels(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-mel features of four seconds, float32 [128, 400].

    The family's processor pads with silence to five minutes and masks the padding: a little silence gives the same
    frames.
    """
    padded = np.pad(wave, (0, 10 * HOP))
    features = _build_extractor()(padded, sampling_rate=SAMPLING_RATE, padding=False, return_tensors="np")
    mels: NDArray[np.float32] = features["input_features"][0][:, :MEL_FRAMES]
    assert mels.shape == (MEL_BINS, MEL_FRAMES)
    return mels


def lay_out_media() -> str:
    """The placeholders of one clip: per chunk of two seconds its video tokens, then its audio tokens."""
    chunks = ("<|VIDEO|>" * CHUNK_VIDEO + "<|AUDIO|>" * CHUNK_AUDIO) * (SECONDS // SECONDS_PER_CHUNK)
    return f"<|vision_bos|><|audio_bos|>{chunks}<|audio_eos|><|vision_eos|>"


def write_prompt(question: str) -> str:
    """The chat template around a clip with its sound and a question, placeholders expanded."""
    from jinja2 import Template

    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = Template(CHAT_TEMPLATE).render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    return text.replace("<|vision_bos|><|VIDEO|><|vision_eos|>", lay_out_media())


def label_video(video: Video) -> NDArray[np.int64]:
    """Per video token int64 [4, 16]: the digit under it, 10 where there is none, -1 where too little of it shows."""
    size = PATCH_SIZE * MERGE_SIZE
    cells = video.ink.reshape(SECONDS, -1, SIDE, size, SIDE, size).mean((1, 3, 5)).reshape(SECONDS, TOKENS_PER_GRID)
    return np.where(cells >= INK_SHOWS, video.digit, np.where(cells <= INK_ABSENT, 10, -1)).astype(np.int64)


def label_audio(audio: Audio) -> NDArray[np.int64]:
    """Per audio token int64 [100]: the digit dialled during it, 10 for none, -1 where it starts or stops."""
    edges = np.arange(SECONDS * AUDIO_TOKENS_PER_SECOND + 1) * (SAMPLING_RATE // AUDIO_TOKENS_PER_SECOND)
    inside = (edges[:-1] >= audio.start) & (edges[1:] <= audio.stop)
    outside = (edges[1:] <= audio.start) | (edges[:-1] >= audio.stop)
    return np.where(inside, audio.digit, np.where(outside, 10, -1)).astype(np.int64)
