"""A bigger LLaVA-layout model with random weights: what pruning saves in time does not depend on what is answered.

Decoder of Qwen2-0.5B's shape (hidden 896, 24 layers, 14 heads, 2 KV heads) in the Llama layout; a CLIP tower of
CLIP-L/14-336's token count (576) and a fraction of its width. The tokenizer is the demo's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.runtime.leftovers import held_directory

SEED = 0
IMAGE_SIZE, PATCH_SIZE = 336, 14


def random_config(
    image_size: int = IMAGE_SIZE, tower: Mapping[str, int] | None = None, decoder: Mapping[str, int] | None = None
) -> Any:
    """The `LlavaConfig`: 358 M parameters in the decoder's layers, 38 M in the tower's.

    ``image_size`` in pixels; ``tower`` and ``decoder`` change fields of those parts.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from secateur.tools.demo.architecture import VOCABULARY_SIZE, build_config

    demo = build_config()
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 8, **(tower or {})}
    vision = CLIPVisionConfig(
        image_size=image_size, patch_size=PATCH_SIZE, projection_dim=512, hidden_act="quick_gelu",
        **sizes,
    )  # fmt: skip
    shape: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "hidden_size": 896, "intermediate_size": 4864}
    shape |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}
    text = LlamaConfig(
        **(shape | dict(decoder or {})), max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=demo.text_config.bos_token_id,
        eos_token_id=demo.text_config.eos_token_id, pad_token_id=demo.text_config.pad_token_id,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=demo.image_token_index,
        image_seq_length=(image_size // PATCH_SIZE) ** 2, projector_hidden_act="gelu", vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip


def make_random_model(
    directory: Path,
    image_size: int = IMAGE_SIZE,
    tower: Mapping[str, int] | None = None,
    decoder: Mapping[str, int] | None = None,
    dtype: str = "float16",
) -> Path:
    """Write the model once, seeded, in half precision (0.8 GB); a directory that is there is used as it is.

    ``dtype`` is torch's name of its type. The other arguments are those of :func:`random_config`.
    """
    if directory.is_dir():
        return directory
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with held_directory(directory.parent, ".random-") as work:
        torch.manual_seed(SEED)
        model: Any = LlavaForConditionalGeneration(random_config(image_size, tower, decoder))
        model = model.to(getattr(torch, dtype))
        model.save_pretrained(work)
        _save_processor(work, image_size)
        os.replace(work, directory)
    return directory


def _save_processor(directory: Path, image_size: int) -> None:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from secateur.tools.demo.language import CHAT_TEMPLATE, build_tokenizer

    size = {"height": image_size, "width": image_size}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size), tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)  # fmt: skip
