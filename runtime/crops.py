"""Images cut into tiles that stay apart, the whole in small behind them, as transformers' processors cut them.

How many tiles an image has follows from its size. A bundle was compiled for one size: an image that is cut into as many
rows and columns is taken as it is, any other is fitted into that size first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import BundleError
from secateur.runtime.images import ImagePipeline, fit_longest, read_part
from secateur.runtime.pictures import MAX_PIXELS, ImageLike
from secateur.runtime.tiles import Size, fit_image

_log = logging.getLogger(__name__)

_WHERE = "preprocessor_config.json"
_LEAST, _MOST = 1, 12


@dataclass(frozen=True)
class WholeTiles:
    """(height, width of an image) -> those of the whole tiles it is stretched to, its longer edge first made
    ``longest``; None leaves it as it is."""

    edge: int
    longest: int | None

    def __call__(self, image: Size) -> Size:
        across, down = (image[1], image[0]) if self.longest is None else fit_longest(image[1], image[0], self.longest)
        return fill_tiles((down, across), self.edge)


@dataclass(frozen=True)
class NearestGrid:
    """(height, width of an image) -> those of the ``least`` to ``most`` tiles whose shape is nearest to its own."""

    tile: Size
    least: int
    most: int

    def __call__(self, image: Size) -> Size:
        rows, columns = choose_grid(image, self.tile, self.least, self.most)
        return rows * self.tile[0], columns * self.tile[1]


@dataclass(frozen=True)
class CropPipeline:
    """One image to float32 [tiles, 3, height, width]: its tiles row by row, and behind several of them the whole."""

    view: ImagePipeline
    """What each tile goes through."""
    edges: Size
    canvas: WholeTiles | NearestGrid
    """(height, width of an image) -> height and width it is resized to before it is cut."""
    size: Size
    """Of the image that the bundle was compiled for."""
    longest: int | None = None
    """Length of the longer edge that an image is brought to first of all; None: it is not."""
    whole_of_canvas: bool = False
    """Whether the whole is made of the image that is cut, and not of the given one."""
    _said: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: Size, max_pixels: int = MAX_PIXELS) -> CropPipeline:
        """Read a ``preprocessor_config.json``, of a SmolVLM2 or an InternVL3, for images of ``size``."""
        view = ImagePipeline.from_config(config, max_pixels=max_pixels)
        edges = view.output_size
        values = read_part(config, "image_processor")
        if edges is not None and "SmolVLM" in str(values.get("image_processor_type")):
            stretched = WholeTiles(edges[0], view.longest)
            return cls(replace(view, longest=None), edges, stretched, size, view.longest, True)
        least, most = (values.get(key) or usual for key, usual in (("min_patches", _LEAST), ("max_patches", _MOST)))
        if edges is None or not all(isinstance(n, int) and n >= 1 for n in (least, most)) or least > most:
            raise BundleError(f"min_patches {least!r} and max_patches {most!r} do not say how to cut", where=_WHERE)
        return cls(view, edges, NearestGrid(edges, least, most), size)

    @property
    def tiles(self) -> int:
        """How many an image has, the whole in small among them."""
        height, width = self.canvas(self.size)
        count = height // self.edges[0] * (width // self.edges[1])
        return count + (count > 1)

    def __call__(self, image: ImageLike) -> NDArray[np.float32]:
        rgb = self.view.reader(image)
        wanted = self.canvas(self.size)
        if self.canvas((rgb.height, rgb.width)) != wanted:
            self._tell((rgb.height, rgb.width))
            rgb = fit_image(rgb, self.size, self.view.resample)
        if self.longest is not None:
            rgb = rgb.resize(fit_longest(rgb.width, rgb.height, self.longest), resample=self.view.resample)
        height, width = self.edges
        whole = rgb.resize((wanted[1], wanted[0]), resample=self.view.resample)
        views = [
            whole.crop((left, top, left + width, top + height))
            for top in range(0, wanted[0], height)
            for left in range(0, wanted[1], width)
        ]
        if len(views) > 1:
            views.append(whole if self.whole_of_canvas else rgb)
        return np.stack([self.view(each) for each in views])

    def _tell(self, size: Size) -> None:
        if self._said:
            return
        self._said.add("fitted")
        _log.warning(
            "an image of %dx%d has other tiles than one of %dx%d, which the bundle was compiled for; it is fitted into "
            "that size with black edges",
            *size, *self.size,
        )  # fmt: skip


def fill_tiles(size: Size, edge: int) -> Size:
    """Height and width of whole tiles that an image is stretched to: the longer edge is rounded up first, then what the
    shorter one is beside it. The rule is that of transformers' ``resize_for_vision_encoder`` of SmolVLM."""
    height, width = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / edge) * edge
        return math.ceil(int(width / ratio) / edge) * edge, width
    height = math.ceil(height / edge) * edge
    return height, math.ceil(int(height * ratio) / edge) * edge


def choose_grid(size: Size, tile: Size, least: int, most: int) -> Size:
    """Rows and columns, ``least`` to ``most`` tiles in all, of the shape nearest to that of an image (height, width).

    Ratios are compared as they are, width by height. Of equal ones the larger wins while the image has more than half
    as many pixels as its tiles. The rule is that of transformers' ``get_optimal_tiled_canvas``.
    """
    shapes = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= rows * columns <= most
    ]
    best, nearest = (1, 1), math.inf
    for rows, columns in sorted(shapes, key=math.prod):
        away = abs(size[1] / size[0] - columns / rows)
        if away < nearest or (away == nearest and math.prod(size) > 0.5 * math.prod(tile) * rows * columns):
            best, nearest = (rows, columns), away
    return best
