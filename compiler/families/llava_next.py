"""LLaVA-NeXT (1.6) layout: LLaVA-1.5 that sees an image in tiles of high resolution.

An image is fitted into one of the resolutions ``image_grid_pinpoints``, cut into tiles of the tower's size, and shown
in small as a whole besides. Behind the projector the tokens of the tiles are put together to one picture, what was
padding at its edges is left out, and a row ``image_newline`` stands behind every line; the small view comes first. All
of that follows from the size of the image, which is fixed when a bundle is compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from secateur.compiler.families.family import (
    Tiles,
    VisionFacts,
    check_strategy,
    read_feature_layer,
    read_grid,
)
from secateur.compiler.families.llava import LLAVA
from secateur.compiler.geometry import Geometry
from secateur.runtime.errors import UserError


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    vision = config.vision_config
    where = f"{config.name_or_path}/config.json"
    layer = read_feature_layer(config, where, "LLaVA-NeXT uses -2")
    check_strategy(
        config, where, "default", "the 'full' strategy sends the CLS row to the decoder, which no recipe here expects"
    )
    for asked, option in ((geometry.frames, "--frames"), (geometry.audio_seconds, "--audio-seconds")):
        if asked:
            raise UserError(f"a {config.model_type} bundle takes images only", where=where, fix=f"leave {option} out")
    if geometry.sizes:
        raise UserError(
            f"a {config.model_type} bundle takes images of one size",
            where="--image-size",
            fix="give one for all of them",
        )
    grid = read_grid(config, where)
    # Without a size an image is as large as the largest resolution, of which it leaves nothing empty.
    size = geometry.one_size or max(map(tuple, config.image_grid_pinpoints), key=lambda s: (s[0] * s[1], s))
    down, across = _count_tiles(config, size, where)
    order = _order(grid[0], down, across, size)
    return VisionFacts(
        frames=geometry.images * (1 + down * across),
        image_size=(vision.image_size, vision.image_size),
        grid=grid,
        layers=vision.num_hidden_layers,
        feature_layer=layer,
        has_cls=True,
        extra_rows=order.count(-1),
        grids_per_item=1 + down * across,
        tiles=Tiles((size[0], size[1]), order),
    )


def _count_tiles(config: Any, size: tuple[int, ...], where: str) -> tuple[int, int]:
    """Tiles down and across of an image of ``size``."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    side = config.vision_config.image_size
    if wrong := [
        pair for pair in config.image_grid_pinpoints if len(pair) != 2 or any(n < 1 or n % side for n in pair)
    ]:
        raise UserError(
            f"image_grid_pinpoints has {list(wrong[0])}, which tiles of {side}x{side} do not fill", where=where,
            fix="give heights and widths that are multiples of vision_config.image_size",
        )  # fmt: skip
    down, across = get_anyres_image_grid_shape(tuple(size), config.image_grid_pinpoints, side)
    return int(down), int(across)


def _order(side: int, down: int, across: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """:attr:`Tiles.order` of grids of ``side`` by ``side`` tokens: the small view, then ``down`` by ``across``."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    first = side * side
    places = first + torch.arange(down * across * first).reshape(down, across, side, side)
    picture = places.transpose(1, 2).reshape(1, down * side, across * side)
    lines = unpad_image(picture, tuple(size))[0].tolist()
    return (*range(first), *(place for line in lines for place in (*line, -1)))


def _vision_forward(model: Any, pixel_values: Any, facts: VisionFacts, indices: Any) -> tuple[Any, Any]:
    inner, layer = model.model, model.config.vision_feature_layer
    outputs = inner.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    return inner.multi_modal_projector(outputs.hidden_states[layer][:, 1:]), outputs.last_hidden_state


LLAVA_NEXT = replace(
    LLAVA,
    name="llava_next",
    model_types=("llava_next",),
    read_vision=_read_vision,
    vision_forward=_vision_forward,
    extra_rows="model.image_newline",
)
