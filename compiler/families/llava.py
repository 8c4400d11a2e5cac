"""LLaVA-1.5 layout: CLIP tower, two-layer projector, Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

from typing import Any

from secateur.compiler.families.family import Family, VisionFacts
from secateur.runtime.errors import UserError


def _read_vision(config: Any) -> VisionFacts:
    vision, layer = config.vision_config, config.vision_feature_layer
    strategy = config.vision_feature_select_strategy
    where = f"{config.name_or_path}/config.json"
    if not isinstance(layer, int):
        raise UserError(
            f"vision_feature_layer is {layer!r}",
            where=where,
            fix="only a single feature layer is supported; LLaVA-1.5 uses -2",
        )
    if strategy != "default":
        raise UserError(
            f"vision_feature_select_strategy is {strategy!r}",
            where=where,
            available=["default"],
            fix="the 'full' strategy sends the CLS row to the decoder, which no recipe here expects",
        )
    # hidden_states[0] is the embedding, so hidden_states[-2] is the output of 0-based layer L-2.
    depth = vision.num_hidden_layers
    index = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= index <= depth:
        raise UserError(f"vision_feature_layer {layer} does not exist in a tower of {depth} layers", where=where)
    side = _patches_per_side(vision.image_size, vision.patch_size, where)
    return VisionFacts(
        image_size=(vision.image_size, vision.image_size),
        tokens_per_image=side * side,
        layers=depth,
        feature_layer=index - 1,
        has_cls=True,
    )


def _patches_per_side(image_size: object, patch_size: object, where: str) -> int:
    if not (isinstance(image_size, int) and isinstance(patch_size, int) and 1 <= patch_size <= image_size):
        raise UserError(
            f"an image of image_size {image_size} cannot be cut into patches of patch_size {patch_size}",
            where=where,
            fix="check vision_config; both are numbers of pixels",
        )
    return image_size // patch_size


def _vision_forward(model: Any, pixel_values: Any) -> tuple[Any, Any]:
    import torch

    outputs = model.model.get_image_features(
        pixel_values,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    )
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
