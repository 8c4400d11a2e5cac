"""The model layouts of the matrix: a table of tiny model directories with seeded random weights.

Big enough to exercise what recipes do: six by six visual tokens, five tower layers, eight decoder layers, so that
recipes of six stages fit. A new family is one more line of :data:`LAYOUTS` and one function that writes its directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from tests.unit import tiny_gemma3, tiny_internvl, tiny_model, tiny_onevision, tiny_smolvlm

from .cells import Tower

SIDE_PATCHES, TOWER_LAYERS, DECODER_LAYERS = 6, 5, 8


@dataclass(frozen=True)
class Layout:
    """``write`` makes the model directory and returns it; ``tower``: what rows can ask of its tower."""

    name: str
    title: str
    tower: Tower
    write: Callable[[Path], Path]


def _write_llava(directory: Path) -> Path:
    base = tiny_model.make_config()["vision_config"]
    side = SIDE_PATCHES * base["patch_size"]
    vision = base | {"image_size": side, "num_hidden_layers": TOWER_LAYERS}
    tiny_model.write_model(directory, layers=DECODER_LAYERS, vision_config=vision)
    _resize(directory, side, "size", "crop_size")
    return _calm(directory)


def _write_onevision(directory: Path) -> Path:
    side = SIDE_PATCHES * tiny_onevision.PATCH + 3  # pixels behind the last whole patch count for nothing
    vision = {"image_size": side, "num_hidden_layers": TOWER_LAYERS}
    tiny_onevision.write_model(directory, layers=DECODER_LAYERS, vision=vision)
    _resize(directory, side, "size")
    return _calm(directory)


def _write_internvl(directory: Path) -> Path:
    side = SIDE_PATCHES * tiny_internvl.MERGE * tiny_internvl.PATCH
    vision = {"image_size": [side, side], "num_hidden_layers": TOWER_LAYERS}
    tiny_internvl.write_model(directory, layers=DECODER_LAYERS, vision=vision)
    _resize(directory, side, "size")
    return _calm(directory)


def _write_smolvlm(directory: Path) -> Path:
    side = SIDE_PATCHES * tiny_smolvlm.MERGE * tiny_smolvlm.PATCH
    tiny_smolvlm.write_model(
        directory, layers=DECODER_LAYERS, vision={"image_size": side, "num_hidden_layers": TOWER_LAYERS}
    )
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_image_size": {"longest_edge": side}}, indent=1))
    return _calm(directory)


def _write_gemma3(directory: Path) -> Path:
    side = SIDE_PATCHES * tiny_gemma3.MERGE * tiny_gemma3.PATCH
    vision = {"image_size": side, "num_hidden_layers": TOWER_LAYERS}
    tiny_gemma3.write_model(
        directory, layers=DECODER_LAYERS, vision=vision, mm_tokens_per_image=SIDE_PATCHES * SIDE_PATCHES
    )
    _resize(directory, side, "size")
    # Its layers norm what they add, and the norms' weights count from 1.
    path = _calm(directory) / "model.safetensors"
    weights = load_file(path)
    for name in [n for n in weights if n.endswith(_DECODER_NORMS)]:
        weights[name] = (1 + weights[name]) / math.sqrt(2 * DECODER_LAYERS) - 1
    save_file(weights, path, {"format": "pt"})
    return directory


def _resize(directory: Path, side: int, *fields: str) -> None:
    """Let the image processor make images of ``side`` pixels."""
    path = directory / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {name: {"height": side, "width": side} for name in fields}, indent=1))


def _calm(directory: Path) -> Path:
    """Scale what layers add to their stream by (2 * layers) ** -0.5, as deep models are initialised.

    Without it random layers of this number multiply rounding errors until a tolerance says little.
    """
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        for ends, layers in ((_DECODER_ADDS, DECODER_LAYERS), (_TOWER_ADDS, TOWER_LAYERS)):
            if name.endswith(ends):
                weights[name] = weight / math.sqrt(2 * layers)
    save_file(weights, path, {"format": "pt"})
    return directory


_DECODER_ADDS = ("o_proj.weight", "down_proj.weight")
_DECODER_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
_TOWER_ADDS = ("out_proj.weight", "projection_layer.weight", "fc2.weight")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("llava", "LLaVA, CLIP tower with CLS token, Llama decoder", Tower(True), _write_llava),
        Layout(
            "onevision",
            "LLaVA-OneVision, SigLIP tower without CLS token, Qwen2 decoder",
            Tower(False, read_last=True),
            _write_onevision,
        ),
        Layout(
            "internvl",
            "InternVL3, InternViT tower with CLS token, two by two patches a token, Qwen2 decoder",
            Tower(True, merges=True, read_last=True),
            _write_internvl,
        ),
        Layout(
            "smolvlm",
            "SmolVLM2, tower without CLS token, three by three patches a token, Llama decoder",
            Tower(False, merges=True, read_last=True, linear=True),
            _write_smolvlm,
        ),
        Layout(
            "gemma3",
            "Gemma 3, SigLIP tower without CLS token, two by two patches a token, decoder with attention both ways",
            Tower(False, merges=True, read_last=True),
            _write_gemma3,
        ),
    )
}

TOWERS = {name: layout.tower for name, layout in LAYOUTS.items()}
