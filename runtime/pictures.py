"""Pictures of any source to RGB: files, bytes, ``data:`` URLs, Pillow pictures and arrays.

The colours are those of transformers: what is encoded goes the road of its ``load_image`` and then, as Pillow pictures
and arrays do at once, that of its ``convert_to_rgb``. Where the two lose something of a picture, a warning says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from os import PathLike, fspath
from os.path import isfile
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from secateur.runtime.errors import UserError
from secateur.runtime.sources import name_source, read_source

_log = logging.getLogger(__name__)

ImageLike: TypeAlias = "str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any]"

ACCEPTED = (
    "a path, a file object, a data: URL, the bytes of a file, a Pillow image, or a uint8 array [height, width, 3]"
)
MAX_PIXELS = 89_478_485
"""The bound at which Pillow itself begins to warn. RGB takes 4 bytes a pixel, twice that while it is turned or
converted: 0.7 GB."""
_STRIP = 1 << 20
"""Pixels that are laid on white at a time."""
_CHANNELS = (1, 3, 4)
_GREY = ("I", "F")
"""Modes, and beginnings of modes, of more than 8 bits."""


@dataclass(frozen=True)
class PictureReader:
    """Opens pictures: a call takes any :data:`ImageLike` and returns a Pillow picture in RGB."""

    convert: bool = True
    """``do_convert_rgb`` of transformers' processors. Without it colours that are transparent in a file are shown, and
    three channels of a Pillow picture of another mode are taken for RGB."""
    max_pixels: int = MAX_PIXELS
    """The most pixels a picture may have, looked at before it is decoded."""
    _said: set[str] = field(default_factory=set, compare=False, repr=False)

    def __call__(self, source: ImageLike, where: str | None = None) -> Image.Image:
        """``where`` is put before an error's text instead of the file's path.

        Raises :class:`UserError` for what is no picture, cannot be decoded to its end, or has too many pixels. The
        picture may be ``source`` itself: it is not to be changed.
        """
        if isinstance(source, Image.Image):
            return self._read(source, where)
        if isinstance(source, np.ndarray):
            return self.read_array(source, where)
        file, where = open_source(source, where)
        try:
            # Of a path Pillow would map the file into memory, and then shows some turned TIFFs askew.
            with (
                open(file, "rb") if isinstance(file, str) else nullcontext(file) as stream,
                Image.open(stream) as opened,
            ):
                return self.read_encoded(opened, where)
        except UserError:
            raise
        except Exception as error:
            raise blame_decoder(error, where) from None

    def read_encoded(self, opened: Image.Image, where: str | None = None, frame: bool = False) -> Image.Image:
        """What ``Image.open`` found in a file, turned upright by its EXIF tag; ``frame`` leaves ``opened`` as it is.

        Raises whatever Pillow's decoder does.
        """
        self.check_size(opened.size, where)
        opened.load()
        if frame:
            opened = opened.copy()
        ImageOps.exif_transpose(opened, in_place=True)
        self._tell_of_depth(opened)
        # Pillow drops several levels of a palette's transparency, with a warning of its own.
        levels = isinstance(opened.info.get("transparency"), bytes) and opened.info.pop("transparency")
        if levels or ("A" in opened.getbands() and opened.getchannel("A").getextrema() != (255, 255)):
            self._tell(
                "a file's levels of transparency are dropped, as transformers does; on white as a Pillow picture"
            )
        rgb = _to_rgb(opened, where)
        if self.convert and _has_alpha(rgb):
            # Nobody else has the picture: it becomes its own background.
            _on_white(rgb, rgb)
            del rgb.info["transparency"]
        return rgb

    def read_array(
        self, array: NDArray[Any], where: str | None = None, channels_first: bool | None = None
    ) -> Image.Image:
        """Whole levels 0 to 255 ``[H, W]``, or with 1, 3 or 4 channels behind or before; of 4 the last is opacity.

        Without ``channels_first`` the shape says which, and before wins, as in transformers.
        """
        shape = f"an array of shape {list(array.shape)} and type {array.dtype}"
        before, behind = (
            (n in _CHANNELS for n in (array.shape[0], array.shape[-1])) if array.ndim == 3 else (False, True)
        )
        if channels_first is None and before and behind:
            self._tell(f"{shape} may have its channels first or last; they are taken to be first")
        first = before if channels_first is None else channels_first
        fits = array.ndim == 2 or (array.ndim == 3 and (before if first else behind))
        if array.dtype.kind not in "ui" or array.size == 0 or not fits:
            scale = "; levels from 0 to 1: (255 * array).round().astype(np.uint8)" if array.dtype.kind == "f" else ""
            raise UserError(f"{shape} is not an image", where=where, fix=f"give uint8 [height, width, 3]{scale}")
        if array.ndim == 3 and first:
            array = np.moveaxis(array, 0, -1)
        self.check_size((array.shape[1], array.shape[0]), where)
        if array.dtype != np.uint8:
            least, most = int(array.min()), int(array.max())
            if least < 0 or most > 255:
                raise UserError(
                    f"{shape} holds {least} to {most}",
                    where=where,
                    fix="give levels 0 to 255; of 16 bits, array // 257",
                )
            array = array.astype(np.uint8)
        if array.ndim == 3 and array.shape[2] == 4:
            array = _array_on_white(array)
        grey = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
        return Image.fromarray(np.ascontiguousarray(grey)).convert("RGB")

    def check_size(self, size: tuple[int, int], where: str | None = None, what: str = "the picture has") -> None:
        """Raises :class:`UserError` for a width and height without pixels, or with more than ``max_pixels``."""
        width, height = size
        if min(width, height) < 1:
            raise UserError(f"an image of {width}x{height} pixels has nothing in it", where=where)
        if width * height > self.max_pixels:
            raise UserError(
                f"{what} {width}x{height} = {width * height / 1e6:.3g} million pixels, the bound is "
                f"{self.max_pixels / 1e6:.3g} million",
                where=where,
                fix="make it smaller, or raise max_image_pixels (--max-image-pixels): a pixel takes 4 to 8 bytes",
            )  # fmt: skip

    def _read(self, picture: Image.Image, where: str | None) -> Image.Image:
        """A Pillow picture as transformers' processors take it: as it lies, on white."""
        self.check_size(picture.size, where)
        try:
            picture.load()
            self._tell_of_depth(picture)
            if "exif" in picture.info and _orientation(picture) != 1:
                self._tell(
                    "a Pillow picture is not turned by its EXIF tag, as in transformers; ImageOps.exif_transpose"
                )
            if not self.convert and picture.mode in ("YCbCr", "LAB", "HSV"):
                return Image.fromarray(np.asarray(picture))
            if _has_alpha(picture) and (self.convert or picture.mode != "RGB"):
                return _on_white(picture, Image.new("RGB", picture.size))
            return _to_rgb(picture, where)
        except UserError:
            raise
        except Exception as error:
            raise blame_decoder(error, where or "a Pillow picture") from None

    def _tell_of_depth(self, picture: Image.Image) -> None:
        if not picture.mode.startswith(_GREY):
            return
        levels = np.asarray(picture)
        least, most = float(levels.min()), float(levels.max())
        if least < 0 or most > 255:
            self._tell(
                f"levels {least:g} to {most:g} of a grey picture are cut to 0 to 255, as transformers does: scale it"
            )
        elif picture.mode == "F" and 0 < most <= 1:
            self._tell(
                f"levels {least:g} to {most:g} of a grey picture are shown black, as transformers does: scale it"
            )

    def _tell(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _log.warning("%s", what)


def open_picture(source: ImageLike, where: str | None = None) -> Image.Image:
    """A picture in RGB from any source, as transformers would show it to a model; see :class:`PictureReader`."""
    return PictureReader()(source, where)


def is_image(value: object) -> bool:
    """Whether the type is one that :func:`open_picture` takes."""
    kinds = (str, PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
    return isinstance(value, kinds) or callable(getattr(value, "read", None))


def measure_picture(source: ImageLike) -> tuple[int, int] | None:
    """Height and width that :func:`open_picture` would give, without decoding; None for what it would refuse."""
    try:
        if isinstance(source, Image.Image):
            return source.height, source.width
        if isinstance(source, np.ndarray):
            shape = source.shape[1:] if source.ndim == 3 and source.shape[0] in _CHANNELS else source.shape
            return int(shape[0]), int(shape[1])
        with Image.open(open_source(source)[0]) as opened:
            width, height = opened.size
            if isinstance(opened, TiffImageFile):
                # Some releases of Pillow have turned it already.
                width, height = (opened.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
            return (width, height) if _orientation(opened) in (5, 6, 7, 8) else (height, width)
    except Exception:
        return None


def open_source(
    source: object, where: str | None = None, kind: str = "image", accepted: str = ACCEPTED
) -> tuple[str | IO[bytes], str]:
    """A path or a file object, and how errors name it; raises :class:`UserError` for what holds no file."""
    where = where or name_source(source)
    found = read_source(source, kind, where)
    name = where or "a file object"
    if isinstance(found, bytes):
        return BytesIO(found), name
    if isinstance(found, (str, PathLike)):
        path = fspath(found)
        if not isfile(path):
            raise UserError(f"no such {kind} file" + " or directory" * (kind == "video"), where=name)
        return path, name
    if not callable(getattr(found, "read", None)):
        what = "a video" if kind == "video" else "an image"
        raise UserError(f"a {type(found).__name__} is not {what}", where=where, fix=f"give {accepted}")
    if isinstance(found.read(0), str):
        raise UserError("a file object of text", where=name, fix="open the file with mode 'rb'")
    return found, name


def blame_decoder(error: Exception, where: str | None, what: str = "image") -> UserError:
    """What a decoder's error means. Decoders raise nearly everything for files that are cut short or wrong."""
    if isinstance(error, UnidentifiedImageError):
        return UserError(f"not an {what} Pillow can read", where=where, fix="give a PNG or JPEG file")
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return UserError(str(error), where=where, fix="make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS")
    if isinstance(error, MemoryError):
        return UserError(f"the {what} does not fit into memory", where=where, fix="make it smaller")
    return UserError(
        f"the {what} is corrupt ({error or type(error).__name__})", where=where, fix=f"give a whole {what} file"
    )


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none that means anything."""
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser raises many kinds of errors; a tag that cannot be read turns nothing
        return 1
    return found if found in range(2, 9) else 1


def _to_rgb(picture: Image.Image, where: str | None) -> Image.Image:
    try:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except ValueError as error:
        raise UserError(str(error), where=where, fix="give a picture in RGB, L or RGBA") from None


def _has_alpha(picture: Image.Image) -> bool:
    return "A" in picture.getbands() or picture.info.get("transparency") is not None


def _on_white(picture: Image.Image, rgb: Image.Image) -> Image.Image:
    """``rgb`` with the picture laid on white in it."""
    for box in _strips(*picture.size):
        above = picture.crop(box).convert("RGBA")
        white = Image.new("RGBA", above.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, above).convert("RGB"), box)
    return rgb


def _array_on_white(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [H, W, 4] to [H, W, 3]: opacity * colour + (1 - opacity) * 255 in float64, rounded, as transformers."""
    opacity = (np.arange(256) / 255)[:, None]
    table = np.round(opacity * np.arange(256) + (1 - opacity) * 255).astype(np.uint8)
    return np.asarray(table[array[:, :, 3:], array[:, :, :3]])


def _strips(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _STRIP // width)
    for strip in range(math.ceil(height / rows)):
        yield 0, strip * rows, width, min(height, (strip + 1) * rows)
