"""The model layouts of the matrix: a table of tiny model directories with seeded random weights.

Big enough to exercise what recipes do: six by six visual tokens an image, five tower layers, eight decoder layers, so
that recipes of six stages fit. The first two layouts have every row of the table. The others have a few, of each place
where stages stand one, and are as deep as SEATS needs to stand in several layers. A new family is one more line of
:data:`LAYOUTS` and one function that writes its directory.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from tests.unit import (
    tiny_gemma3,
    tiny_internvl,
    tiny_model,
    tiny_next,
    tiny_onevision,
    tiny_qwen,
    tiny_qwen_more,
    tiny_smolvlm,
)

from .cells import Layout, Tower

SIDE_PATCHES, TOWER_LAYERS, DECODER_LAYERS = 6, 5, 8
SHARDS = 3
FEW_TOWER_LAYERS, FEW_DECODER_LAYERS, AUDIO_LAYERS = 3, 6, 2
"""Of layouts with a few rows, and of the towers that hear."""


def _write_llava(directory: Path) -> Path:
    base = tiny_model.make_config()["vision_config"]
    side = SIDE_PATCHES * base["patch_size"]
    vision = base | {"image_size": side, "num_hidden_layers": TOWER_LAYERS}
    tiny_model.write_model(directory, layers=DECODER_LAYERS, vision_config=vision)
    _resize(directory, side, "size", "crop_size")
    return _calm(directory)


def _write_onevision(directory: Path, few: bool = False) -> Path:
    side = SIDE_PATCHES * tiny_onevision.PATCH + 3  # pixels behind the last whole patch count for nothing
    tower, decoder = (FEW_TOWER_LAYERS, FEW_DECODER_LAYERS) if few else (TOWER_LAYERS, DECODER_LAYERS)
    tiny_onevision.write_model(directory, layers=decoder, vision={"image_size": side, "num_hidden_layers": tower})
    _resize(directory, side, "size")
    return _calm(directory, few)


def _write_internvl(directory: Path) -> Path:
    side = SIDE_PATCHES * tiny_internvl.MERGE * tiny_internvl.PATCH
    vision = {"image_size": [side, side], "num_hidden_layers": FEW_TOWER_LAYERS}
    tiny_internvl.write_model(directory, layers=FEW_DECODER_LAYERS, vision=vision)
    _resize(directory, side, "size")
    return _calm(directory, few=True)


def _write_smolvlm(directory: Path) -> Path:
    side = SIDE_PATCHES * tiny_smolvlm.MERGE * tiny_smolvlm.PATCH
    tiny_smolvlm.write_model(
        directory, layers=FEW_DECODER_LAYERS, vision={"image_size": side, "num_hidden_layers": FEW_TOWER_LAYERS}
    )
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_image_size": {"longest_edge": side}}, indent=1))
    return _calm(directory, few=True)


def _write_gemma3(directory: Path) -> Path:
    side = SIDE_PATCHES * tiny_gemma3.MERGE * tiny_gemma3.PATCH
    vision = {"image_size": side, "num_hidden_layers": FEW_TOWER_LAYERS}
    tiny_gemma3.write_model(
        directory, layers=FEW_DECODER_LAYERS, vision=vision, mm_tokens_per_image=SIDE_PATCHES * SIDE_PATCHES
    )
    _resize(directory, side, "size")
    # Its layers norm what they add, and the norms' weights count from 1.
    path = _calm(directory, few=True) / "model.safetensors"
    weights = load_file(path)
    for name in [n for n in weights if n.endswith(_DECODER_NORMS)]:
        weights[name] = (1 + weights[name]) / math.sqrt(2 * FEW_DECODER_LAYERS) - 1
    save_file(weights, path, {"format": "pt"})
    return directory


def _write_next(directory: Path) -> Path:
    tiny_next.write_model(
        directory, layers=FEW_DECODER_LAYERS,
        vision_config=tiny_model.make_config()["vision_config"] | {"num_hidden_layers": FEW_TOWER_LAYERS},
    )  # fmt: skip
    return _calm(directory, few=True)


def _write_qwen2_5(directory: Path, kind: str) -> Path:
    vision = {"depth": FEW_TOWER_LAYERS, "fullatt_block_indexes": [1, FEW_TOWER_LAYERS - 1]}
    tiny_qwen.write_model(directory, kind=kind, layers=FEW_DECODER_LAYERS, vision=vision)
    return _calm(directory, few=True)


def _write_qwen(directory: Path, kind: str) -> Path:
    vision: dict[str, Any] = {"depth": FEW_TOWER_LAYERS}
    if kind != "qwen2_vl":
        vision["deepstack_visual_indexes"] = [0, 1]
    tiny_qwen_more.write_model(directory, kind, layers=FEW_DECODER_LAYERS, vision=vision)
    return _calm(directory, few=True)


def _resize(directory: Path, side: int, *fields: str) -> None:
    """Let the image processor make images of ``side`` pixels."""
    path = directory / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {name: {"height": side, "width": side} for name in fields}, indent=1))


def _calm(directory: Path, few: bool = False) -> Path:
    """Scale what layers add to their stream by (2 * layers) ** -0.5, as deep models are initialised.

    Without it random layers of this number multiply rounding errors until a tolerance says little. A random merger of
    Qwen's towers makes tokens a tenth as large as words, behind which layers add too much to their stream again.
    """
    path = directory / "model.safetensors"
    weights = load_file(path)
    tower, decoder = (FEW_TOWER_LAYERS, FEW_DECODER_LAYERS) if few else (TOWER_LAYERS, DECODER_LAYERS)
    layers = {"tower": tower, "decoder": decoder, "audio": AUDIO_LAYERS}
    for name, weight in weights.items():
        part = next((part for part, adds in _ADDS if re.search(adds, name)), None)
        if part is not None:
            weights[name] = 8 * weight if part == "merger" else weight / math.sqrt(2 * layers[part])
    save_file(weights, path, {"format": "pt"})
    return directory


def shard(directory: Path) -> None:
    """Split a checkpoint's one file into several, as the hub's are and as ``save_pretrained`` splits larger ones."""
    whole = directory / "model.safetensors"
    weights = load_file(whole)
    split = split_torch_state_dict_into_shards(weights, max_shard_size=whole.stat().st_size // SHARDS)
    for name, tensors in split.filename_to_tensors.items():
        save_file({tensor: weights[tensor] for tensor in tensors}, directory / name, {"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / f"{whole.name}.index.json").write_text(json.dumps(index, indent=1))
    whole.unlink()


_ADDS = (
    ("merger", r"visual\.merger\.(mlp\.2|linear_fc2)\.weight$"),
    ("audio", r"audio_tower\..*(out_proj|fc2)\.weight$"),
    ("tower", r"visual\.blocks\..*(attn\.proj|down_proj|fc2)\.weight$"),
    ("decoder", r"(o_proj|down_proj)\.weight$|\.down_proj$"),
    ("tower", r"(out_proj|projection_layer|(?<!linear_)fc2)\.weight$"),
)
"""What the names of weights end with, by the part whose depth counts."""
_DECODER_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")

_QWEN2_SQUARE = tiny_qwen.MERGE * tiny_qwen.PATCH
_QWEN3_SQUARE = 32
"""Pixels along a visual token."""


def _image(square: int) -> dict[str, Any]:
    return {"image_size": (SIDE_PATCHES * square, SIDE_PATCHES * square)}


def _video(square: int, seconds: int = 0) -> dict[str, Any]:
    """Eight frames, in four grids of four by three tokens; with ``seconds`` of sound as long as the video."""
    shown = {"frames": 8, "fps": 2.0, "image_size": (4 * square, 3 * square)}
    return shown | ({"audio_seconds": seconds} if seconds else {})


_WITH_CLS = ("visionzip", "none", "fastv", "divprune")
_HEARING = ("random_omni", "visionzip_omni", "fastv_omni", "contextguard_proxy")
_WITHOUT_CLS = ("vispruner_siglip", "none", "fastv", "divprune")
_QWEN_TOWER = Tower(False, merges=True, projected=True, read_last=True)

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
            "onevision_video",
            "LLaVA-OneVision, frames resized behind the projector",
            Tower(False, merges=True, projected=True, read_last=True),
            partial(_write_onevision, few=True),
            {"frames": 4},
            ("seats", *_WITHOUT_CLS),
        ),
        Layout(
            "llava_next",
            "LLaVA-NeXT, CLIP tower with CLS token, images in tiles, Llama decoder",
            Tower(True, tiles=True),
            _write_next,
            {"image_size": (40, 60)},
            _WITH_CLS,
        ),
        Layout(
            "internvl",
            "InternVL3, InternViT tower with CLS token, two by two patches a token, Qwen2 decoder",
            Tower(True, merges=True, read_last=True),
            _write_internvl,
            rows=_WITH_CLS,
        ),
        Layout(
            "smolvlm",
            "SmolVLM2, tower without CLS token, three by three patches a token, Llama decoder",
            Tower(False, merges=True, read_last=True, linear=True),
            _write_smolvlm,
            rows=_WITHOUT_CLS,
        ),
        Layout(
            "gemma3",
            "Gemma 3, SigLIP tower without CLS token, two by two patches a token, decoder with attention both ways",
            Tower(False, merges=True, read_last=True),
            _write_gemma3,
            rows=_WITHOUT_CLS,
        ),
        Layout(
            "qwen2_vl",
            "Qwen2-VL, tower that takes patches, two by two a token, position ids of three axes",
            _QWEN_TOWER,
            partial(_write_qwen, kind="qwen2_vl"),
            _image(_QWEN2_SQUARE),
            _WITHOUT_CLS,
            axes=True,
        ),
        Layout(
            "qwen2_5_vl",
            "Qwen2.5-VL, tower that attends in windows",
            _QWEN_TOWER,
            partial(_write_qwen2_5, kind="qwen2_5_vl"),
            _image(_QWEN2_SQUARE),
            _WITHOUT_CLS,
            axes=True,
        ),
        Layout(
            "qwen2_5_vl_video",
            "Qwen2.5-VL with a video",
            _QWEN_TOWER,
            partial(_write_qwen2_5, kind="qwen2_5_vl"),
            _video(_QWEN2_SQUARE),
            ("seats", *_WITHOUT_CLS),
            axes=True,
        ),
        Layout(
            "qwen3_vl",
            "Qwen3-VL, features of inner tower layers added in the decoder",
            _QWEN_TOWER,
            partial(_write_qwen, kind="qwen3_vl"),
            _image(_QWEN3_SQUARE),
            _WITHOUT_CLS,
            axes=True,
        ),
        Layout(
            "qwen3_vl_moe",
            "Qwen3-VL-MoE, decoder of experts",
            _QWEN_TOWER,
            partial(_write_qwen, kind="qwen3_vl_moe"),
            _video(_QWEN3_SQUARE) | {"text_tokens": 96},  # the times before its grids are text
            ("seats", *_WITHOUT_CLS),
            axes=True,
        ),
        Layout(
            "qwen2_5_omni",
            "the thinker of Qwen2.5-Omni, towers that see and hear",
            _QWEN_TOWER._replace(hears=True),
            partial(_write_qwen2_5, kind="qwen2_5_omni_thinker"),
            _video(_QWEN2_SQUARE, seconds=4),
            ("seats", *_HEARING, *_WITHOUT_CLS),
            axes=True,
        ),
        Layout(
            "qwen3_omni",
            "the thinker of Qwen3-Omni, towers that see and hear, decoder of experts",
            _QWEN_TOWER._replace(hears=True),
            partial(_write_qwen, kind="qwen3_omni_moe_thinker"),
            _video(_QWEN3_SQUARE, seconds=4),
            ("seats_qwen3_omni", *_HEARING, *_WITHOUT_CLS),
            axes=True,
        ),
    )
}
