"""Whether this machine makes the pixels that a bundle's own machine made: Pillow's releases resize differently.

Pictures of noise, made anew where they are needed, go through the bundle's image processor. The manifest holds the
digest of all levels that came out, and some of the levels, by which a difference can be measured.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from secateur.runtime.errors import UserError
from secateur.runtime.row_media import RowMedia
from secateur.runtime.schema import Manifest, PixelProbe
from secateur.runtime.schema_fields import PROBE_LEVELS
from secateur.runtime.tower_inputs import open_tower_inputs

_log = logging.getLogger(__name__)

_SIZES = ((50, 900), (180, 320), (320, 180), (97, 61))
"""Width and height: the order of Pillow's two passes may depend on the shape, and on what it becomes."""


class PixelDifference(NamedTuple):
    """``pillow`` made the bundle's pixels, ``here`` is this machine's. ``largest`` of 255 levels, and the ``share`` of
    levels that differ, are of those the manifest holds; 0 where only others differ."""

    pillow: str
    here: str
    largest: int
    share: float

    def __str__(self) -> str:
        return (
            f"Pillow {self.here} makes other pixels than Pillow {self.pillow}, with which the bundle was made: "
            f"up to {self.largest} of 255 levels apart, {self.share:.0%} of them different; for the same pixels: "
            f"pip install pillow=={self.pillow}"
        )

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


def probe_pixels(directory: Path, manifest: Manifest) -> PixelProbe | None:
    """What the processor files in ``directory`` make of the pictures for one row of a geometry; None where they refuse
    them, because they do not resize."""
    try:
        levels = _make_levels(directory, manifest)
    except UserError as error:
        _log.debug("pixels cannot be compared: %s", error)
        return None
    some = base64.b64encode(_choose(levels).tobytes()).decode()
    return PixelProbe(pillow=PIL.__version__, sha256=hashlib.sha256(levels.tobytes()).hexdigest(), levels=some)


def compare_pixels(directory: Path, manifest: Manifest) -> PixelDifference | None:
    """How this machine's pixels differ from the manifest's, for one geometry; None where they do not, or where the
    manifest says nothing of them."""
    then, now = manifest.pixels, probe_pixels(directory, manifest) if manifest.pixels else None
    if then is None or now is None or then.sha256 == now.sha256:
        return None
    before, after = (np.frombuffer(base64.b64decode(each.levels), np.uint8) for each in (then, now))
    return PixelDifference(then.pillow, now.pillow, *find_largest(before, after))


def find_largest(before: NDArray[Any], after: NDArray[Any]) -> tuple[int, float]:
    """Of levels: how far two of one place are apart at most, and the share of places where they differ."""
    away = np.abs(before.astype(int) - after.astype(int))
    return int(away.max()), float((away > 0).mean())


def find_difference(directory: Path, manifest: Manifest) -> PixelDifference | None:
    """The largest of all geometries."""
    found = [compare_pixels(directory, one) for one in manifest.each_variant()]
    return max((each for each in found if each), key=lambda each: each.largest, default=None)


def warn_of_pixels(directory: Path, manifest: Manifest) -> None:
    """One warning if another release of Pillow makes other pixels. Of the same release nothing is computed."""
    if manifest.pixels is None or manifest.pixels.pillow == PIL.__version__:
        return
    if found := find_difference(directory, manifest):
        _log.warning("%s", found)


def _make_levels(directory: Path, manifest: Manifest) -> NDArray[np.uint8]:
    inputs, sizes = open_tower_inputs(directory, manifest).unnormalized(), manifest.geometry
    made = []
    for width, height in _SIZES:
        picture = Image.frombytes("RGB", (width, height), hashlib.shake_256(b"probe").digest(3 * width * height))
        media = RowMedia(videos=[[picture] * sizes.frames]) if sizes.frames else RowMedia([picture] * sizes.images)
        made.append(inputs(media).pixel_values.astype(np.uint8).ravel())
    return np.concatenate(made)


def _choose(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``PROBE_LEVELS`` of them, at places that follow from their number alone."""
    seed = np.frombuffer(hashlib.shake_256(b"places").digest(8 * PROBE_LEVELS), "<u8")
    return levels[(seed % np.uint64(len(levels))).astype(np.int64)]
