"""Model directories of the other Qwen families with seeded random weights, as ``tiny_qwen`` makes those of Qwen2.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import tiny_qwen
from .tiny_qwen import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    END,
    IMAGE,
    MEL_BINS,
    PAD,
    START,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
)

KINDS = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker")
_STACKED: dict[str, Any] = {
    "depth": 5, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
    "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2, 3], "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_SEEN: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "model_type": "qwen2_vl", "depth": 4, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
        "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "qwen3_vl": {"model_type": "qwen3_vl", **_STACKED},
    "qwen3_vl_moe": {"model_type": "qwen3_vl_moe", **_STACKED},
    "qwen3_omni_moe_thinker": {"model_type": "qwen3_omni_moe_vision_encoder", **_STACKED},
}  # fmt: skip
_HEARD: dict[str, Any] = {
    "model_type": "qwen3_omni_moe_audio_encoder", "num_mel_bins": MEL_BINS, "encoder_layers": 2,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32, "max_source_positions": 100, "n_window": 50,
    "n_window_infer": 200, "output_dim": 64, "downsample_hidden_size": 8,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "bos_token_id": PAD, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip
_INTERLEAVED: dict[str, Any] = {
    "head_dim": 24,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4], "mrope_interleaved": True,
    },
}  # fmt: skip
_SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_READ: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"model_type": "qwen2_vl_text"},
    "qwen3_vl": {"model_type": "qwen3_vl_text", **_INTERLEAVED},
    "qwen3_vl_moe": {"model_type": "qwen3_vl_moe_text", **_INTERLEAVED, **_SPARSE},
    "qwen3_omni_moe_thinker": {"model_type": "qwen3_omni_moe_text", **_INTERLEAVED, **_SPARSE},
}
_ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
_OMNI: dict[str, Any] = {
    "audio_config": _HEARD, "audio_token_id": AUDIO, "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END, "position_id_per_seconds": 13,
}  # fmt: skip


def make_config(
    kind: str, layers: int = 5, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """``config.json`` as plain data; each option changes fields of a part, ``changes`` those of the whole."""
    return {
        "architectures": [_ARCHITECTURES[kind]], "model_type": kind, "tie_word_embeddings": False,
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
        "vision_config": _SEEN[kind] | (vision or {}),
        "text_config": _TEXT | _READ[kind] | {"num_hidden_layers": layers} | (text or {}),
    } | (_OMNI if "omni" in kind else {}) | changes  # fmt: skip


def write_config(directory: Path, kind: str, **options: Any) -> Path:
    """A directory that holds ``config.json`` alone; options of :func:`make_config`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(make_config(kind, **options), indent=1))
    return directory


def write_model(directory: Path, kind: str, *, seed: int = 0, **options: Any) -> Path:
    """A whole model directory: configuration, weights, tokenizer, processor; options of :func:`make_config`."""
    write_config(directory, kind, **options)
    tiny_qwen.make_model(directory, seed).save_pretrained(directory)
    tiny_qwen.write_processor(directory, "qwen2_5_omni_thinker" if "omni" in kind else "qwen2_5_vl")
    processor = directory / "preprocessor_config.json"
    pixels = json.loads(processor.read_text()) | {"patch_size": _SEEN[kind]["patch_size"]}
    processor.write_text(json.dumps(pixels, indent=1))
    return directory
