"""Sound as float32 samples: files, arrays, and another sampling rate."""

from __future__ import annotations

import io
import math
import os
from os import PathLike
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from secateur.runtime.errors import UserError
from secateur.runtime.sources import name_source, read_source
from secateur.runtime.wav import CONVERT, Wave, is_wav, read_wav

AudioLike: TypeAlias = "str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | NDArray[np.floating[Any]]"

ACCEPTED = "a sound file's path, its bytes, a file object, a data: URL, or a float array [samples] between -1 and 1"
_PIECE = 1 << 16
"""Samples read at once."""
_MOST_SAMPLES = 1 << 28
"""Of all channels, of a compressed file: 1 GiB in float32, more than an hour of two channels at 32 kHz."""
_MARKS = (
    (0, b"fLaC", "FLAC"), (0, b"OggS", "Ogg (Vorbis, Opus)"), (0, b"ID3", "MP3"), (0, b"\xff\xfb", "MP3"),
    (0, b"\xff\xf3", "MP3"), (0, b"\xff\xf2", "MP3"), (4, b"ftyp", "MP4 (M4A)"), (0, b"\x1a\x45\xdf\xa3", "WebM"),
    (0, b"FORM", "AIFF"), (0, b".snd", "AU"), (0, b"caff", "CAF"), (0, b"riff", "Wave64"), (0, b"RIFF", "RIFF"),
)  # fmt: skip
_CROSSINGS = 32
"""Zero crossings of the resampling filter on either side: the transition band is about 3 % of the lower rate."""
_BETA = 9.0
"""Of its Kaiser window: the stop band lies about 90 dB down."""
_BLOCK = 256
"""Phases whose weights are computed at once; two rates may have as many phases as the higher has samples a second."""
_LOUDEST = 4.0
"""Float samples overshoot full scale a little when a clip was resampled; beyond this they are unscaled integers."""


def is_audio(value: object) -> bool:
    """Whether the type is one that :func:`read_waveform` takes."""
    return isinstance(value, (str, PathLike, bytes, bytearray, memoryview, np.ndarray)) or callable(
        getattr(value, "read", None)
    )


def read_waveform(audio: AudioLike) -> tuple[NDArray[np.float32], int | None]:
    """Samples, float32 [n] with full scale at 1, and their rate in Hz; None where an array does not say it.

    A file's channels are averaged. WAV files of integers and floats are read here, other files by soundfile (the extra
    ``sound``); both give the samples of soundfile and of transformers' ``load_audio``, but for rounding. Raises
    :class:`UserError` for what is no sound, for a file that ends before its header says, and for kinds of file
    that nothing installed reads.
    """
    if isinstance(audio, np.ndarray):
        return _from_array(audio), None
    if not is_audio(audio):
        raise UserError(f"a {type(audio).__name__} is not audio", fix=f"give {ACCEPTED}")
    where = name_source(audio) or ""
    data = _read_bytes(read_source(audio, "audio", where), where)
    if not data:
        raise UserError("an empty file", where=where, fix="give a whole file")
    found = read_wav(data, where) if is_wav(data) else None
    if not isinstance(found, Wave):
        found = _read_with_library(data, where, found)
    samples, rate = found
    if not samples.size or rate < 1:
        raise UserError(f"{len(samples)} samples at {rate} Hz, there is nothing to hear", where=where)
    mono = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    _check_levels(mono, where)
    return mono, rate


def _read_bytes(source: object, where: str) -> bytes:
    if isinstance(source, bytes):
        return source
    if not isinstance(source, (str, PathLike)):
        raise UserError(f"a {type(source).__name__} is not audio", fix=f"give {ACCEPTED}")
    if not os.path.isfile(source):
        raise UserError("no such audio file", where=where)
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=where) from None


def _read_with_library(data: bytes, where: str, tag: int | None) -> Wave:
    """Everything but plain WAV files; ``tag`` is the format tag of one that is not plain."""
    what = _recognise(data) if tag is None else f"a WAV file of format {tag}"
    try:
        import soundfile
    except ImportError:
        known = "WAV files of integers and floats are read without it"
        raise UserError(
            f"{what}; it is read by soundfile, which is not installed ({known})", where=where,
            fix=f"pip install 'secateur[sound]', or {CONVERT}",
        ) from None  # fmt: skip
    except OSError as error:  # the library beside the package
        raise UserError(f"soundfile cannot be loaded ({error})", where=where, fix=CONVERT) from None
    pieces: list[NDArray[np.float32]] = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as opened:
            rate, announced, count = int(opened.samplerate), int(opened.frames), 0
            # Piece by piece: a header may announce more samples than memory holds.
            while len(piece := opened.read(_PIECE, dtype="float32", always_2d=True)):
                pieces.append(piece)
                count += piece.size
                if count > _MOST_SAMPLES:
                    raise UserError(f"more than {_MOST_SAMPLES} samples", where=where, fix="cut it")
            channels = int(opened.channels)
    except (soundfile.SoundFileError, RuntimeError) as error:
        said = " ".join(str(error).split()).rpartition(": ")[2].rstrip(".")
        raise UserError(f"{what}, which soundfile does not read ({said})", where=where, fix=CONVERT) from None
    samples = np.concatenate(pieces) if pieces else np.zeros((0, channels), np.float32)
    if len(samples) < announced < _MOST_SAMPLES:
        raise UserError(
            f"the file ends after {len(samples)} of {announced} samples", where=where, fix="give a whole file"
        )
    return Wave(samples, rate)


def _recognise(data: bytes) -> str:
    """A file's kind in words, by its first bytes."""
    for at, mark, name in _MARKS:
        if data[at : at + len(mark)] == mark:
            return f"a file of type {name}"
    return "a file of no known type"


def resample(samples: NDArray[np.float32], rate: int, to: int) -> NDArray[np.float32]:
    """float32 [n] at ``rate`` Hz to float32 [ceil(n * to / rate)] at ``to`` Hz; frequencies above the lower of the
    two Nyquist limits are filtered out.

    Every output is the sum of the inputs around its time, weighted by a sinc in a Kaiser window: the polyphase form of
    band-limited interpolation. Outside the clip is silence.
    """
    if rate == to:
        return samples
    common = math.gcd(rate, to)
    up, down = to // common, rate // common
    cutoff = min(1.0, up / down)
    reach = math.ceil(_CROSSINGS / cutoff)
    count = math.ceil(len(samples) * up / down)
    # Output number n lies at n * down / up; outputs of one phase, n modulo up, share their weights.
    padded = np.pad(samples.astype(np.float64), (reach, reach + down + 1))
    around = sliding_window_view(padded, 2 * reach + 1)
    result = np.empty(count, dtype=np.float32)
    offsets = np.arange(-reach, reach + 1)
    for first in range(0, min(up, count), _BLOCK):
        phases = np.arange(first, min(up, count, first + _BLOCK))
        distance = cutoff * (offsets - (phases * down % up)[:, None] / up)
        inside = np.clip(1 - (distance / _CROSSINGS) ** 2, 0, None)
        weights = np.sinc(distance) * np.i0(_BETA * np.sqrt(inside)) * (inside > 0)
        weights /= weights.sum(axis=1, keepdims=True)
        for phase, row in zip(phases, weights, strict=True):
            outputs = len(range(phase, count, up))
            result[phase::up] = around[phase * down // up :: down][:outputs] @ row
    return result


def _from_array(samples: NDArray[Any]) -> NDArray[np.float32]:
    what = f"an array of shape {list(samples.shape)} and type {samples.dtype} is not a waveform"
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating) or not samples.size:
        raise UserError(what, fix="give float32 [samples] between -1 and 1, channels averaged")
    _check_levels(samples)
    return samples.astype(np.float32)


def _check_levels(samples: NDArray[Any], where: str | None = None) -> None:
    fix = "give samples between -1 and 1"
    if not np.isfinite(samples).all():
        raise UserError("the waveform holds values that are not finite", where=where, fix=fix)
    loudest = float(np.abs(samples).max())
    if loudest > _LOUDEST:
        raise UserError(f"the waveform reaches {loudest:g}", where=where, fix=f"scale it: {fix}")
