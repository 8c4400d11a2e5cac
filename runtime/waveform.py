"""Sound as float32 samples: WAV files, arrays, and another sampling rate."""

from __future__ import annotations

import math
import wave
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from secateur.runtime.errors import UserError

AudioLike: TypeAlias = "str | PathLike[str] | NDArray[np.floating[Any]]"

ACCEPTED = "a WAV file's path, or a float array [samples] between -1 and 1"
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
    return isinstance(value, (str, PathLike, np.ndarray))


def read_waveform(audio: AudioLike) -> tuple[NDArray[np.float32], int | None]:
    """Samples, float32 [n] with full scale at 1, and their rate in Hz; None where an array does not say it.

    A file's channels are averaged. Raises :class:`UserError` for what is no sound, for other kinds of file than
    PCM, and for a file that ends before its header says.
    """
    if isinstance(audio, np.ndarray):
        return _from_array(audio), None
    if not is_audio(audio):
        raise UserError(f"a {type(audio).__name__} is not audio", fix=f"give {ACCEPTED}")
    path = Path(audio)
    if not path.is_file():
        raise UserError("no such audio file", where=str(path))
    convert = f"convert it: ffmpeg -i {path.name} -c:a pcm_s16le out.wav"
    try:
        with wave.open(str(path), "rb") as opened:
            channels, width, rate, count, *_ = opened.getparams()
            data = opened.readframes(count)
    except (wave.Error, EOFError) as error:
        what = f"not a WAV file of PCM samples ({str(error) or 'it ends too early'})"
        raise UserError(what, where=str(path), fix=convert) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error})", where=str(path)) from None
    if len(data) < count * channels * width:
        what = f"the file ends after {len(data) // (channels * width)} of {count} samples"
        raise UserError(what, where=str(path), fix="give a whole file")
    if not count or rate < 1:
        raise UserError(f"{count} samples at {rate} Hz, there is nothing to hear", where=str(path))
    if width > 4:
        raise UserError(f"samples of {8 * width} bits", where=str(path), available=[8, 16, 24, 32], fix=convert)
    scaled = _from_pcm(data, width).reshape(count, channels)
    return scaled.mean(axis=1, dtype=np.float64).astype(np.float32), rate


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
    if not np.isfinite(samples).all():
        raise UserError("the waveform holds values that are not finite", fix="give samples between -1 and 1")
    loudest = float(np.abs(samples).max())
    if loudest > _LOUDEST:
        raise UserError(f"the waveform reaches {loudest:g}", fix="scale its samples to lie between -1 and 1")
    return samples.astype(np.float32)


def _from_pcm(data: bytes, width: int) -> NDArray[np.float32]:
    """Little-endian integers of ``width`` bytes to float32, full scale at 1; those of one byte are unsigned."""
    if width == 1:
        return ((np.frombuffer(data, np.uint8) - 128.0) / 128).astype(np.float32)
    if width == 3:
        # Three bytes become the upper ones of four: the sign comes right, the scale is that of 32 bits.
        wide = np.zeros((len(data) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    whole = np.frombuffer(data, f"<i{width}")
    return (whole / 2.0 ** (8 * width - 1)).astype(np.float32)
