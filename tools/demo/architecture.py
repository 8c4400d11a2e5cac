"""The demo model's shapes: a LLaVA-1.5 layout (Liu et al., arXiv:2310.03744) small enough for two cores.

CLIP tower with CLS (112 px, 8 px patches: 196 patches), features of the last layer but one without CLS,
two-layer GELU projector, Llama decoder. The shapes are frozen: tests are written against them.
"""

from pathlib import Path
from typing import Any

from secateur.tools.demo.language import CHAT_TEMPLATE, build_tokenizer

IMAGE_SIZE = 112
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
VISUAL_TOKENS = GRID * GRID
VOCABULARY_SIZE = 256  # the tokenizer's words, padded to a multiple of 64
PIXEL_MEAN = (0.32, 0.32, 0.32)
PIXEL_STD = (0.22, 0.22, 0.22)


def build_config() -> Any:
    """The `LlavaConfig` of the demo model (4.1 million parameters)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build_model(seed: int = 0) -> Any:
    """A freshly initialised fp32 `LlavaForConditionalGeneration`, with greedy generation defaults."""
    import torch
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = build_config()
    model = LlavaForConditionalGeneration(config)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
        max_new_tokens=8,
    )
    return model


def build_processor() -> Any:
    """The matching `LlavaProcessor`; a 112x112 image passes through unchanged but for normalisation."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_directory(model: Any, directory: Path) -> None:
    """Writes an ordinary HF directory: fp16 safetensors, config, generation defaults, processor, tokenizer."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(directory)
    build_processor().save_pretrained(directory)
    for path in Path(directory).iterdir():
        path.chmod(0o644)
