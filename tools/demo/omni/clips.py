"""Clips of the omni demo: for one second a digit crosses the picture, in another second a digit is dialled.

A clip is four seconds of video (two frames a second) and of sound. What is seen and what is heard are drawn apart and
may be combined at will. Digits are heard as the two tones that a telephone sends for them (ITU-T Q.23).
Every function draws from the seed or the generator it is handed and from nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SECONDS = 4
FRAMES_PER_SECOND = 2
FRAMES = SECONDS * FRAMES_PER_SECOND
FRAME_SIZE = 112
SAMPLING_RATE = 16_000
SAMPLES = SECONDS * SAMPLING_RATE
DIGITS = tuple(range(10))
ROW_TONES, COLUMN_TONES = (697, 770, 852, 941), (1209, 1336, 1477)  # Hz
SMALLEST_DIGIT, LARGEST_DIGIT = 52, 56  # height of a glyph in pixels
RASTER = 14  # digits stand at multiples of this many pixels: at the corner of a patch
SPLITS = {"train": 0, "held_out": 1}
INKS = ((235, 60, 50), (60, 205, 75), (90, 120, 250), (240, 225, 60), (60, 220, 230), (230, 80, 220), (240, 240, 240))


@dataclass(frozen=True, eq=False)
class Video:
    """``frames`` uint8 [8, 112, 112, 3]; ``digit`` is seen during ``second`` (0-based) only; ``ink`` float32
    [8, 112, 112] in 0..1 says where."""

    frames: NDArray[np.uint8]
    digit: int
    second: int
    ink: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Audio:
    """``wave`` float32 [64000] in -1..1, 16 kHz; ``digit`` is heard from sample ``start`` to ``stop``, in
    ``second``."""

    wave: NDArray[np.float32]
    digit: int
    second: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Clip:
    video: Video
    audio: Audio


def make_clip(seed: int, split: str = "train") -> Clip:
    """Clip number ``seed`` of a split ('train' or 'held_out'); in half of them both digits are the same."""
    rng = np.random.default_rng([SPLITS[split], 2, seed])
    seen, heard = (int(digit) for digit in rng.integers(0, len(DIGITS), 2))
    return Clip(make_video(seed, split, seen), make_audio(seed, split, seen if rng.random() < 0.5 else heard))


def make_video(seed: int, split: str = "train", digit: int | None = None) -> Video:
    """Frames number ``seed`` of a split: a still background, a square that drifts through all seconds, a digit that
    moves during one of them, on the raster of patches."""
    rng = np.random.default_rng([SPLITS[split], 0, seed])
    background = draw_background(rng)
    drawn, second = int(rng.integers(len(DIGITS))), int(rng.integers(SECONDS))
    digit = drawn if digit is None else digit
    square_ink, digit_ink = (np.array(INKS[index], np.float32) for index in rng.permutation(len(INKS))[:2])
    glyph = draw_digit(rng, digit)
    height, width = glyph.shape
    places = (FRAME_SIZE - np.array(glyph.shape)) // RASTER  # the last place on the raster, row and column
    place = rng.integers(0, places + 1)
    step = rng.integers(-1, 2, 2)
    side = int(rng.integers(14, 22))
    square, drift = rng.uniform(0, FRAME_SIZE - side, 2), rng.uniform(-9, 9, 2)
    frames = np.empty((FRAMES, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    ink = np.zeros((FRAMES, FRAME_SIZE, FRAME_SIZE), np.float32)
    for number, picture in enumerate(frames):
        picture[:] = background
        top, left = _reflect(square + number * drift, FRAME_SIZE - side)
        picture[top : top + side, left : left + side] = square_ink
        if number // FRAMES_PER_SECOND == second:
            top, left = RASTER * np.clip(place + number % FRAMES_PER_SECOND * step, 0, places)
            rows, columns = slice(top, top + height), slice(left, left + width)
            ink[number, rows, columns] = glyph
            covered = glyph[..., None]
            picture[rows, columns] = np.round(picture[rows, columns] * (1 - covered) + digit_ink * covered)
    return Video(frames, digit, second, ink)


def _reflect(place: NDArray[np.float64], room: int) -> tuple[int, int]:
    """Where a thing that is reflected at the borders 0 and ``room`` stands, whole pixels (row, column)."""
    row, column = np.round(room - abs(place % (2 * room) - room)).astype(int)
    return int(row), int(column)


def draw_background(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A dim gradient with soft blotches in one tint, uint8 [112, 112, 3]."""
    axis = np.linspace(-1, 1, FRAME_SIZE, dtype=np.float32)
    down, right = rng.uniform(-20, 20, 2).astype(np.float32)
    grey = axis[:, None] * down + axis[None, :] * right
    for cells, strength in ((4, 10.0), (9, 6.0)):
        noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        grey += np.float32(strength) * np.asarray(noise.resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC))
    tint = (rng.uniform(40, 85) + rng.uniform(-12, 12, 3)).astype(np.float32)
    return np.clip(grey[..., None] + tint, 0, 160).astype(np.uint8)


@cache
def _draw_glyph(digit: int) -> Image.Image:
    """A digit in Pillow's own font, as large as it gets, cut to its ink."""
    font = ImageFont.load_default(80)
    sheet = Image.new("L", (120, 120))
    ImageDraw.Draw(sheet).text((60, 60), str(digit), fill=255, font=font, anchor="mm", stroke_width=3)
    return sheet.crop(sheet.getbbox())


def draw_digit(rng: np.random.Generator, digit: int) -> NDArray[np.float32]:
    """A printed digit as ink coverage, float32 [H, W] in 0..1, slightly turned and stretched."""
    glyph = _draw_glyph(digit).rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC, expand=True)
    height = int(rng.integers(SMALLEST_DIGIT, LARGEST_DIGIT + 1))
    width = max(14, round(glyph.width * height / glyph.height * rng.uniform(0.95, 1.1)))
    return np.asarray(glyph.resize((width, height), Image.Resampling.BOX), np.float32) / np.float32(255)


def dial_tones(digit: int) -> tuple[int, int]:
    """The two frequencies of a digit on a telephone's keypad, in Hz: its row's and its column's."""
    row, column = (3, 1) if digit == 0 else divmod(digit - 1, 3)
    return ROW_TONES[row], COLUMN_TONES[column]


def make_audio(seed: int, split: str = "train", digit: int | None = None) -> Audio:
    """Sound number ``seed`` of a split: noise, a hum that lasts the whole clip, and one digit dialled."""
    rng = np.random.default_rng([SPLITS[split], 1, seed])
    drawn, second = int(rng.integers(len(DIGITS))), int(rng.integers(SECONDS))
    digit = drawn if digit is None else digit
    length = int(rng.uniform(0.36, 0.72) * SAMPLING_RATE)
    start = second * SAMPLING_RATE + int(rng.uniform(0.06, 0.94 - length / SAMPLING_RATE) * SAMPLING_RATE)
    time = np.arange(SAMPLES) / SAMPLING_RATE
    wave = rng.uniform(0.002, 0.01) * rng.standard_normal(SAMPLES)
    wave += rng.uniform(0.01, 0.04) * np.sin(2 * np.pi * rng.uniform(120, 400) * time + rng.uniform(0, 6))
    fade = np.clip(np.minimum(np.arange(length), np.arange(length)[::-1]) / 160, 0, 1)  # 10 ms at both ends
    for frequency in dial_tones(digit):
        tone = np.sin(2 * np.pi * frequency * rng.uniform(0.99, 1.01) * time[:length] + rng.uniform(0, 6))
        wave[start : start + length] += rng.uniform(0.1, 0.25) * fade * tone
    return Audio(np.clip(wave, -1, 1).astype(np.float32), digit, second, start, start + length)
