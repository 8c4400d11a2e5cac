"""Gemma 3 layout: SigLIP tower without a CLS token, average pooling, norm and projection, Gemma 3 decoder.

Squares of patches are averaged into ``mm_tokens_per_image`` tokens, and only then come norm and projection: what the
decoder sees, and what stages count, are such squares. Tokens of one image attend to each other in both directions in
prefill. A prompt names an image by ``<start_of_image>``; its placeholders stand behind that token. The crops of pan and
scan, which transformers leaves out unless asked, are not supported.
"""

from __future__ import annotations

import math
from typing import Any

from secateur.compiler.families.family import Family, VisionFacts, fixed_size, read_grid
from secateur.compiler.geometry import Geometry
from secateur.runtime.errors import UserError


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    vision, text = config.vision_config, config.text_config
    where = f"{config.name_or_path}/config.json"
    side, _ = read_grid(config, where)
    tokens = config.mm_tokens_per_image
    columns = math.isqrt(tokens) if isinstance(tokens, int) and tokens > 0 else 0
    if not columns or columns**2 != tokens or side % columns:
        raise UserError(
            f"{side}x{side} patches cannot be averaged into {tokens} tokens",
            where=where,
            fix="mm_tokens_per_image must be the square of a number that divides image_size // patch_size",
        )
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(text, name):
            raise UserError(
                f"text_config.{name} is {getattr(text, name)!r}", where=where, fix="Gemma 3 models leave it unset"
            )
    return VisionFacts(
        frames=fixed_size(config, geometry),
        image_size=(vision.image_size, vision.image_size),
        grid=(columns, columns),
        merge=side // columns,
        layers=vision.num_hidden_layers,
        feature_layer=vision.num_hidden_layers - 1,
        has_cls=False,
        channels=vision.num_channels,
    )


def _vision_forward(model: Any, pixel_values: Any, facts: VisionFacts, indices: Any) -> tuple[Any, Any]:
    outputs = model.model.get_image_features(pixel_values, return_dict=True)
    return outputs.pooler_output, outputs.last_hidden_state


def _project(projector: Any, rows: Any) -> Any:
    return projector.mm_soft_emb_norm(rows) @ projector.mm_input_projection_weight


def _image_masks(config: Any, hidden: Any, positions: Any, cache: Any, image: Any) -> Any:
    from transformers.models.gemma3.modeling_gemma3 import (
        create_masks_for_vision_model,
        get_block_sequence_ids_for_mask,
    )

    return create_masks_for_vision_model(
        config, hidden, None, cache, positions, get_block_sequence_ids_for_mask(image.long())
    )


GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    decoder_types=("gemma3_text",),
    vision_types=("siglip_vision_model",),
    decoder="model.language_model",
    decoder_layers="model.language_model.layers",
    vision_layers="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    projector_entry="model.multi_modal_projector.mm_soft_emb_norm",
    project=_project,
    vision_modules=("model.vision_tower", "model.multi_modal_projector"),
    embedding="model.language_model.embed_tokens",
    head="lm_head",
    read_vision=_read_vision,
    vision_forward=_vision_forward,
    image_masks=_image_masks,
    image_marks=(("boi_token",), ("eoi_token",)),
    prompt_mark="boi_token",
    mark_space=("\n\n", "\n\n"),
)
