"""Images in tiles of high resolution, as LLaVA-NeXT and LLaVA-OneVision see them.

An image is fitted into one of the resolutions ``image_grid_pinpoints``, cut into tiles of the tower's size, and shown
in small as a whole besides. Behind the projector the tokens of the tiles are put together to one picture, what was
padding at its edges is left out, and a row ``image_newline`` stands behind every line; the small view comes first. All
of that follows from the size of the image, which is fixed when a bundle is compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from secateur.compiler.families.family import Tiles
from secateur.compiler.pooled import Picture
from secateur.runtime.errors import UserError


def count_tiles(config: Any, size: tuple[int, int], where: str) -> tuple[int, int]:
    """Tiles down and across of an image of ``size``, the small view left out.

    Raises UserError for resolutions that tiles of the tower's size do not fill.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    side = config.vision_config.image_size
    if wrong := [
        pair for pair in config.image_grid_pinpoints if len(pair) != 2 or any(n < 1 or n % side for n in pair)
    ]:
        raise UserError(
            f"image_grid_pinpoints has {list(wrong[0])}, which tiles of {side}x{side} do not fill", where=where,
            fix="give heights and widths that are multiples of vision_config.image_size",
        )  # fmt: skip
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    return int(down), int(across)


def list_lines(side: int, down: int, across: int, size: tuple[int, int]) -> list[list[int]]:
    """The picture that ``down`` by ``across`` tiles of ``side`` by ``side`` tokens make, without its padding: of every
    token of every line its place among the tokens of the small view and of the tiles, grid by grid.

    Raises UserError where nothing but padding would be left.
    """
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    first = side * side
    places = first + torch.arange(down * across * first).reshape(down, across, side, side)
    picture = places.transpose(1, 2).reshape(1, down * side, across * side)
    found: list[list[int]] = unpad_image(picture, size)[0].tolist()
    if not found:
        raise UserError(
            f"transformers would leave no line of an image of {size[0]}x{size[1]}",
            where="--image-size",
            fix="give a size that is less narrow",
        )
    return found


def lay_out(side: int, lines: list[list[int]], size: tuple[int, int], resized: tuple[int, int] | None = None) -> Tiles:
    """The small view of ``side`` by ``side`` tokens, then every line with a row behind it; the lines are those of a
    picture that is ``resized`` to so many rows and columns, where that is given."""
    if resized is not None:
        picture = Picture(tuple(p for line in lines for p in line), (len(lines), len(lines[0])), resized)
        (rows, columns), first = resized, side * side
        lines = [list(range(first + columns * row, first + columns * (row + 1))) for row in range(rows)]
        return replace(lay_out(side, lines, size), picture=picture)
    return Tiles(size, (*range(side * side), *(place for line in lines for place in (*line, -1))))
