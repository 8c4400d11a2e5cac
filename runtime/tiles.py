"""Images cut into tiles of high resolution, with the whole in small: what transformers' processors of LLaVA-NeXT and
LLaVA-OneVision make.

How many tiles an image has, and where padding lies in them, follows from its size. A bundle was compiled for one size:
an image with the same tiles and as many tokens in them is taken as it is, any other is fitted into that size first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secateur.runtime.errors import BundleError
from secateur.runtime.images import ImagePipeline, read_part
from secateur.runtime.pictures import MAX_PIXELS, ImageLike

_log = logging.getLogger(__name__)

Size: TypeAlias = "tuple[int, int]"
"""Height and width."""
_PINPOINTS = {
    "LlavaNext": [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)],
    "LlavaOnevision": [(384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7)],
}
"""The resolutions of processors whose files name none."""
_WHERE = "preprocessor_config.json"


@dataclass(frozen=True)
class TilePipeline:
    """One image to float32 [tiles, 3, edge, edge]: the whole in small first, then its tiles row by row."""

    view: ImagePipeline
    """What each tile goes through."""
    edge: int
    resolutions: tuple[Size, ...]
    size: Size
    """Of the image that the bundle was compiled for."""
    lines: int
    """Tokens along an edge of a tile."""
    _said: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], size: Size, tokens: int, max_pixels: int = MAX_PIXELS
    ) -> TilePipeline:
        """Read a ``preprocessor_config.json`` for images of ``size``, ``tokens`` to a tile."""
        view = ImagePipeline.from_config(config, max_pixels=max_pixels)
        edges = view.output_size or (view.size, view.size)
        values = read_part(config, "image_processor")
        kind = str(values.get("image_processor_type"))
        usual = _PINPOINTS["LlavaOnevision" if kind.startswith("LlavaOnevision") else "LlavaNext"]
        given = values.get("image_grid_pinpoints") or usual
        try:
            resolutions = tuple((int(height), int(width)) for height, width in given)
        except (TypeError, ValueError) as error:
            raise BundleError(f"image_grid_pinpoints: {error}", where=_WHERE) from None
        edge = edges[0]
        if edges[0] != edges[1] or not isinstance(edge, int) or any(n < 1 or n % edge for r in resolutions for n in r):
            raise BundleError(f"resolutions {resolutions} are not made of tiles of {edges[0]}x{edges[1]}", where=_WHERE)
        return cls(view, edge, resolutions, size, math.isqrt(tokens))

    @property
    def tiles(self) -> int:
        """How many an image has, the whole in small among them."""
        height, width = choose_resolution(self.size, self.resolutions)
        return 1 + height * width // self.edge**2

    def __call__(self, image: ImageLike) -> NDArray[np.float32]:
        rgb = self.view.reader(image)
        if self._layout((rgb.height, rgb.width)) != self._layout(self.size):
            self._tell((rgb.height, rgb.width))
            rgb = fit_image(rgb, self.size, self.view.resample)
        best = choose_resolution((rgb.height, rgb.width), self.resolutions)
        picture = fit_image(rgb, best, self.view.resample)
        views = [rgb.resize((self.edge, self.edge), resample=self.view.resample)]
        for top in range(0, best[0], self.edge):
            views += [
                picture.crop((left, top, left + self.edge, top + self.edge)) for left in range(0, best[1], self.edge)
            ]
        return np.stack([self.view(each) for each in views])

    def _layout(self, size: Size) -> tuple[Size, Size]:
        """The resolution of an image, and rows and columns of tokens without those of its padding."""
        best = choose_resolution(size, self.resolutions)
        return best, unpad(size, (best[0] // self.edge * self.lines, best[1] // self.edge * self.lines))

    def _tell(self, size: Size) -> None:
        if self._said:
            return
        self._said.add("fitted")
        _log.warning(
            "an image of %dx%d has other tiles than one of %dx%d, which the bundle was compiled for; it is fitted into "
            "that size with black edges",
            *size, *self.size,
        )  # fmt: skip


def choose_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution in which most pixels of an image stay, and of those the one with the least left empty.

    The image is fitted into a resolution (height, width) by one factor and counts no more pixels than it has; the
    first of equals wins. The rule is that of transformers' ``select_best_resolution``.
    """

    def rank(resolution: Size) -> tuple[int, int]:
        factor = min(resolution[1] / size[1], resolution[0] / size[0])
        used = min(int(size[1] * factor) * int(size[0] * factor), size[0] * size[1])
        return used, used - resolution[0] * resolution[1]

    return max(resolutions, key=rank)


def unpad(size: Size, grid: Size) -> Size:
    """Rows and columns of a ``grid`` of tokens that are left of an image of ``size``: as many are taken off one edge as
    off the other."""
    rows, columns = grid
    if size[1] / size[0] > columns / rows:
        inside = int(round(size[0] * (columns / size[1]), 7))
        return rows - (rows - inside) // 2 * 2, columns
    inside = int(round(size[1] * (rows / size[0]), 7))
    return rows, columns - (columns - inside) // 2 * 2


def fit_image(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """The image as large as fits into ``size``, in the middle; an odd pixel of black comes behind it."""
    height, width = size
    across, down = width / image.width, height / image.height
    if across < down:
        inner = (width, min(math.ceil(image.height * across), height))
    else:
        inner = (min(math.ceil(image.width * down), width), height)
    resized = image.resize(inner, resample=resample)
    if inner == (width, height):
        return resized
    whole = Image.new("RGB", (width, height))
    whole.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return whole
