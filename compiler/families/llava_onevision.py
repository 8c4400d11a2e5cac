"""LLaVA-OneVision layout: SigLIP tower without a CLS token, two-layer projector, Qwen2 decoder.

An image is its base view: padded to a square, resized to the tower's size, all its patches, then the row
``image_newline``. That is how transformers treats every image of a prompt with several. One that is alone in its prompt
it shows in tiles (``families/tiled.py``); here that is done for an image whose size is given.

A video is frames of the tower's size. Behind the projector the grid of each is resized to half its height and width,
rounded up, and one row ``image_newline`` stands behind all of them. Its position ids count on like those of images.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from secateur.compiler.families.family import (
    Family,
    VisionFacts,
    check_strategy,
    fixed_size,
    read_feature_layer,
    read_grid,
)
from secateur.compiler.families.tiled import count_tiles, lay_out, list_lines
from secateur.compiler.geometry import Geometry
from secateur.compiler.pooled import Pooled, bilinear_weights
from secateur.runtime.errors import UserError

_SLACK = 1.1
"""By how much the edges of a picture may exceed those of as many tokens as tiles are allowed before it is resized."""


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    vision = config.vision_config
    where = f"{config.name_or_path}/config.json"
    if geometry.image_size is not None and geometry.images > 1:
        raise UserError(
            f"transformers makes tiles of a {config.model_type} image that is alone in its prompt only, and shows the "
            f"model one view of each of {geometry.images}",
            where="--image-size",
            fix="leave it out, or compile for one image per row",
        )
    layer = read_feature_layer(config, where, "LLaVA-OneVision uses -1")
    check_strategy(
        config,
        where,
        "full",
        "the 'default' strategy drops the first row, which is a patch in a tower without a CLS token",
    )
    grid = read_grid(config, where)
    facts = VisionFacts(
        frames=fixed_size(config, geometry, videos=True, tiles=not geometry.frames),
        image_size=(vision.image_size, vision.image_size),
        grid=grid,
        layers=vision.num_hidden_layers,
        feature_layer=layer,
        has_cls=False,
        extra_rows=1,
        single_image="transformers cuts an image that is alone in its prompt into tiles of high resolution; this "
        "bundle shows the model the padded whole only, as transformers itself does with two images or more; compile "
        "with --image-size HEIGHTxWIDTH for the tiles of an image of that size",
    )
    if geometry.image_size is not None:
        return _tile(config, geometry, facts, where)
    if not geometry.frames:
        return facts
    half = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
    return replace(facts, grid=half, merge=Pooled(grid), grids_per_item=geometry.frames, single_image="")


def _tile(config: Any, geometry: Geometry, facts: VisionFacts, where: str) -> VisionFacts:
    """The facts of an image in tiles: ``facts`` are those of a grid."""
    size = geometry.one_size
    assert size is not None, "one image has one size"
    side, most = facts.grid[0], _most_tiles(config, where)
    down, across = count_tiles(config, size, where)
    lines = list_lines(side, down, across, size)
    rows, columns = len(lines), len(lines[0])
    excess = math.sqrt(rows * columns / (most * side**2))
    resized = (int(rows // excess), int(columns // excess)) if excess > _SLACK else None
    if resized is not None and 0 in resized:
        raise UserError(
            f"of an image of {size[0]}x{size[1]} transformers would leave {resized[0]} lines of {resized[1]} tokens",
            where="--image-size",
            fix="give a size that is less narrow",
        )
    tiles = lay_out(side, lines, size, resized)
    grids = 1 + down * across
    return replace(
        facts, frames=grids, grids_per_item=grids, extra_rows=tiles.order.count(-1), tiles=tiles, single_image=""
    )


def _most_tiles(config: Any, where: str) -> int:
    """How many tiles' worth of tokens a picture may have, the small view left out: 9 of "anyres_max_9"."""
    mode, _, most = str(config.vision_aspect_ratio).rpartition("_")
    if mode != "anyres_max" or not most.isdecimal() or int(most) < 1:
        raise UserError(
            f"vision_aspect_ratio is {config.vision_aspect_ratio!r}", where=where, available=["anyres_max_<tiles>"]
        )
    return int(most)


def _vision_forward(model: Any, pixel_values: Any, facts: VisionFacts, indices: Any) -> tuple[Any, Any]:
    inner, layer = model.model, model.config.vision_feature_layer
    outputs = inner.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    # The last of the hidden states is what leaves the last layer, before the norm behind it.
    features = inner.multi_modal_projector(outputs.hidden_states[layer])
    if (sizes := _resizing(facts)) is not None and facts.tiles is None:
        features = _resize(features, *sizes, indices)
    elif sizes is not None:
        import torch

        first = facts.tokens_per_image
        grids = features.reshape(-1, facts.grids_per_item, *features.shape[1:])
        picture = grids.flatten(1, 2).index_select(1, indices["places"])
        features = torch.cat((grids[:, 0, :first], _resize(picture, *sizes, indices)), 1)
    return features, outputs.last_hidden_state


def _resizing(facts: VisionFacts) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Rows and columns before and after what leaves the projector is resized; None where it is not."""
    if isinstance(facts.merge, Pooled):
        return facts.merge.grid, facts.grid
    picture = None if facts.tiles is None else facts.tiles.picture
    return None if picture is None else (picture.before, picture.after)


def _resize(features: Any, before: tuple[int, int], after: tuple[int, int], weights: Any) -> Any:
    """``[M,P,D]`` -> ``[M,N,D]``: bilinear in rows, then in columns."""
    (rows, columns), (left, narrow) = before, after
    grids, _, width = features.shape
    down, across = (weights[name].to(features.dtype) for name in ("down", "across"))
    halved = down.matmul(features.reshape(grids, rows, columns * width))
    return across.matmul(halved.reshape(grids * left, columns, width)).reshape(grids, left * narrow, width)


def _vision_indices(config: Any, facts: VisionFacts, batch: int) -> dict[str, Any]:
    import torch

    if (sizes := _resizing(facts)) is None:
        return {}
    made = {
        name: torch.tensor(bilinear_weights(before, after))
        for name, before, after in zip(("down", "across"), *sizes, strict=True)
    }
    if facts.tiles is not None and facts.tiles.picture is not None:
        made["places"] = torch.tensor(facts.tiles.picture.places)
    return made


def _vision_reference(model: Any, pixel_values: Any, facts: VisionFacts) -> tuple[Any, ...]:
    """Features of a video's frames, or of an image whose picture is resized, ``[F,N,D]``, without the rows behind them,
    and no planes."""
    config = model.config
    if facts.tiles is not None:
        import torch

        image = model.model.get_image_features(
            pixel_values[None], torch.tensor([facts.tiles.image_size]),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            vision_aspect_ratio=config.vision_aspect_ratio, return_dict=True,
        ).pooler_output[0]  # fmt: skip
        return (image[[place >= 0 for place in facts.tiles.order]][None],)
    video = model.model.get_video_features(
        pixel_values[None], vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy, return_dict=True,
    ).pooler_output  # fmt: skip
    # After them transformers 5.20 puts the row that ends a video; before, the model puts it there later.
    return (video[0, : facts.frames * facts.tokens_per_image].reshape(facts.frames, facts.tokens_per_image, -1),)


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    decoder_types=("qwen2",),
    vision_types=("siglip_vision_model",),
    decoder="model.language_model",
    decoder_layers="model.language_model.layers",
    vision_layers="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision_modules=("model.vision_tower", "model.multi_modal_projector"),
    embedding="model.language_model.embed_tokens",
    head="lm_head",
    read_vision=_read_vision,
    vision_forward=_vision_forward,
    vision_indices=_vision_indices,
    vision_reference=_vision_reference,
    extra_rows="model.image_newline",
)
