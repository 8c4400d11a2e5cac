"""Model directories of the LLaVA-NeXT layout with seeded random weights: those of ``tiny_model``, with images in tiles.

A tile is 32x32 pixels in 8x8 patches, sixteen visual tokens. Resolutions are as those of the checkpoints: one by two,
two by one, two by two, three by one and one by three tiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from . import tiny_model

SIDE = 32
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
_PIXELS: dict[str, Any] = {
    "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE}, "image_grid_pinpoints": PINPOINTS, "do_resize": True,
    "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "do_convert_rgb": True, "do_pad": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25] * 3, "resample": 3,
}  # fmt: skip


def write_config(directory: Path, **options: Any) -> Path:
    """A directory that holds ``config.json`` alone; options of ``tiny_model.make_config``."""
    fields: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "image_grid_pinpoints": PINPOINTS,
    }  # fmt: skip
    return tiny_model.write_config(directory, **(fields | options))


def write_model(directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """A whole model directory: configuration, weights, tokenizer, processor."""
    write_config(directory, **options)
    tiny_model.write_processor(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(_PIXELS, indent=1))
    (directory / "processor_config.json").unlink()
    model = tiny_model.make_model(directory, seed)
    with torch.no_grad():
        model.model.image_newline.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    return directory
