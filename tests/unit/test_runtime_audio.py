"""The runtime's features of sound are those of transformers' Whisper extractor, as the omni processors call it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from secateur.runtime.audio import AudioPipeline, mel_filters, tokens_of_qwen2_5_omni, tokens_of_qwen3_omni

pytest.importorskip("transformers")

TORCH = "transformers.models.whisper.feature_extraction_whisper.is_torch_available"


def whisper(**options: Any) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(**options)


def draw_clip(samples: int, fade: float = 0.0) -> NDArray[np.float32]:
    """Noise over a few tones; with ``fade``, its last part is quieter by many orders."""
    random = np.random.default_rng(samples)
    time = np.arange(samples) / 16000
    clip = 0.1 * random.standard_normal(samples) + sum(0.2 * np.sin(2 * np.pi * f * time) for f in (220, 1310, 5000))
    return (clip * np.exp(-fade * time)).astype(np.float32)


def features_as_a_processor_asks_for_them(theirs: Any, clip: NDArray[np.float32], omni: str) -> NDArray[np.float32]:
    """[mel, valid frames]: the call of Qwen2.5-Omni's or Qwen3-Omni's processor, then what the thinker selects."""
    how: dict[str, Any] = {"padding": "max_length"} if omni == "2.5" else {"padding": True, "truncation": False}
    made = theirs(clip, sampling_rate=16000, return_attention_mask=True, return_tensors="np", **how)
    return np.asarray(made["input_features"][0][:, made["attention_mask"][0].astype(bool)])


@pytest.mark.parametrize("omni", ["2.5", "3"])
@pytest.mark.parametrize("options", [{"feature_size": 128, "chunk_length": 4}, {"n_fft": 512, "hop_length": 200}])
@pytest.mark.parametrize("samples", [16000, 400, 16100, 32001, 63990, 64000])
def test_features_equal_the_numpy_extractor(omni: str, options: dict[str, Any], samples: int) -> None:
    theirs = whisper(**options)
    samples = max(samples, theirs.n_fft)
    clip = draw_clip(samples)
    with mock.patch(TORCH, return_value=False):
        want = features_as_a_processor_asks_for_them(theirs, clip, omni)
    ours = AudioPipeline.from_config(
        theirs.to_dict(), samples / 16000, padding="max_length" if omni == "2.5" else "longest"
    )
    got = ours(clip)
    assert got.shape == (ours.mel_bins, ours.frames)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("omni", ["2.5", "3"])
def test_features_are_as_near_the_torch_extractor_as_the_numpy_extractor_is(omni: str) -> None:
    """Torch's spectra are in single precision, which shows in the quietest bins."""
    pytest.importorskip("torch")
    theirs = whisper(feature_size=128, chunk_length=10)
    clip = draw_clip(48000)
    torchs = features_as_a_processor_asks_for_them(theirs, clip, omni)
    with mock.patch(TORCH, return_value=False):
        numpys = features_as_a_processor_asks_for_them(theirs, clip, omni)
    ours = AudioPipeline.from_config(theirs.to_dict(), 3, padding="max_length" if omni == "2.5" else "longest")
    assert (np.abs(ours(clip) - torchs) <= np.abs(numpys - torchs) + 1e-6).all()


def test_a_clip_that_fades_below_the_floor() -> None:
    theirs = whisper(feature_size=128, chunk_length=4)
    clip = draw_clip(48000, fade=8.0)
    with mock.patch(TORCH, return_value=False):
        want = features_as_a_processor_asks_for_them(theirs, clip, "2.5")
    np.testing.assert_allclose(AudioPipeline.from_config(theirs.to_dict(), 3)(clip), want, rtol=0, atol=1e-6)
    assert (want == want.min()).mean() > 0.1


@pytest.mark.parametrize(("mels", "bins", "rate"), [(128, 201, 16000), (80, 201, 16000), (40, 257, 24000)])
def test_filters_equal_transformers(mels: int, bins: int, rate: int) -> None:
    from transformers.audio_utils import mel_filter_bank

    want = mel_filter_bank(bins, mels, 0.0, 8000.0, rate, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(bins, mels, rate), want.T, rtol=1e-9, atol=1e-15)


def test_token_counts_equal_the_processors() -> None:
    from transformers.models.qwen2_5_omni import processing_qwen2_5_omni as qwen2_5
    from transformers.models.qwen3_omni_moe import processing_qwen3_omni_moe as qwen3

    for frames in range(4, 1234):
        assert tokens_of_qwen2_5_omni(frames) == qwen2_5._get_feat_extract_output_lengths(frames)
        assert tokens_of_qwen3_omni(frames) == qwen3._get_feat_extract_output_lengths(frames)
