"""Model directories of the LLaVA-1.5 layout with seeded random weights: small, but complete enough to compile and run.

A CLIP tower of 32x32 images in 8x8 patches (16 visual tokens) stands before a Llama, Mistral or Qwen2 decoder with
grouped keys. Weights are drawn wide enough for attention to differ from token to token. Tokens are bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
NAMES = ("<pad>", "<s>", "</s>", "<image>")
PATCHES = 16
DECODERS = ("llama", "mistral", "qwen2")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(NAMES) + len(_ALPHABET)
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS,
    "pad_token_id": PAD,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": 32, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
_PIXELS: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor", "size": {"height": 32, "width": 32},
    "crop_size": {"height": 32, "width": 32}, "do_resize": True, "do_center_crop": True, "do_convert_rgb": True,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3, "resample": 3,
}  # fmt: skip


def make_config(
    decoder: str = "llama", layers: int = 3, text: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """``config.json`` as plain data. ``text`` changes fields of the decoder's part, ``changes`` those of the whole."""
    part = {"model_type": decoder, "num_hidden_layers": layers, "tie_word_embeddings": decoder == "qwen2", **_TEXT}
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": IMAGE,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "tie_word_embeddings": part["tie_word_embeddings"], "text_config": part | (text or {}),
        "vision_config": _VISION,
    } | changes  # fmt: skip


def write_config(directory: Path, **options: Any) -> Path:
    """A directory that holds ``config.json`` alone; options of :func:`make_config`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(make_config(**options), indent=1))
    return directory


def write_model(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A whole model directory: configuration, weights, tokenizer, processor; options of :func:`make_config`."""
    write_config(directory, **options)
    write_processor(directory)
    make_model(directory, seed).to(dtype).save_pretrained(directory)
    return directory


def make_model(directory: Path, seed: int) -> Any:
    """The Hugging Face model of a configuration, in float32, every parameter drawn at random."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
    return draw_weights(model, seed)


def draw_weights(model: Any, seed: int) -> Any:
    """The model with every parameter drawn at random."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                width = 2.0 if ".q_proj" in name or ".k_proj" in name else 1.0
                parameter.normal_(0, width / math.sqrt(parameter[0].numel()), generator=source)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1, 0.1, generator=source)
            else:
                parameter.normal_(0, 0.1, generator=source)
        model.get_input_embeddings().weight.normal_(0, 1, generator=source)
    return model


def write_processor(directory: Path) -> None:
    """Tokenizer of bytes, chat template, image processor and generation defaults."""
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*NAMES, *_ALPHABET])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.add_special_tokens(list(NAMES))
    tokenizer.save(str(directory / "tokenizer.json"))
    words = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
    write_json(directory, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **words})
    write_json(directory, "preprocessor_config.json", _PIXELS)
    layout = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    write_json(
        directory, "processor_config.json", {"processor_class": "LlavaProcessor", "image_token": "<image>", **layout}
    )
    write_json(directory, "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def write_json(directory: Path, name: str, content: dict[str, Any]) -> None:
    (directory / name).write_text(json.dumps(content, indent=1))
