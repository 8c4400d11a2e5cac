"""Sound to log-mel features with NumPy: what Whisper's feature extractor computes, for one length of clip.

Qwen's audio towers take the frames that hold sound. Which these are, and what the last of them sees, depends on how
the checkpoint's processor pads a clip: with silence to the extractor's own length (Qwen2.5-Omni), or not at all
(Qwen3-Omni). A test holds the features to transformers' for clips of exactly the compiled length.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.images import read_part
from secateur.runtime.sources import name_source
from secateur.runtime.waveform import AudioLike, read_waveform, resample

_log = logging.getLogger(__name__)

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "WhisperFeatureExtractor": {
        "feature_size": 80,
        "sampling_rate": 16000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
        "padding_value": 0.0,
        "dither": 0.0,
    }
}
"""What a configuration leaves unsaid, by extractor type; also the list of supported types."""
HIGHEST = 8000.0
"""Hz; Whisper's filters reach up to here at every sampling rate."""
FLOOR, DYNAMIC_RANGE, SHIFT, SCALE = 1e-10, 8.0, 4.0, 4.0
"""Whisper's bounds of loudness, before and after the logarithm, and what the rest is added to and divided by."""
_WHERE = "preprocessor_config.json"


@dataclass(frozen=True)
class AudioPipeline:
    """Read, resample, bring to length, transform: one clip to float32 [mel bins, frames]."""

    samples: int
    """Of a clip, at ``rate``."""
    rate: int
    """Hz."""
    window: int
    """Samples of a frame."""
    hop: int
    """Samples from one frame to the next."""
    mel_bins: int
    padded: int
    """Samples a clip has once the checkpoint's processor has padded it with silence."""
    _said: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], seconds: float, padding: Literal["max_length", "longest"] = "max_length"
    ) -> AudioPipeline:
        """Read a ``preprocessor_config.json``, or the ``feature_extractor`` part of a ``processor_config.json``.

        ``seconds`` is the compiled length of every clip. ``padding`` is how the checkpoint's processor calls its
        extractor: ``max_length`` (Qwen2.5-Omni) or ``longest`` (Qwen3-Omni). Raises :class:`UserError` for a type or
        a length that is not supported, :class:`BundleError` for values that cannot be.
        """
        config = read_part(config, "feature_extractor")
        name = str(config.get("feature_extractor_type"))
        if name not in DEFAULTS:
            raise UserError(f"no feature extractor {name!r} for audio", where=_WHERE, available=DEFAULTS)
        values = {**DEFAULTS[name], **{key: value for key, value in config.items() if value is not None}}
        for key in ("padding_value", "dither"):
            if values[key] != 0:
                raise BundleError(f"{key} {values[key]!r} is not supported", where=_WHERE, available=[0])
        try:
            read = {key: int(values[key]) for key in ("feature_size", "sampling_rate", "hop_length", "n_fft")}
            longest = int(values["chunk_length"] * read["sampling_rate"])
        except (TypeError, ValueError, OverflowError) as error:
            raise BundleError(str(error), where=_WHERE) from None
        for key, number in {**read, "chunk_length": longest, "half of n_fft": read["n_fft"] // 2}.items():
            if number < 1:
                raise BundleError(f"{key} is {number}, the least is 1", where=_WHERE)
        if not math.isfinite(seconds) or seconds * read["sampling_rate"] < read["n_fft"]:
            least = read["n_fft"] / read["sampling_rate"]
            raise UserError(f"{seconds:g} s of audio", fix=f"compile for {least:g} s (one frame) or more")
        samples = round(seconds * read["sampling_rate"])
        if padding == "max_length" and samples > longest:
            most = longest / read["sampling_rate"]
            raise UserError(f"{seconds:g} s of audio, the model's feature extractor takes {most:g}", where=_WHERE)
        return cls(
            samples=samples,
            rate=read["sampling_rate"],
            window=read["n_fft"],
            hop=read["hop_length"],
            mel_bins=read["feature_size"],
            padded=longest if padding == "max_length" else samples,
        )

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    @property
    def frames(self) -> int:
        """Frames of a clip: those whose middle lies in it, less the last of all that the extractor leaves out."""
        return min(math.ceil(self.samples / self.hop), self.padded // self.hop)

    def __call__(self, audio: AudioLike, rate: int | None = None, cut: bool = False) -> NDArray[np.float32]:
        """One clip to float32 [mel bins, frames].

        ``rate`` is that of an array, in Hz; without it the array is taken to have the extractor's. Another rate is
        resampled; a shorter clip is padded with silence, a longer one refused unless ``cut`` says to leave out
        what is over. A pipeline warns once of each. Lengths that differ by less than a hop (10 ms) are the same.
        """
        return self.features(self.fit(audio, rate, cut))

    def fit(self, audio: AudioLike, rate: int | None = None, cut: bool = False) -> NDArray[np.float32]:
        """The clip as float32 [samples] at the extractor's rate. Raises :class:`UserError` for what does not fit."""
        clip, known = read_waveform(audio)
        where = name_source(audio)
        if known is not None and rate not in (None, known):
            raise UserError(f"the file has {known} Hz, not {rate}", where=where, fix="leave the rate out")
        given = known or (self.rate if rate is None else rate)
        if not isinstance(given, int) or given < 1:
            raise UserError(f"a sampling rate of {given!r} Hz", fix="give the rate of the array, a whole number")
        seconds = len(clip) / given
        if seconds >= self.seconds + self.hop / self.rate:
            if not cut:
                raise UserError(
                    f"{seconds:g} s of audio, the bundle was compiled for {self.seconds:g}",
                    where=where,
                    fix=f"cut it, or compile with --audio-seconds {math.ceil(seconds)}",
                )
            self._warn(f"audio is cut to the {self.seconds:g} s that the bundle was compiled for")
            # The samples behind that resampling needs for the last ones.
            clip = clip[: math.ceil((self.seconds + 1) * given)]
        if given != self.rate:
            self._warn(f"audio is resampled from {given} to {self.rate} Hz")
            clip = resample(clip, given, self.rate)
        if seconds <= self.seconds - self.hop / self.rate:
            self._warn(f"audio is padded with silence to the {self.seconds:g} s that the bundle was compiled for")
        clip = clip[: self.samples]
        return np.pad(clip, (0, self.samples - len(clip)))

    def features(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [samples], exactly the compiled number, to log-mel features float32 [mel bins, frames].

        The formula is Whisper's: power spectrum in a periodic Hann window, the clip mirrored at its ends; mel filters;
        log10 of at least 1e-10; at least the loudest value of the padded clip less 8; then (x + 4) / 4.
        """
        # Of the silence behind the clip, no more than the frames that reach into the clip can see.
        silence = min(self.padded - self.samples, self.window)
        mirrored = np.pad(np.pad(clip.astype(np.float64), (0, silence)), self.window // 2, mode="reflect")
        windows = sliding_window_view(mirrored, self.window)[:: self.hop][: self.padded // self.hop]
        hann = np.hanning(self.window + 1)[:-1]
        filters = mel_filters(self.window // 2 + 1, self.mel_bins, self.rate)
        loudness = np.empty((self.mel_bins, len(windows)), dtype=np.float32)
        # Some seconds at a time: spectra in double precision take ten times the room of the features.
        for start in range(0, len(windows), 1000):
            power = np.abs(np.fft.rfft(windows[start : start + 1000] * hann)) ** 2
            loudness[:, start : start + 1000] = np.log10(np.maximum(FLOOR, filters @ power.T))
        loudness = np.maximum(loudness, loudness.max() - DYNAMIC_RANGE)
        return np.ascontiguousarray((loudness[:, : self.frames] + SHIFT) / SCALE, dtype=np.float32)

    def _warn(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _log.warning("%s", what)


@lru_cache(maxsize=4)
def mel_filters(bins: int, mels: int, rate: int) -> NDArray[np.float64]:
    """float64 [mels, bins]: triangles over the frequencies of a spectrum, their centres even on Slaney's mel scale.

    The scale is linear below 1 kHz (15 mel) and logarithmic above (27 steps for a factor of 6.4); every triangle has
    an area of 1 over Hz (Slaney, Auditory Toolbox, 1998).
    """
    step = math.log(6.4) / 27
    highest = 15 + math.log(HIGHEST / 1000) / step
    mel = np.linspace(0, highest, mels + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))
    left, centre, right = (edges[start : mels + start, None] for start in range(3))
    hertz = np.linspace(0, rate // 2, bins)
    triangles = np.minimum((hertz - left) / (centre - left), (right - hertz) / (right - centre))
    return np.asarray(np.maximum(0, triangles) * 2 / (right - left))


def tokens_of_qwen2_5_omni(frames: int) -> int:
    """Tokens of the tower of Qwen2.5-Omni: a convolution of stride 2, then the mean of every two."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def tokens_of_qwen3_omni(frames: int) -> int:
    """Tokens of the tower of Qwen3-Omni: chunks of 100 frames, and what is left over, each through three convolutions
    of stride 2. (transformers counts 13 tokens a chunk whatever its ``n_window``; only 50, the default, fits that.)"""
    chunks, rest = divmod(frames, 100)
    return 13 * chunks + math.ceil(rest / 8)
