"""Configurations of true size of Qwen2.5-VL-7B and of the thinkers of Qwen2.5-Omni-7B and Qwen3-Omni-30B-A3B, and what
stands beside them."""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
_VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
    "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
_MARKS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}

QWEN2_5_VL_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "tie_word_embeddings": False,
    "image_token_id": 151655, "video_token_id": 151656, **_MARKS,
    "text_config": {"model_type": "qwen2_5_vl_text", **_TEXT},
    "vision_config": {"model_type": "qwen2_5_vl_vision", "tokens_per_second": 2, **_VISION},
}  # fmt: skip

QWEN2_5_OMNI_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"], "model_type": "qwen2_5_omni_thinker",
    "image_token_index": 151655, "video_token_index": 151656, "audio_token_index": 151646, **_MARKS,
    "audio_start_token_id": 151647, "audio_end_token_id": 151648, "pad_token_id": 151643,
    "position_id_per_seconds": 25, "seconds_per_chunk": 2,
    "text_config": {"model_type": "qwen2_5_omni_text", **_TEXT},
    "vision_config": {"model_type": "qwen2_5_omni_vision_encoder", **_VISION},
    "audio_config": {
        "model_type": "qwen2_5_omni_audio_encoder", "num_mel_bins": 128, "encoder_layers": 32, "d_model": 1280,
        "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "max_source_positions": 1500, "n_window": 100,
        "output_dim": 3584,
    },
}  # fmt: skip

QWEN3_OMNI_30B: dict[str, Any] = {
    "architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"], "model_type": "qwen3_omni_moe_thinker",
    "image_token_id": 151655, "video_token_id": 151656, "audio_token_id": 151675, **_MARKS,
    "audio_start_token_id": 151669, "audio_end_token_id": 151670, "pad_token_id": 151643,
    "position_id_per_seconds": 13,
    "text_config": {
        "model_type": "qwen3_omni_moe_text", "hidden_size": 2048, "intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064,
        "max_position_embeddings": 65536, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "model_type": "qwen3_omni_moe_vision_encoder", "depth": 27, "hidden_size": 1152, "num_heads": 16,
        "intermediate_size": 4304, "out_hidden_size": 2048, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24], "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "audio_config": {
        "model_type": "qwen3_omni_moe_audio_encoder", "num_mel_bins": 128, "encoder_layers": 32, "d_model": 1280,
        "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "max_source_positions": 1500, "n_window": 50,
        "n_window_infer": 800, "conv_chunksize": 500, "downsample_hidden_size": 480, "output_dim": 2048,
    },
}  # fmt: skip

QWEN_PIXELS: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14,
    "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
QWEN_SOUND: dict[str, Any] = {
    **QWEN_PIXELS, "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128, "sampling_rate": 16000,
    "hop_length": 160, "n_fft": 400, "chunk_length": 300, "dither": 0.0,
}  # fmt: skip

QWEN_TOKENS = {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
OMNI_TOKENS = {"<|AUDIO|>": 151646, "<|audio_bos|>": 151647, "<|audio_eos|>": 151648, **QWEN_TOKENS}
OMNI3_TOKENS = {"<|audio_start|>": 151669, "<|audio_end|>": 151670, "<|audio_pad|>": 151675, **QWEN_TOKENS}
