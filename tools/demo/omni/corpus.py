"""Training clips as arrays, made once and kept in the work folder: videos and sounds apart, to be paired at will."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.tools.demo.omni.clips import FRAMES_PER_SECOND, SECONDS, make_audio, make_video
from secateur.tools.demo.omni.inputs import cut_patches, hear_mels, label_audio, label_video

Arrays = dict[str, NDArray]


def load_arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of an .npz file, made and written if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **make())  # type: ignore[arg-type]  # its last keyword is a flag
        partial.replace(path)
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def make_grids(first: int, size: int, split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One second of each of S videos, in three of four the one with the digit: patches float32 [S*64, 1176] and labels
    int64 [S, 16]."""
    frames, labels = [], []
    for seed in range(first, first + size):
        video = make_video(seed, split)
        second = (video.second + (seed % 4 == 0)) % SECONDS
        frames.append(video.frames[FRAMES_PER_SECOND * second : FRAMES_PER_SECOND * (second + 1)])
        labels.append(label_video(video)[second])
    return cut_patches(np.concatenate(frames)), np.stack(labels)


def make_sounds(first: int, size: int, split: str) -> Arrays:
    """Every sound: ``mels`` float16 [S, 128, 400], ``label`` int64 [S, 100], ``digit`` and ``second`` int64 [S]."""
    sounds = [make_audio(seed, split) for seed in range(first, first + size)]
    return {
        "mels": np.stack([hear_mels(sound.wave).astype(np.float16) for sound in sounds]),
        "label": np.stack([label_audio(sound) for sound in sounds]),
        "digit": np.array([sound.digit for sound in sounds]),
        "second": np.array([sound.second for sound in sounds]),
    }
