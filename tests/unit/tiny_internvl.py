"""Model directories of the InternVL3 layout with seeded random weights, as ``tiny_model`` makes those of LLaVA.

An InternViT tower of 36x36 images in 6x6 patches, of which two by two make one of nine visual tokens, stands before a
Qwen2 decoder. The image processor is the checkpoints' own: it would cut images into tiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from . import tiny_model
from .tiny_model import IMAGE

SIDE, PATCH, UNITS, MERGE = 36, 6, 9, 2
START, END, VIDEO = (tiny_model.VOCABULARY + i for i in range(3))
_MARKS = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
_NAMED = {**_MARKS, "context_image_token": "<image>"}
_VISION: dict[str, Any] = {
    "model_type": "internvl_vision", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "attention_bias": True,
    "use_qk_norm": False, "norm_type": "layer_norm", "use_mean_pooling": True, "layer_scale_init_value": 0.1,
}  # fmt: skip
_PIXELS: dict[str, Any] = {
    "image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": SIDE, "width": SIDE},
    "crop_to_patches": False, "min_patches": 1, "max_patches": 12, "do_resize": True, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25] * 3, "resample": 3,
}  # fmt: skip


def make_config(layers: int = 4, vision: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """``config.json`` as plain data. ``vision`` changes fields of the tower's part, ``changes`` those of the whole."""
    # Tied embeddings would make a random model repeat its last token.
    text = {"vocab_size": VIDEO + 1, "tie_word_embeddings": False}
    llava = tiny_model.make_config("qwen2", layers, text)
    return {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "image_token_id": IMAGE,
        "image_seq_length": UNITS, "downsample_ratio": 1 / MERGE, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu", "tie_word_embeddings": False,
        "text_config": llava["text_config"], "vision_config": _VISION | (vision or {}),
    } | changes  # fmt: skip


def write_config(directory: Path, **options: Any) -> Path:
    """A directory that holds ``config.json`` alone; options of :func:`make_config`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(make_config(**options), indent=1))
    return directory


def write_model(directory: Path, *, seed: int = 0, shard_size: str = "1GB", **options: Any) -> Path:
    """A whole model directory: configuration, weights, tokenizer, processor; options of :func:`make_config`."""
    write_config(directory, **options)
    tiny_model.write_processor(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(list(_MARKS.values()))
    tokenizer.save(str(directory / "tokenizer.json"))
    words = json.loads((directory / "tokenizer_config.json").read_text()) | {"extra_special_tokens": _NAMED}
    (directory / "tokenizer_config.json").write_text(json.dumps(words, indent=1))
    (directory / "preprocessor_config.json").write_text(json.dumps(_PIXELS, indent=1))
    (directory / "processor_config.json").unlink()
    model = tiny_model.make_model(directory, seed)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # As drawn, the layers' scales are small and of both signs: the tower would add next to nothing to its stream.
        for name, parameter in model.named_parameters():
            if "lambda_" in name:
                parameter.normal_(1, 0.1, generator=source)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def load_processor(directory: Path) -> Any:
    """transformers' processor of a directory, with its Pillow image processor and no video processor."""
    from transformers import InternVLProcessor, PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    class ImagesOnly(InternVLProcessor):
        """The video processor needs torchvision; without one, the check of its class fails."""

        def check_argument_for_proper_class(self, *_: Any) -> None:
            return None

    return ImagesOnly(
        image_processor=GotOcr2ImageProcessorPil.from_pretrained(directory),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(directory), image_seq_length=UNITS,
    )  # fmt: skip
