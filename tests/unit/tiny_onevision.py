"""Model directories of the LLaVA-OneVision layout with seeded random weights, as ``tiny_model`` makes those of LLaVA.

A SigLIP tower of 30x30 images in 9x9 patches (nine visual tokens and the row behind them) stands before a Qwen2
decoder. The image processor is the checkpoints' own: it would cut an image that is alone into tiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from . import tiny_model
from .tiny_model import IMAGE

SIDE, PATCH, PATCHES = 30, 9, 9
VIDEO = tiny_model.VOCABULARY
_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False,
}  # fmt: skip
_PIXELS: dict[str, Any] = {
    "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": SIDE, "width": SIDE},
    "image_grid_pinpoints": [[SIDE, SIDE], [2 * SIDE, SIDE], [SIDE, 2 * SIDE]], "do_resize": True,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True, "do_pad": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25] * 3, "resample": 3,
}  # fmt: skip


def make_config(layers: int = 4, vision: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """``config.json`` as plain data. ``vision`` changes fields of the tower's part, ``changes`` those of the whole."""
    # Tied embeddings would make a random model repeat its last token.
    text = {"vocab_size": VIDEO + 1, "tie_word_embeddings": False}
    llava = tiny_model.make_config("qwen2", layers, text)
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
        "image_token_index": IMAGE, "video_token_index": VIDEO, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "projector_hidden_act": "gelu",
        "image_grid_pinpoints": _PIXELS["image_grid_pinpoints"], "tie_word_embeddings": False,
        "text_config": llava["text_config"], "vision_config": _VISION | (vision or {}),
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
    tokenizer.add_special_tokens(["<video>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "preprocessor_config.json").write_text(json.dumps(_PIXELS, indent=1))
    (directory / "processor_config.json").unlink()
    model = tiny_model.make_model(directory, seed)
    with torch.no_grad():
        model.model.image_newline.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    return directory


def load_processor(directory: Path, **options: Any) -> Any:
    """transformers' processor of a directory, with its Pillow image processor and no video processor; ``options`` are
    those of its class."""
    from transformers import LlavaOnevisionProcessor, PreTrainedTokenizerFast
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    class ImagesOnly(LlavaOnevisionProcessor):
        """The video processor needs torchvision; without one, the check of its class fails."""

        def check_argument_for_proper_class(self, *_: Any) -> None:
            return None

    return ImagesOnly(
        image_processor=LlavaOnevisionImageProcessorPil.from_pretrained(directory),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(directory),
        num_image_tokens=PATCHES, vision_feature_select_strategy="full", **options,
    )  # fmt: skip
