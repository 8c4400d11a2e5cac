"""Qwen3-VL layout: learned positions resampled to the image, features of inner tower layers behind the first decoder
layers (DeepStack), M-RoPE with interleaved axes, Qwen3 decoder with normed queries and keys.

Every grid of a video stands in the prompt as an item of its own, behind a text that says when it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from secateur.compiler.families import qwen_vision
from secateur.compiler.families.family import VisionFacts
from secateur.compiler.families.qwen2_vl import QWEN2_VL
from secateur.compiler.geometry import Geometry
from secateur.compiler.media import Item, MediaLayout, grid_axes
from secateur.runtime.errors import UserError

TIMESTAMP = "<{:.1f} seconds>"


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    qwen_vision.refuse_sound(config, geometry)
    return read_vision(config, geometry)


def read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    """Facts of a tower of which inner layers have features of their own."""
    facts = qwen_vision.read_vision(config, geometry)
    inner = list(config.vision_config.deepstack_visual_indexes)
    most = min(facts.layers, config.text_config.num_hidden_layers)
    if len(set(inner)) != len(inner) or len(inner) > most or not all(0 <= layer < facts.layers for layer in inner):
        raise UserError(
            f"deepstack_visual_indexes are {inner}", where=f"{config.name_or_path}/config.json",
            fix=f"they are up to {most} different layers of a tower of {facts.layers}",
        )  # fmt: skip
    sizes = tuple(replace(size, deepstack=len(inner)) for size in facts.sizes)
    return replace(facts, deepstack=len(inner), sizes=sizes)


def vision_indices(config: Any, facts: VisionFacts, rows: int) -> Mapping[str, Any]:
    """Those of all towers of Qwen, and where each patch's position lies among the learned ones."""
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    vision = config.vision_config
    merge = int(vision.spatial_merge_size)
    grids = torch.tensor(qwen_vision.list_grids(facts, merge) * rows)
    places, weights = get_vision_interpolation_indices_and_weights(
        grids, num_grid_per_side=int(vision.num_position_embeddings**0.5), mode="bilinear", align_corners=True,
        spatial_merge_size=merge,
    )  # fmt: skip
    return qwen_vision.vision_indices(config, facts, rows) | {"interp_indices": places, "interp_weights": weights}


def _read_media(config: Any, geometry: Geometry, seen: VisionFacts, heard: VisionFacts | None) -> MediaLayout:
    plain = qwen_vision.plain_media(config, geometry, seen, range(seen.frames), whole_span=False)
    if not geometry.frames:
        return plain
    side = max(seen.grid)
    item = Item("video", seen.tokens_per_image, side, side)
    offsets = tuple(grid_axes([0], *seen.grid) * seen.frames)
    return replace(plain, items=(item,) * seen.frames, offsets=offsets, timestamp=TIMESTAMP)


QWEN3_VL = replace(
    QWEN2_VL,
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    decoder_types=("qwen3_vl_text",),
    vision_types=("qwen3_vl_vision",),
    read_vision=_read_vision,
    vision_indices=vision_indices,
    read_media=_read_media,
)

QWEN3_VL_MOE = replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    model_types=("qwen3_vl_moe",),
    decoder_types=("qwen3_vl_moe_text",),
    vision_types=("qwen3_vl_moe_vision",),
)
