"""LLaVA-1.5 layout: CLIP tower, two-layer projector, Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

from typing import Any

from secateur.compiler.families.family import (
    Family,
    VisionFacts,
    check_strategy,
    fixed_size,
    image_features,
    read_feature_layer,
    read_grid,
)
from secateur.compiler.geometry import Geometry


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    vision = config.vision_config
    where = f"{config.name_or_path}/config.json"
    layer = read_feature_layer(config, where, "LLaVA-1.5 uses -2")
    check_strategy(
        config, where, "default", "the 'full' strategy sends the CLS row to the decoder, which no recipe here expects"
    )
    return VisionFacts(
        frames=fixed_size(config, geometry),
        image_size=(vision.image_size, vision.image_size),
        grid=read_grid(config, where),
        layers=vision.num_hidden_layers,
        feature_layer=layer,
        has_cls=True,
    )


def _vision_forward(model: Any, pixel_values: Any, facts: VisionFacts, indices: Any) -> tuple[Any, Any]:
    import torch

    outputs = image_features(model, pixel_values)
    return torch.stack(outputs.pooler_output), outputs.last_hidden_state


LLAVA = Family(
    name="llava",
    model_types=("llava",),
    decoder_types=("llama", "mistral", "qwen2"),
    vision_types=("clip_vision_model",),
    decoder="model.language_model",
    decoder_layers="model.language_model.layers",
    vision_layers="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision_modules=("model.vision_tower", "model.multi_modal_projector"),
    embedding="model.language_model.embed_tokens",
    head="lm_head",
    read_vision=_read_vision,
    vision_forward=_vision_forward,
)
