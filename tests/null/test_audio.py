"""Sound: what is read, resampled, brought to length, and what is refused."""

from __future__ import annotations

import logging
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from secateur.runtime.audio import AudioPipeline, mel_filters, tokens_of_qwen2_5_omni, tokens_of_qwen3_omni
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.waveform import read_waveform, resample

CONFIG: dict[str, Any] = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128}


def pipeline(seconds: float = 1, **options: Any) -> AudioPipeline:
    return AudioPipeline.from_config({**CONFIG, **options}, seconds)


def tone(hertz: float, seconds: float = 1, rate: int = 16000) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, data: bytes, width: int = 2, channels: int = 1, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize(
    ("width", "data", "want"),
    [
        (1, bytes([0, 128, 192, 255]), [-1, 0, 0.5, 127 / 128]),
        (2, b"\x00\x80\x00\x00\x00\x40\xff\x7f", [-1, 0, 0.5, 32767 / 32768]),
        (3, b"\x00\x00\x80\x00\x00\x00\x00\x00\x40\xff\xff\xff", [-1, 0, 0.5, -(2.0**-23)]),
        (4, b"\x00\x00\x00\x80\x00\x00\x00\x00\x00\x00\x00\x40\x00\x00\x00\xc0", [-1, 0, 0.5, -0.5]),
    ],
)
def test_files_of_every_width(width: int, data: bytes, want: list[float], tmp_path: Path) -> None:
    samples, rate = read_waveform(write_wav(tmp_path / "a.wav", data, width, rate=8000))
    assert (samples.dtype, rate) == (np.float32, 8000)
    np.testing.assert_array_equal(samples, np.array(want, dtype=np.float32))


def test_channels_are_averaged(tmp_path: Path) -> None:
    left_and_right = np.array([[16384, 0], [-16384, 16384], [32767, 32767]], dtype="<i2")
    samples, _ = read_waveform(write_wav(tmp_path / "a.wav", left_and_right.tobytes(), channels=2))
    np.testing.assert_array_equal(samples, np.array([0.25, 0, 32767 / 32768], dtype=np.float32))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_a_tone_keeps_its_pitch_and_loudness(rate: int) -> None:
    got = resample(tone(440, 1, rate), rate, 16000)
    assert got.dtype == np.float32
    assert len(got) == 16000
    np.testing.assert_allclose(got[500:-500], tone(440)[500:-500], atol=2e-4)


def test_what_the_lower_rate_cannot_hold_is_filtered_out() -> None:
    kept, lost = resample(tone(7000, 1, 48000), 48000, 16000), resample(tone(9000, 1, 48000), 48000, 16000)
    np.testing.assert_allclose(kept[500:-500], tone(7000)[500:-500], atol=2e-4)
    assert np.abs(lost[500:-500]).max() < 2e-4


@pytest.mark.parametrize(("count", "rate", "to"), [(1, 48000, 16000), (7, 8000, 16000), (100, 15999, 16000), (3, 7, 2)])
def test_lengths_of_what_is_resampled(count: int, rate: int, to: int) -> None:
    assert len(resample(np.zeros(count, np.float32), rate, to)) == -(-count * to // rate)
    steady = resample(np.ones(4000, np.float32), rate, to)
    middle = steady[len(steady) // 2]
    np.testing.assert_allclose(middle, 1, atol=1e-6)


def test_a_tone_is_loudest_in_its_filter() -> None:
    features = pipeline()(tone(1000))
    assert (features.shape, features.dtype) == ((128, 100), np.float32)
    centre = np.argmax(mel_filters(201, 128, 16000)[:, 25])
    assert (features[:, 10:90].argmax(axis=0) == centre).all()
    np.testing.assert_allclose(features.max() - features.min(), 2, atol=1e-6)


def test_silence_is_the_floor() -> None:
    np.testing.assert_array_equal(pipeline()(np.zeros(16000, np.float32)), np.full((128, 100), -1.5, np.float32))


def test_lengths() -> None:
    assert (pipeline(2.5).samples, pipeline(2.5).frames, pipeline(2.5).seconds) == (40000, 250, 2.5)
    assert pipeline(1.005).frames == 101
    assert AudioPipeline.from_config(CONFIG, 1.005, padding="longest").frames == 100
    assert pipeline(30).frames == 3000


def test_a_shorter_clip_is_padded_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    one = pipeline()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            got = one(tone(300, 0.6))
    assert [record.message for record in caplog.records] == [
        "audio is padded with silence to the 1 s that the bundle was compiled for"
    ]
    np.testing.assert_array_equal(got, one(np.pad(tone(300, 0.6), (0, 6400))))


def test_a_longer_clip_is_refused_or_cut_on_request(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    one = pipeline()
    with pytest.raises(UserError) as caught:
        one(tone(300, 2.2))
    assert str(caught.value) == (
        "2.2 s of audio, the bundle was compiled for 1; cut it, or compile with --audio-seconds 3"
    )
    path = write_wav(tmp_path / "long.wav", bytes(2 * 24000))
    with pytest.raises(UserError, match=r"long\.wav: 1\.5 s of audio"):
        one(path)
    with caplog.at_level(logging.WARNING):
        got = one(tone(300, 2.2), cut=True)
    assert [record.message for record in caplog.records] == ["audio is cut to the 1 s that the bundle was compiled for"]
    np.testing.assert_array_equal(got, one(tone(300)))


def test_less_than_a_hop_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for samples in (15841, 16159):
            assert pipeline()(np.ones(samples, np.float32)).shape == (128, 100)
    assert not caplog.records


@pytest.mark.parametrize("cut", [False, True])
def test_another_rate_is_resampled_and_said_once(cut: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    one = pipeline()
    path = write_wav(tmp_path / "a.wav", (tone(440, 1, 44100) * 32768).astype("<i2").tobytes(), rate=44100)
    with caplog.at_level(logging.WARNING):
        from_file = one(path, cut=cut)
        from_array = one(tone(440, 1, 44100), rate=44100, cut=cut)
    assert [record.message for record in caplog.records] == ["audio is resampled from 44100 to 16000 Hz"]
    want = one(tone(440))
    # Of the loud bins: quantisation and the filter's stop band lie far below them.
    loud = want > want.max() - 0.5
    np.testing.assert_allclose(from_array[loud], want[loud], atol=1e-3)
    np.testing.assert_allclose(from_file[loud], want[loud], atol=1e-2)


def refusal(audio: object, rate: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        pipeline()(audio, rate)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_sound(tmp_path: Path) -> None:
    assert "no such audio file" in refusal(tmp_path / "nothing.wav")
    assert "no such audio file" in refusal(tmp_path)
    whole = write_wav(tmp_path / "whole.wav", bytes(2000)).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:-501])
    assert "cut.wav: the file ends after 749 of 1000 samples" in refusal(tmp_path / "cut.wav")
    assert "there is nothing to hear" in refusal(write_wav(tmp_path / "none.wav", b""))
    assert "the file has 16000 Hz, not 8000" in refusal(tmp_path / "whole.wav", 8000)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 4), np.float32), np.zeros(4, np.int16), np.zeros(0, np.float32), np.zeros(3, np.complex64)],
)
def test_arrays_that_are_no_sound(array: NDArray[Any]) -> None:
    assert "is not a waveform; give float32 [samples] between -1 and 1" in refusal(array)


def test_samples_and_rates_that_cannot_be() -> None:
    assert "values that are not finite" in refusal(np.array([0, np.nan], np.float32))
    assert "the waveform reaches 32767; scale it" in refusal(np.array([0, 32767.0]))
    assert "a sampling rate of 0 Hz" in refusal(tone(440), 0)
    np.testing.assert_array_equal(pipeline().fit(np.zeros(1, np.float32), 1), np.zeros(16000, np.float32))
    assert "a sampling rate of 8000.5 Hz" in refusal(tone(440), 8000.5)  # type: ignore[arg-type]
    assert refusal(5).startswith("a int is not audio; give a sound file's path")


def test_an_unknown_extractor_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"'EncodecFeatureExtractor' for audio \(available: WhisperFeatureExtractor\)"):
        pipeline(feature_extractor_type="EncodecFeatureExtractor")
    assert AudioPipeline.from_config({"feature_extractor": CONFIG}, 1) == pipeline()


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_fft": 0}, {"n_fft": 1}, {"hop_length": "x"}, {"feature_size": -3}, {"sampling_rate": float("inf")},
        {"chunk_length": 0}, {"dither": 0.1}, {"padding_value": 1.0}, {"chunk_length": []},
    ],
)  # fmt: skip
def test_values_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=r"^preprocessor_config.json: [^\n]+$"):
        pipeline(**wrong)


@pytest.mark.parametrize("seconds", [0, -1, 0.02, float("nan"), float("inf")])
def test_lengths_that_cannot_be(seconds: float) -> None:
    with pytest.raises(UserError, match=r"s of audio; compile for 0\.025 s"):
        pipeline(seconds)
    with pytest.raises(UserError, match="31 s of audio, the model's feature extractor takes 30"):
        pipeline(31)


def test_tokens_of_both_towers() -> None:
    assert [tokens_of_qwen2_5_omni(frames) for frames in (100, 200, 250, 30000)] == [25, 50, 62, 7500]
    assert [tokens_of_qwen3_omni(frames) for frames in (100, 200, 250, 8, 9)] == [13, 26, 33, 1, 2]
