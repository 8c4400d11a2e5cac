"""Pixels of a scene: textured backgrounds and real handwritten digits in coloured ink.

Digits come from scikit-learn's `load_digits` (UCI optical digits, Alpaydin & Kaynak 1998, CC BY 4.0).
Every function draws from the generator it is handed and from nothing else.
"""

from functools import cache

import numpy as np
from PIL import Image

from secateur.tools.demo.architecture import IMAGE_SIZE

SMALLEST_DIGIT, LARGEST_DIGIT = 26, 32  # side of a digit's box in pixels
HELD_OUT_EVERY = 5  # every fifth instance of a class is never shown in training
INKS = {
    "red": (235, 45, 40),
    "green": (45, 205, 60),
    "blue": (60, 90, 250),
    "yellow": (240, 225, 50),
    "cyan": (50, 220, 230),
    "magenta": (230, 60, 220),
}


@cache
def load_digit_instances(split: str) -> dict[int, np.ndarray]:
    """Indices into `load_digits().images` per class; 'train' and 'held_out' share none."""
    from sklearn.datasets import load_digits

    target = load_digits().target
    instances = {}
    for digit in range(10):
        indices = np.flatnonzero(target == digit)
        held = np.arange(len(indices)) % HELD_OUT_EVERY == 0
        instances[digit] = indices[held if split == "held_out" else ~held]
    return instances


@cache
def load_digit_images() -> np.ndarray:
    """All digit images as uint8 [1797, 8, 8], 0 (paper) to 255 (ink)."""
    from sklearn.datasets import load_digits

    return np.round(load_digits().images * (255 / 16)).astype(np.uint8)


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """A dim textured background, float32 [112, 112, 3] in 0..255: gradient, two octaves of noise, faint boxes."""
    base = rng.uniform(40, 85) + rng.uniform(-8, 8, 3)
    y, x = np.mgrid[-1 : 1 : IMAGE_SIZE * 1j, -1 : 1 : IMAGE_SIZE * 1j].astype(np.float32)
    ramp = (x * rng.uniform(-14, 14) + y * rng.uniform(-14, 14))[..., None]
    picture = base.astype(np.float32) + ramp
    for cells, strength in ((7, 9.0), (28, 7.0)):
        noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        picture = (
            picture + strength * np.asarray(noise.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))[..., None]
        )
    for _ in range(rng.integers(2, 6)):
        left, top = rng.integers(-10, IMAGE_SIZE - 10, 2)
        width, height = rng.integers(3, 36, 2)
        picture[max(top, 0) : top + height, max(left, 0) : left + width] += rng.uniform(-10, 10, 3)
    return picture + rng.normal(0, 3, picture.shape).astype(np.float32)


def draw_stroke(rng: np.random.Generator, instance: int, side: int) -> np.ndarray:
    """One handwritten digit as ink coverage, float32 [side, side] in 0..1, slightly turned and slanted."""
    source = Image.fromarray(np.pad(load_digit_images()[instance], 1))
    angle, slant = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(-0.12, 0.12)
    scale = 9.2 / side
    matrix = scale * np.array([[np.cos(angle), slant - np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = 5.0 - matrix @ np.full(2, side / 2)
    affine = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    stroke = source.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    contrast = rng.uniform(1.1, 1.7)
    return np.clip((np.asarray(stroke, np.float32) / 255 - 0.12) * contrast, 0, 1)


def mix_ink(rng: np.random.Generator, colour: str) -> np.ndarray:
    """The RGB of one pen, float32 [3]: the colour's ink with a little variation."""
    return np.asarray(INKS[colour], np.float32) * np.float32(rng.uniform(0.9, 1.05)) + rng.normal(0, 6, 3).astype(
        np.float32
    )
