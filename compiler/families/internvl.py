"""InternVL3 layout: InternViT tower with a CLS token, pixel shuffle, norm and two linears, Qwen2 decoder.

InternVL3.5-30B-A3B has a decoder with experts, Qwen3-MoE, in its place.
Behind the tower every two by two patches become one token of four times the width, and only then comes the projector:
what the decoder sees, and what stages count, are such units. An image is one tile, resized to the tower's square,
between the tokens ``<img>`` and ``</img>``; or, where the geometry has a size of images, the tiles and the thumbnail
that transformers makes of one of that size, one after the other between those two tokens. Videos are not supported.
"""

from __future__ import annotations

from typing import Any

from secateur.compiler.families.family import (
    Family,
    Split,
    VisionFacts,
    check_strategy,
    fixed_size,
    image_features,
    read_feature_layer,
    read_image_processor,
)
from secateur.compiler.geometry import Geometry
from secateur.runtime.errors import UserError

_ONE_TILE = (
    "transformers cuts an image into up to max_patches tiles and a thumbnail where crop_to_patches is set, as it is in "
    "its processor for this family; this bundle shows the model the whole image in one tile, as transformers itself "
    "does with max_patches 1; compile with --image-size for tiles"
)


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    vision = config.vision_config
    where = f"{config.name_or_path}/config.json"
    layer = read_feature_layer(config, where, "InternVL3 uses -1")
    check_strategy(config, where, "default", "with the 'full' strategy the CLS row would be shuffled among the patches")
    merge = _read_merge(config.downsample_ratio, where)
    side = _read_side(vision, merge, where)
    split = _read_split(config, geometry)
    return VisionFacts(
        frames=fixed_size(config, geometry, tiles=True) * (split.grids if split else 1),
        split=split,
        image_size=tuple(vision.image_size),
        grid=(side // merge, side // merge),
        merge=merge,
        layers=vision.num_hidden_layers,
        feature_layer=layer,
        has_cls=True,
        channels=vision.num_channels,
        every_image="" if split else _ONE_TILE,
    )


def _read_split(config: Any, geometry: Geometry) -> Split | None:
    """The tiles of an image of the geometry's size, the thumbnail among them."""
    if (size := geometry.one_size) is None:
        return None
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    told, tower = read_image_processor(config), config.vision_config.image_size
    asked: dict[str, Any] = {key: told[key] for key in ("min_patches", "max_patches") if told.get(key)}
    asked |= {"crop_to_patches": True, "patch_size": {"height": tower[0], "width": tower[1]}}
    grids = GotOcr2ImageProcessorPil().get_number_of_image_patches(*size, asked)
    return Split(size, int(grids))


def _read_merge(ratio: float, where: str) -> int:
    """How many patches a unit is wide: 2 for the ratio 0.5."""
    merge = round(1 / ratio) if 0 < ratio <= 1 else 0
    if not merge or abs(merge * ratio - 1) > 1e-9:
        raise UserError(
            f"downsample_ratio is {ratio!r}",
            where=where,
            fix="it is one divided by a whole number of patches; InternVL3 uses 0.5",
        )
    return merge


def _read_side(vision: Any, merge: int, where: str) -> int:
    """Patches along one side of the tower's image, which is a square that ``merge`` divides."""
    sizes = [*vision.image_size, *vision.patch_size]
    if len(sizes) != 4 or min(sizes) < 1:
        raise UserError(
            f"image_size {list(vision.image_size)} and patch_size {list(vision.patch_size)} are not two numbers each",
            where=where,
            fix="check vision_config; both are height and width in pixels",
        )
    rows, columns = sizes[0] // sizes[2], sizes[1] // sizes[3]
    if rows != columns or rows % merge or not rows:
        raise UserError(
            f"{rows}x{columns} patches cannot be put together in squares of {merge}x{merge}",
            where=where,
            fix="image_size must be as many patches high as wide, and downsample_ratio must divide them",
        )
    return int(rows)


def _vision_forward(model: Any, pixel_values: Any, facts: VisionFacts, indices: Any) -> tuple[Any, Any]:
    outputs = image_features(model, pixel_values)
    return outputs.pooler_output, outputs.last_hidden_state


INTERNVL = Family(
    name="internvl",
    model_types=("internvl",),
    decoder_types=("qwen2", "qwen3_moe"),
    vision_types=("internvl_vision",),
    decoder="model.language_model",
    decoder_layers="model.language_model.layers",
    vision_layers="model.vision_tower.encoder.layer",
    vision_attention="attention",
    projector="model.multi_modal_projector",
    vision_modules=("model.vision_tower", "model.multi_modal_projector"),
    embedding="model.language_model.embed_tokens",
    head="lm_head",
    read_vision=_read_vision,
    vision_forward=_vision_forward,
    image_marks=(("start_image_token",), ("end_image_token",)),
)
