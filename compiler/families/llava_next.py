"""LLaVA-NeXT (1.6) layout: LLaVA-1.5 that sees an image in tiles of high resolution (``families/tiled.py``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from secateur.compiler.families.family import VisionFacts, check_strategy, read_feature_layer, read_grid
from secateur.compiler.families.llava import LLAVA
from secateur.compiler.families.tiled import count_tiles, lay_out, list_lines
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
    largest = max(config.image_grid_pinpoints, key=lambda s: (s[0] * s[1], s))
    size = geometry.one_size or (largest[0], largest[1])
    down, across = count_tiles(config, size, where)
    tiles = lay_out(grid[0], list_lines(grid[0], down, across, size), size)
    return VisionFacts(
        frames=geometry.images * (1 + down * across),
        image_size=(vision.image_size, vision.image_size),
        grid=grid,
        layers=vision.num_hidden_layers,
        feature_layer=layer,
        has_cls=True,
        extra_rows=tiles.order.count(-1),
        grids_per_item=1 + down * across,
        tiles=tiles,
    )


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
