"""Videos to frames with Pillow: pictures in order, arrays, directories, animated images; other files through PyAV.

A bundle was compiled for a number of frames and a rate at which they are sampled. Frames are chosen uniformly over the
whole video, as transformers' processors choose them when that number is the most they may take.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from secateur.runtime.errors import UserError
from secateur.runtime.images import read_part
from secateur.runtime.pictures import (
    MAX_PIXELS,
    ImageLike,
    PictureReader,
    blame_decoder,
    is_image,
    open_source,
)

_log = logging.getLogger(__name__)

VideoLike: TypeAlias = "str | PathLike[str] | bytes | IO[bytes] | Sequence[ImageLike] | NDArray[Any]"

ACCEPTED = (
    "a list of images, a uint8 array [frames, height, width, 3] or a .npy file of one, a directory of frames, or a "
    "video file by its path, bytes, data: URL or file object"
)
_ENDS = ("Qwen3VLVideoProcessor",)
"""Types whose choice holds the first and the last frame; the others take the first frame of equal parts."""
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files of a directory that are its frames."""
_ANIMATED = ("GIF", "PNG", "WEBP")
"""Formats of Pillow's that hold several frames; every other file is PyAV's."""


Prepare: TypeAlias = Callable[[Image.Image], Any]


class Clip(NamedTuple):
    """The chosen frames of a video in RGB, or what was made of each, and when each of them is seen."""

    frames: list[Any]
    seconds: list[float]
    size: tuple[int, int]
    """Height and width of the first frame in the video."""


@dataclass(frozen=True)
class FrameSampler:
    """A video to exactly ``frames`` pictures, one every 1 / ``fps`` seconds where the video is no longer than that."""

    frames: int
    fps: float
    ends: bool = False
    """Whether the last frame is always chosen (Qwen3-VL)."""
    step: int = 1
    """Frames that become one temporal grid: a bundle is compiled for a multiple of it."""
    reader: PictureReader = field(default_factory=PictureReader)
    _said: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], frames: int, fps: float, step: int = 1, max_pixels: int = MAX_PIXELS
    ) -> FrameSampler:
        """Read how frames are chosen from a ``video_preprocessor_config.json`` or a ``processor_config.json``. A frame
        may have ``max_pixels``."""
        part = read_part(config, "video_processor")
        kind = str(part.get("video_processor_type")).removesuffix("Fast")
        reader = PictureReader(part.get("do_convert_rgb") is not False, max_pixels)
        return cls(frames, fps, ends=kind in _ENDS, step=step, reader=reader)

    def __call__(self, video: VideoLike, fps: float | None = None) -> list[Image.Image]:
        """The frames of :meth:`read` alone."""
        return self.read(video, fps).frames

    def read(self, video: VideoLike, fps: float | None = None, prepare: Prepare = lambda frame: frame) -> Clip:
        """The chosen frames and when they are seen. ``prepare`` makes of each frame what is kept of it, so that one
        frame at a time is in memory as large as it is.

        ``fps`` is the video's own rate; an animated image or video file says its own, which ``fps`` overrides. A
        video whose rate nobody says is taken to last as long as the bundle was compiled for. A longer video is
        sampled less often, with a warning once; a shorter one raises :class:`UserError`, as does what is no video.
        """
        if fps is not None and not 0 < fps < math.inf:
            raise UserError(f"a video of {fps:g} frames a second", fix="give the rate at which it was taken")
        if isinstance(video, (str, PathLike)) and str(video).lower().endswith(".npy"):
            video = _read_array(Path(video))
        if not isinstance(video, (list, tuple, np.ndarray)) and not (
            isinstance(video, (str, PathLike)) and os.path.isdir(video)
        ):
            return self._read_file(video, fps, prepare)
        frames, where = _list_frames(video)
        chosen = self.choose(len(frames), fps, where)
        kept = _Kept(prepare)
        for index in chosen:
            # One answer for all frames of an array, and for 1 or 3 channels only, as transformers reads a whole video.
            kept.add(
                index,
                self.reader.read_array(video[index], where, channels_first=video.shape[1] in (1, 3))
                if isinstance(video, np.ndarray)
                else self.reader(frames[index]),
            )
        return self._clip(kept, chosen, len(frames), fps)

    def _clip(self, kept: _Kept, chosen: Sequence[int], count: int, fps: float | None) -> Clip:
        rate = fps or count * self.fps / self.frames
        frames = [kept.frames[index] for index in chosen]
        return Clip(frames, [index / rate for index in chosen], kept.sizes[chosen[0]])

    def choose(self, count: int, fps: float | None, where: str | None = None) -> list[int]:
        """Indices of the chosen frames, increasing, of a video of ``count`` at ``fps`` a second (None: not known).

        The i-th of F is floor(i * count / F), or round(i * (count - 1) / (F - 1)) with ``ends``: the formulas of
        transformers' processors of Qwen2-VL and Qwen3-VL. Raises :class:`UserError` if the video ends before the
        time of the last compiled frame, or has fewer frames than were compiled.
        """
        # Frames that lie in the video at the compiled rate, the first at its start.
        fitting = count if fps is None else min(count, math.floor((count - 1) / fps * self.fps + 1e-6) + 1)
        if fitting < self.frames:
            advised = fitting - fitting % self.step
            length = "" if fps is None else f" at {fps:g} a second ({count / fps:.3g} s)"
            raise UserError(
                f"the video has {count} frame(s){length}, the bundle was compiled for {self.frames} at {self.fps:g} "
                f"a second ({self.frames / self.fps:.3g} s)",
                where=where,
                fix="give a longer video" + (f", or compile with --frames {advised}" if advised > 0 else ""),
            )
        if fps is not None and math.floor(count / fps * self.fps) > self.frames and not self._said:
            self._said.add("sampled less often")
            _log.warning(
                "a video of %.3g s is sampled at %.3g frames a second, the bundle was compiled for %g",
                count / fps, self.frames * fps / count, self.fps,
            )  # fmt: skip
        if self.ends:
            return [int(index) for index in np.linspace(0, count - 1, self.frames).round()]
        return [index * count // self.frames for index in range(self.frames)]

    def _read_file(self, video: object, fps: float | None, prepare: Prepare) -> Clip:
        file, where = open_source(video, kind="video", accepted=ACCEPTED)
        try:
            with Image.open(file, formats=_ANIMATED) as opened:
                self.reader.check_size(opened.size, where)
                count, own = _measure_animation(opened)
                rate, kept = fps or own, _Kept(prepare)
                chosen = self.choose(count, rate, where)
                for index in chosen:
                    opened.seek(index)
                    kept.add(index, self.reader.read_encoded(opened, where, frame=True))
                return self._clip(kept, chosen, count, rate)
        except UnidentifiedImageError:
            if not isinstance(file, str):
                file.seek(0)
            return self._read_container(file, where, fps, prepare)
        except UserError:
            raise
        except Exception as error:
            raise blame_decoder(error, where, "video") from None

    def _read_container(self, file: str | IO[bytes], where: str, fps: float | None, prepare: Prepare) -> Clip:
        try:
            import av
        except ImportError:
            raise UserError(
                "not a GIF, WebP or PNG; other video files are read by PyAV, which is not installed",
                where=where,
                fix="pip install av",
            ) from None
        kept = _Kept(prepare)
        try:
            with av.open(file, "r") as container:
                if not container.streams.video:
                    raise UserError("the file holds no video", where=where, fix="give a whole video file")
                stream = container.streams.video[0]
                self.reader.check_size((stream.width, stream.height), where, "a frame of the video has")
                own: Fraction | None = stream.average_rate
                rate = fps or (float(own) if own else None)
                # Some formats (Matroska, WebM) do not say it.
                count = int(stream.frames or sum(1 for _ in container.decode(stream)))
                chosen = self.choose(count, rate, where)
                container.seek(0)
                wanted = set(chosen)
                for index, frame in enumerate(container.decode(stream)):
                    if index in wanted:
                        self.reader.check_size((frame.width, frame.height), where, "a frame of the video has")
                        kept.add(index, frame.to_image())
                    if index >= chosen[-1]:
                        break
        except av.error.FFmpegError as error:
            what = f"not a video that Pillow or PyAV can read ({error.strerror})"
            raise UserError(what, where=where, fix="give a whole video file") from None
        if len(kept.frames) < len(wanted):
            what = f"the file ends before frame {chosen[-1]} of the {count} it announces"
            raise UserError(what, where=where, fix="give a whole video file")
        return self._clip(kept, chosen, count, rate)


class _Kept:
    """Frames that were read, by their index: what was made of them, and their height and width."""

    def __init__(self, prepare: Prepare) -> None:
        self.prepare = prepare
        self.frames: dict[int, Any] = {}
        self.sizes: dict[int, tuple[int, int]] = {}

    def add(self, index: int, frame: Image.Image) -> None:
        self.frames[index], self.sizes[index] = self.prepare(frame), (frame.height, frame.width)


def is_video(value: object) -> bool:
    """Whether the type is one that a :class:`FrameSampler` takes."""
    return is_image(value) or isinstance(value, (list, tuple))


def _read_array(path: Path) -> NDArray[np.uint8]:
    """An array that NumPy saved; its frames are read when they are looked at."""
    if not path.is_file():
        raise UserError("no such video file or directory", where=str(path))
    try:
        array: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"not an array that NumPy saved ({error})", where=str(path), fix="write it with numpy.save"
        ) from None
    return array


def _list_frames(video: VideoLike) -> tuple[Sequence[ImageLike], str | None]:
    """Frames that are not read yet, and the directory they are in."""
    if isinstance(video, np.ndarray):
        if video.dtype.kind not in "ui" or video.ndim != 4:
            raise UserError(
                f"an array of shape {list(video.shape)} and type {video.dtype} is not a video",
                fix="give uint8 [frames, height, width, 3]",
            )
        return list(video), None
    if isinstance(video, (str, PathLike)):
        files = [path for path in Path(video).iterdir() if path.suffix.lower() in _SUFFIXES and path.name[0] != "."]
        if not files:
            raise UserError("a directory without frames", where=str(video), available=_SUFFIXES)
        return sorted(files, key=_natural_order), str(video)
    if not isinstance(video, (list, tuple)):
        raise UserError(f"a {type(video).__name__} is not a video", fix=f"give {ACCEPTED}")
    for index, frame in enumerate(video):
        if not is_image(frame):
            raise UserError(f"a {type(frame).__name__} is not a frame", where=f"frame {index} of the video")
    return video, None


def _natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Numbers by their value: 2 before 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(1, int(part), part) if place % 2 else (0, 0, part) for place, part in enumerate(parts)]


def _measure_animation(opened: Image.Image) -> tuple[int, float | None]:
    """Frames of an animated image and their mean rate; None where it does not say how long they stand."""
    count, milliseconds = int(getattr(opened, "n_frames", 1)), 0.0
    for index in range(count):
        opened.seek(index)
        # Some formats know a frame's duration once it is decoded.
        opened.load()
        milliseconds += float(opened.info.get("duration") or 0)
    return count, 1000 * count / milliseconds if milliseconds > 0 else None
