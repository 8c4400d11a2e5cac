"""The shipped clips and their questions: frames as one picture, sound as a WAV file."""

from __future__ import annotations

import json
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secateur.runtime.errors import UserError
from secateur.tools.demo.omni.clips import FRAME_SIZE, FRAMES, SAMPLES, SAMPLING_RATE, Clip


@dataclass(frozen=True)
class Question:
    """One entry of ``questions.json``."""

    frames: Path
    sound: Path
    text: str
    answer: str


def write_clip(clip: Clip, stem: Path) -> tuple[Path, Path]:
    """Writes ``stem``.png, the eight frames above each other, and ``stem``.wav, 16 bits at 16 kHz; returns both."""
    picture, sound = stem.with_suffix(".png"), stem.with_suffix(".wav")
    Image.fromarray(clip.video.frames.reshape(-1, FRAME_SIZE, 3)).save(picture, optimize=True)
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(np.round(clip.audio.wave * 32767).astype("<i2").tobytes())
    return picture, sound


def read_frames(path: Path) -> NDArray[np.uint8]:
    """Frames uint8 [8, 112, 112, 3] of a picture that has them above each other."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    if pixels.shape != (FRAMES * FRAME_SIZE, FRAME_SIZE, 3):
        raise UserError(
            f"a picture of {pixels.shape[1]}x{pixels.shape[0]} pixels", where=str(path),
            fix=f"give {FRAMES} frames of {FRAME_SIZE}x{FRAME_SIZE} above each other",
        )  # fmt: skip
    return pixels.reshape(FRAMES, FRAME_SIZE, FRAME_SIZE, 3)


def read_sound(path: Path) -> NDArray[np.float32]:
    """Samples float32 [64000] in -1..1 of a WAV file of four seconds, 16 bits at 16 kHz, one channel."""
    with wave.open(str(path), "rb") as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        data = file.readframes(SAMPLES)
    if form != (SAMPLING_RATE, 1, 2) or len(data) != 2 * SAMPLES:
        raise UserError(
            "{} Hz, {} channel(s) of {} byte(s)".format(*form) + f", {len(data)} bytes of samples", where=str(path),
            fix=f"give {SAMPLES} samples of 16 bits at {SAMPLING_RATE} Hz in one channel",
        )  # fmt: skip
    samples = np.frombuffer(data, "<i2")
    return (samples / 32767).astype(np.float32)


def read_questions(path: Path) -> list[Question]:
    """A JSON list of {frames, sound, question, answer}; paths are relative to the file."""
    if not path.is_file():
        raise UserError("no such file", where=str(path), fix="run from the repository's root, or give --questions")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [
            Question(path.parent / e["frames"], path.parent / e["sound"], str(e["question"]), str(e["answer"]))
            for e in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"not a list of questions ({type(error).__name__}: {error})", where=str(path),
            fix="each entry has frames, sound, question and answer",
        ) from None  # fmt: skip
