"""Qwen2-VL layout: whole attention in a tower with layer norms, two by two patches to a token, M-RoPE, Qwen2 decoder.

The grids of a video follow each other one position apart, whatever its rate.
"""

from __future__ import annotations

from typing import Any

from secateur.compiler.families import qwen_vision
from secateur.compiler.families.family import Family, VisionFacts
from secateur.compiler.geometry import Geometry
from secateur.compiler.media import MediaLayout


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    qwen_vision.refuse_sound(config, geometry)
    return qwen_vision.read_vision(config, geometry)


def _read_media(config: Any, geometry: Geometry, seen: VisionFacts, heard: VisionFacts | None) -> MediaLayout:
    return qwen_vision.plain_media(config, geometry, seen, range(seen.frames), whole_span=False)


QWEN2_VL = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    decoder_types=("qwen2_vl_text",),
    vision_types=("qwen2_vl_vision",),
    decoder="model.language_model",
    decoder_layers="model.language_model.layers",
    vision_layers="model.visual.blocks",
    vision_attention="attn",
    projector="model.visual.merger",
    vision_modules=("model.visual",),
    embedding="model.language_model.embed_tokens",
    head="lm_head",
    read_vision=_read_vision,
    vision_forward=qwen_vision.vision_forward,
    vision_indices=qwen_vision.vision_indices,
    vision_reference=qwen_vision.reference_forward,
    read_media=_read_media,
    reference_positions=qwen_vision.reference_positions,
)
