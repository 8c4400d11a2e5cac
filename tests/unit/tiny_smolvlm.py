"""Model directories of the SmolVLM2 layout with seeded random weights, as ``tiny_model`` makes those of LLaVA.

A SigLIP-like tower of 36x36 images in 4x4 patches, of which three by three make one of nine visual tokens, stands
before a Llama decoder. The image processor is the checkpoints' own: it would add tiles to images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from . import tiny_model
from .tiny_model import IMAGE

SIDE, PATCH, UNITS, MERGE = 36, 4, 9, 3
AROUND, GLOBAL, VIDEO = (tiny_model.VOCABULARY + i for i in range(3))
_MARKS = {
    "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>", "video_token": "<video>",
}  # fmt: skip
_VISION: dict[str, Any] = {
    "model_type": "smolvlm_vision", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_PIXELS: dict[str, Any] = {
    "image_processor_type": "SmolVLMImageProcessorFast", "size": {"longest_edge": 4 * SIDE},
    "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": True, "do_pad": True, "do_resize": True,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25] * 3, "resample": 1,
}  # fmt: skip


def make_config(layers: int = 4, vision: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """``config.json`` as plain data. ``vision`` changes fields of the tower's part, ``changes`` those of the whole."""
    llava = tiny_model.make_config("llama", layers, {"vocab_size": VIDEO + 1})
    return {
        "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm", "image_token_id": IMAGE,
        "scale_factor": MERGE, "tie_word_embeddings": False, "pad_token_id": 128_002,
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
    tokenizer.add_special_tokens(list(_MARKS.values()))
    tokenizer.save(str(directory / "tokenizer.json"))
    words = json.loads((directory / "tokenizer_config.json").read_text()) | {"extra_special_tokens": _MARKS}
    (directory / "tokenizer_config.json").write_text(json.dumps(words, indent=1))
    (directory / "preprocessor_config.json").write_text(json.dumps(_PIXELS, indent=1))
    (directory / "processor_config.json").unlink()
    tiny_model.make_model(directory, seed).save_pretrained(directory)
    return directory
