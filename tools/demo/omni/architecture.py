"""The omni demo model's shapes: Qwen2.5-Omni's thinker (Xu et al., arXiv:2503.20215) small enough for two cores.

Vision tower with window attention and two layers of full attention, 14 px patches merged 2×2: 16 tokens a second. Audio
tower on 128 mel bins: 25 tokens a second. Decoder of 8 layers with grouped queries and M-RoPE. Tests are written
against these shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.tools.demo.omni.clips import FRAME_SIZE, SAMPLING_RATE, SECONDS
from secateur.tools.demo.omni.language import CHAT_TEMPLATE, build_tokenizer

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 14, 2, 2
GRID = FRAME_SIZE // PATCH_SIZE
GRID_THW = (SECONDS, GRID, GRID)  # a grid of patches per second: two frames
SIDE = GRID // MERGE_SIZE
TOKENS_PER_GRID = SIDE * SIDE
VIDEO_TOKENS = SECONDS * TOKENS_PER_GRID
MEL_BINS = 128
MEL_FRAMES = SECONDS * 100
AUDIO_TOKENS_PER_SECOND = 25
AUDIO_TOKENS = SECONDS * AUDIO_TOKENS_PER_SECOND
HIDDEN_SIZE = 192
VOCABULARY_SIZE = 448  # the tokenizer's entries, padded to a multiple of 64
# What the family's checkpoints say in preprocessor_config.json.
PREPROCESSOR = {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": MEL_BINS,
    "hop_length": 160,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12_845_056,
    "merge_size": MERGE_SIZE,
    "min_pixels": 3136,
    "n_fft": 400,
    "n_samples": 300 * SAMPLING_RATE,
    "nb_max_frames": 30_000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": PATCH_SIZE,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": SAMPLING_RATE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
}


def build_config() -> Any:
    """The ``Qwen2_5OmniThinkerConfig`` of the demo model."""
    from transformers import Qwen2_5OmniThinkerConfig

    tokenizer = build_tokenizer()
    ids = {word: tokenizer.convert_tokens_to_ids(f"<|{word}|>") for word in (
        "AUDIO", "IMAGE", "VIDEO", "audio_bos", "audio_eos", "vision_bos", "vision_eos", "vision_pad", "im_end",
        "endoftext",
    )}  # fmt: skip
    marks: dict[str, Any] = {
        "vision_start_token_id": ids["vision_bos"], "vision_end_token_id": ids["vision_eos"],
        "vision_token_id": ids["vision_pad"],
    }  # fmt: skip
    return Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": MEL_BINS, "d_model": 96, "encoder_layers": 2, "encoder_attention_heads": 3,
            "encoder_ffn_dim": 256, "output_dim": HIDDEN_SIZE, "n_window": 100, "max_source_positions": 1500,
        },
        vision_config={
            "depth": 4, "hidden_size": 96, "num_heads": 3, "intermediate_size": 256, "out_hidden_size": HIDDEN_SIZE,
            "patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "window_size": 56, "fullatt_block_indexes": [1, 3],
        },
        text_config={
            "vocab_size": VOCABULARY_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": 512,
            "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 2048, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]},
            "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"], "bos_token_id": ids["endoftext"],
        },
        audio_token_index=ids["AUDIO"],
        image_token_index=ids["IMAGE"],
        video_token_index=ids["VIDEO"],
        audio_start_token_id=ids["audio_bos"],
        audio_end_token_id=ids["audio_eos"],
        **marks,
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        position_id_per_seconds=AUDIO_TOKENS_PER_SECOND,
        seconds_per_chunk=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def build_model(seed: int = 0) -> Any:
    """A freshly initialised fp32 ``Qwen2_5OmniThinkerForConditionalGeneration``, with greedy generation defaults."""
    import torch
    from transformers import GenerationConfig, Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(seed)
    config = build_config()
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.pad_token_id],
        pad_token_id=text.pad_token_id,
        do_sample=False,
        max_new_tokens=8,
    )
    return model


def save_directory(model: Any, directory: Path) -> None:
    """Writes an ordinary HF directory: fp16 safetensors, config, generation defaults, tokenizer and processor files."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    for path in Path(directory).iterdir():
        path.chmod(0o644)
