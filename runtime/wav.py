"""WAV files: RIFF, RIFX (big-endian) and RF64, with samples as integers or floats, plain or extensible header.

Python's own module ``wave`` reads no floats, and extensible headers from Python 3.12 on.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import UserError

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
"""Format tags; an extensible header has the tag in the first two bytes of its sub-format."""
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")
"""Behind those two bytes, where the sub-format is one of the plain tags (as little-endian files write it)."""
_UNKNOWN = 0x7FFF0000
"""Sizes from here on are what programs write that cannot seek back to the header: the samples go on to the end."""
_WIDTHS = {PCM: (1, 2, 3, 4), FLOAT: (4, 8)}
_ORDERS = {b"RIFF": "<", b"RIFX": ">", b"RF64": "<"}
CONVERT = "convert it: ffmpeg -i FILE -c:a pcm_s16le out.wav"


class Wave(NamedTuple):
    """Samples float32 [n, channels] with full scale at 1, and their rate in Hz."""

    samples: NDArray[np.float32]
    rate: int


class _Format(NamedTuple):
    tag: int
    channels: int
    rate: int
    block: int
    """Bytes of one sample of every channel."""
    bits: int


def is_wav(data: bytes) -> bool:
    return data[:4] in _ORDERS and data[8:12] == b"WAVE"


def read_wav(data: bytes, where: str) -> Wave | int:
    """A whole file; the format tag alone where it holds samples of another kind (A-law, ADPCM, MP3).

    Integers are divided by half their range, those of one byte are unsigned; floats are as they are. A file whose
    header was written before the samples, by a program that could not go back, is read to its end. Raises
    :class:`UserError` for a file that ends before its header says, and for headers that cannot be.
    """
    order = _ORDERS[data[:4]]
    (whole,) = struct.unpack_from(f"{order}I", data, 4)
    form: _Format | None = None
    place, wide = 12, None
    while place + 8 <= len(data):
        name = data[place : place + 4]
        (size,) = struct.unpack_from(f"{order}I", data, place + 4)
        body = place + 8
        if name == b"ds64" and size >= 24 and body + 16 <= len(data):
            (wide,) = struct.unpack_from("<Q", data, body + 8)
        elif name == b"fmt ":
            form = _read_format(data[body : body + size], order, where)
        elif name == b"data":
            if form is None:
                raise UserError("a WAV file whose samples come before their format", where=where, fix=CONVERT)
            if wide is not None and size == 0xFFFFFFFF:
                size = wide
            rest = len(data) - body
            # Nobody closed the file: the whole of it is said to be smaller than it is, or too large to be.
            if size >= _UNKNOWN > rest or (size == 0 and (whole + 8 < len(data) or whole >= _UNKNOWN)):
                size = rest
            if size > rest:
                what = f"the file ends after {rest // form.block} of {size // form.block} samples"
                raise UserError(what, where=where, fix="give a whole file")
            return _decode(data[body : body + size], form, order, where)
        place = body + size + size % 2
    lacks = "its format" if form is None else "samples"
    raise UserError(f"a WAV file without {lacks}", where=where, fix="give a whole file")


def _read_format(chunk: bytes, order: str, where: str) -> _Format:
    if len(chunk) < 16:
        raise UserError("a WAV file whose header ends too early", where=where, fix="give a whole file")
    tag, channels, rate, _, block, bits = struct.unpack_from(f"{order}HHIIHH", chunk)
    if tag == EXTENSIBLE and len(chunk) >= 40:
        (low,) = struct.unpack_from(f"{order}H", chunk, 24)
        # Big-endian files write the second and third part of the sub-format in their own order; only its end is fixed.
        tag = low if chunk[32:40] == _SUBFORMAT[6:] else tag
    if not channels or not rate or not block:
        what = f"a WAV file of {channels} channels at {rate} Hz with {block} bytes a sample"
        raise UserError(what, where=where, fix="give a whole file")
    return _Format(tag, channels, rate, block, bits)


def _decode(data: bytes, form: _Format, order: str, where: str) -> Wave | int:
    if form.tag not in _WIDTHS:
        return form.tag
    width, over = divmod(form.block, form.channels)
    if over or width not in _WIDTHS[form.tag] or (form.bits + 7) // 8 != width:
        what = f"samples of {form.bits} bits, {form.block} bytes for {form.channels} channel(s)"
        widths = [8 * size for size in _WIDTHS[form.tag]]
        raise UserError(what, where=where, available=widths, fix=CONVERT)
    data = data[: len(data) - len(data) % form.block]
    if form.tag == FLOAT:
        found = np.frombuffer(data, f"{order}f{width}").astype(np.float32)
    else:
        found = _from_integers(data, width, order)
    return Wave(found.reshape(-1, form.channels), form.rate)


def _from_integers(data: bytes, width: int, order: str) -> NDArray[np.float32]:
    """Integers of ``width`` bytes to float32, full scale at 1; those of one byte are unsigned."""
    if width == 1:
        return ((np.frombuffer(data, np.uint8) - 128.0) / 128).astype(np.float32)
    if width == 3:
        # Three bytes become the upper ones of four: the sign comes right, the scale is that of 32 bits.
        wide = np.zeros((len(data) // 3, 4), dtype=np.uint8)
        wide[:, slice(1, 4) if order == "<" else slice(0, 3)] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    whole = np.frombuffer(data, f"{order}i{width}")
    return (whole / 2.0 ** (8 * width - 1)).astype(np.float32)
