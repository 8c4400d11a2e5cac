"""Model directories of the Gemma 3 layout with seeded random weights, as ``tiny_model`` makes those of LLaVA.

A SigLIP tower of 36x36 images in 6x6 patches, of which two by two make one of nine visual tokens, stands before a
Gemma 3 decoder whose layers but each third attend through a window.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from . import tiny_model
from .tiny_model import BOS, EOS, PAD

SIDE, PATCH, UNITS, MERGE = 36, 6, 9, 2
START, END, SOFT = (tiny_model.VOCABULARY + i for i in range(3))
_MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_TEXT: dict[str, Any] = {
    "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "query_pre_attn_scalar": 20, "max_position_embeddings": 512,
    "vocab_size": SOFT + 1, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "sliding_window": 256,
    "sliding_window_pattern": 3, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False,
}  # fmt: skip
_PIXELS: dict[str, Any] = {
    "image_processor_type": "Gemma3ImageProcessor", "size": {"height": SIDE, "width": SIDE}, "do_resize": True,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": None,
    "do_pan_and_scan": None, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25] * 3, "resample": 2,
}  # fmt: skip


def make_config(
    layers: int = 4, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """``config.json`` as plain data. ``text`` and ``vision`` change fields of the parts, ``changes`` of the whole."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "image_token_index": SOFT,
        "boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": UNITS, "tie_word_embeddings": False,
        # Tied embeddings would make a random model repeat its last token.
        "text_config": _TEXT | {"num_hidden_layers": layers, "tie_word_embeddings": False} | (text or {}),
        "vision_config": _VISION | (vision or {}),
    } | changes  # fmt: skip


def write_config(directory: Path, **options: Any) -> Path:
    """A directory that holds ``config.json`` alone; options of :func:`make_config`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(make_config(**options), indent=1))
    return directory


def write_model(directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """A whole model directory: configuration, weights, tokenizer, processor; options of :func:`make_config`."""
    write_config(directory, **options)
    tiny_model.write_processor(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(list(_MARKS.values()))
    tokenizer.save(str(directory / "tokenizer.json"))
    words = json.loads((directory / "tokenizer_config.json").read_text()) | {"extra_special_tokens": _MARKS} | _MARKS
    (directory / "tokenizer_config.json").write_text(json.dumps(words, indent=1))
    template = (directory / "chat_template.jinja").read_text().replace("<image>", "<start_of_image>")
    (directory / "chat_template.jinja").write_text(template)
    (directory / "preprocessor_config.json").write_text(json.dumps(_PIXELS, indent=1))
    (directory / "processor_config.json").unlink()
    model = tiny_model.make_model(directory, seed)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("language_model" in name and "norm" in name) or "soft_emb_norm" in name:
                # These weights count from 1.
                parameter.normal_(0, 0.1, generator=source)
            if "embed_tokens" in name:
                # They are multiplied by the root of the width.
                parameter.mul_(parameter.shape[1] ** -0.5)
    model.save_pretrained(directory)
    return directory


def load_processor(directory: Path) -> Any:
    """transformers' processor of a directory, with its Pillow image processor."""
    from transformers import Gemma3Processor, PreTrainedTokenizerFast
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil.from_pretrained(directory),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(directory), image_seq_length=UNITS,
    )  # fmt: skip
