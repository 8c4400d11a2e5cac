"""Pictures and sound of a self-test: the same on every machine, small as files, and with detail in every corner."""

from __future__ import annotations

import hashlib
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BLOCKS = 12
"""Along the shorter edge of a picture; whole blocks of one colour are what keeps its file small."""


def draw_picture(width: int, height: int, seed: int) -> Image.Image:
    """Blocks of random colours under a ramp, so that no two places look alike and every filter shows at their edges."""
    edge = max(1, min(width, height) // _BLOCKS)
    columns, rows = -(-width // edge), -(-height // edge)
    blocks = _draw_bytes(f"picture {seed}", 3 * columns * rows).reshape(rows, columns, 3) // 2
    whole = blocks.repeat(edge, axis=0).repeat(edge, axis=1)[:height, :width]
    y, x = np.indices((height, width))
    ramp = np.stack([x * 120 // width, y * 120 // height, (x + y) * 120 // (width + height)], axis=-1)
    return Image.fromarray((whole + ramp).astype(np.uint8))


def write_picture(path: Path, width: int, height: int, seed: int) -> None:
    """As a PNG without meta data."""
    path.parent.mkdir(exist_ok=True)
    draw_picture(width, height, seed).save(path, format="PNG", compress_level=9)


def write_sound(path: Path, samples: int, rate: int, seed: int) -> None:
    """As a WAV file of 8 bits: noise that swells and fades, on a tone that climbs, all of whole numbers."""
    path.parent.mkdir(exist_ok=True)
    at = np.arange(samples, dtype=np.int64)
    swell = np.abs(at % (rate // 3) - rate // 6) * 50 // (rate // 6)
    noise = (_draw_bytes(f"sound {seed}", samples).astype(np.int64) - 128) * swell // 128
    tone = np.abs(at * (200 + at // 40) // rate * 32 % 64 - 32) - 16
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(rate)
        file.writeframes((128 + noise + tone).astype(np.uint8).tobytes())


def _draw_bytes(seed: str, count: int) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.shake_256(seed.encode()).digest(count), np.uint8)
