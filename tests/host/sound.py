"""Runs a manifest's ``preprocessing.sound``, from what docs/ports.md says of it. NumPy alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def run_sound(sound: dict[str, Any], clip: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Samples at the sampling rate, no more than ``samples`` -> float32 [mel_bins, frames]."""
    if len(clip) > sound["samples"]:
        raise ValueError(f"{len(clip)} samples")
    size, hop, half = sound["n_fft"], sound["hop"], sound["n_fft"] // 2
    whole = np.zeros(sound["padded_samples"])
    whole[: len(clip)] = clip
    whole = np.concatenate([whole[half:0:-1], whole, whole[-2 : -half - 2 : -1]])
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(size) / size)
    starts = range(0, sound["padded_samples"] // hop * hop, hop)
    power = np.array([np.abs(np.fft.rfft(whole[start : start + size] * window)) ** 2 for start in starts])
    logs = np.log10(np.maximum(_filters(sound) @ power.T, sound["floor"]))
    logs = np.maximum(logs, logs.max() - sound["dynamic_range"])
    return ((logs[:, : sound["frames"]] + sound["add"]) / sound["divide"]).astype(np.float32)


def _mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _hertz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * math.exp(math.log(6.4) / 27 * (mel - 15))


def _filters(sound: dict[str, Any]) -> np.ndarray[Any, Any]:
    low, high = _mel(sound["lowest"]), _mel(sound["highest"])
    bins = sound["n_fft"] // 2 + 1
    hertz = np.linspace(0, sound["sampling_rate"] // 2, bins)
    edges = [_hertz(low + (high - low) * n / (sound["mel_bins"] + 1)) for n in range(sound["mel_bins"] + 2)]
    made = np.zeros((sound["mel_bins"], bins))
    for n in range(sound["mel_bins"]):
        left, centre, right = edges[n : n + 3]
        slopes = np.minimum((hertz - left) / (centre - left), (right - hertz) / (right - centre))
        made[n] = np.maximum(0, slopes) * 2 / (right - left)
    return made
