"""LLaVA-OneVision layout: SigLIP tower without a CLS token, two-layer projector, Qwen2 decoder.

An image is its base view: padded to a square, resized to the tower's size, all its patches, then the row
``image_newline``. That is how transformers treats every image of a prompt with several. Tiles of high resolution, which
it adds for an image that is alone in its prompt, and videos are not supported.
"""

from __future__ import annotations

from typing import Any

from secateur.compiler.families.family import (
    Family,
    VisionFacts,
    check_strategy,
    fixed_size,
    read_feature_layer,
    read_grid,
)
from secateur.compiler.geometry import Geometry


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    vision = config.vision_config
    where = f"{config.name_or_path}/config.json"
    layer = read_feature_layer(config, where, "LLaVA-OneVision uses -1")
    check_strategy(
        config,
        where,
        "full",
        "the 'default' strategy drops the first row, which is a patch in a tower without a CLS token",
    )
    return VisionFacts(
        frames=fixed_size(config, geometry),
        image_size=(vision.image_size, vision.image_size),
        grid=read_grid(config, where),
        layers=vision.num_hidden_layers,
        feature_layer=layer,
        has_cls=False,
        extra_rows=1,
        single_image="transformers cuts an image that is alone in its prompt into tiles of high resolution; this "
        "bundle shows the model the padded whole only, as transformers itself does with two images or more",
    )


def _vision_forward(model: Any, pixel_values: Any, facts: VisionFacts, indices: Any) -> tuple[Any, Any]:
    inner, layer = model.model, model.config.vision_feature_layer
    outputs = inner.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    # The last of the hidden states is what leaves the last layer, before the norm behind it.
    return inner.multi_modal_projector(outputs.hidden_states[layer]), outputs.last_hidden_state


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
    extra_rows="model.image_newline",
)
