"""Qwen2.5-VL layout: window attention in the tower, two by two patches to a token, M-RoPE, Qwen2 decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from secateur.compiler.families import qwen_vision
from secateur.compiler.families.family import VisionFacts
from secateur.compiler.families.qwen2_vl import QWEN2_VL
from secateur.compiler.geometry import Geometry
from secateur.compiler.media import MediaLayout


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    qwen_vision.refuse_sound(config, geometry)
    return qwen_vision.read_vision(config, geometry)


def _read_media(config: Any, geometry: Geometry, seen: VisionFacts, heard: VisionFacts | None) -> MediaLayout:
    vision = config.vision_config
    # Seconds from one temporal grid to the next, in the configuration's ticks, rounded down after the product.
    interval = vision.tokens_per_second * (vision.temporal_patch_size / geometry.fps)
    times = [int(grid * interval) for grid in range(seen.frames)]
    return qwen_vision.plain_media(config, geometry, seen, times, whole_span=False)


QWEN2_5_VL = replace(
    QWEN2_VL,
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    decoder_types=("qwen2_5_vl_text",),
    vision_types=("qwen2_5_vl_vision", "qwen2_5_vl"),
    read_vision=_read_vision,
    read_media=_read_media,
)
