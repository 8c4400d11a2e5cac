"""Model directories of Qwen2.5-VL and Qwen2.5-Omni with seeded random weights, as ``tiny_model`` makes those of LLaVA.

A tower that attends in windows takes images and videos of any size in 14x14 patches, two by two to a token; Omni's also
hears. The processor files have the checkpoints' layout: a chat template in JSON, marks around media, one
``preprocessor_config.json`` for what is seen and what is heard. Tokens are bytes, the special ones behind them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from . import tiny_model

KINDS = ("qwen2_5_vl", "qwen2_5_omni_thinker", "qwen2_5_omni")
"""The last is the whole of Omni, with the thinker in it."""
PATCH, MERGE, WINDOW = 14, 2, 56
MEL_BINS = 16
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_VL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
       "<|image_pad|>", "<|video_pad|>")  # fmt: skip
_OMNI = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>",
         "<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")  # fmt: skip
PAD, START, END, VISION_START, VISION_END, _, IMAGE, VIDEO, AUDIO, AUDIO_START, AUDIO_END = (
    len(_ALPHABET) + i for i in range(len(_OMNI))
)
VOCABULARY = len(_ALPHABET) + 16
"""As in the checkpoints, some ids stand for no token."""
_NAMED = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
_PIXELS: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056, "patch_size": PATCH,
    "temporal_patch_size": 2, "merge_size": MERGE, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
_SOUND: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": MEL_BINS, "sampling_rate": 16000,
    "hop_length": 160, "n_fft": 400, "chunk_length": 300, "n_samples": 4800000, "nb_max_frames": 30000, "dither": 0.0,
    "padding_side": "right", "padding_value": 0.0, "return_attention_mask": True,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "depth": 4, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
    "fullatt_block_indexes": [1, 3], "window_size": WINDOW, "patch_size": PATCH, "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}  # fmt: skip
_AUDIO: dict[str, Any] = {
    "num_mel_bins": MEL_BINS, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32,
    "max_source_positions": 100, "n_window": 20, "output_dim": 64,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "bos_token_id": PAD, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip


def make_config(
    kind: str = "qwen2_5_vl",
    layers: int = 4,
    vision: dict[str, Any] | None = None,
    audio: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """``config.json`` as plain data; each option changes fields of a part, ``changes`` those of the model (in the whole
    of Omni: the thinker). Sound comes in chunks of 0.4 seconds."""
    seen = _VISION | (vision or {})
    config: dict[str, Any] = {
        "model_type": kind, "vision_config": seen, "tie_word_embeddings": False,
        "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
        "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
        "text_config": _TEXT | {"num_hidden_layers": layers} | (text or {}),
    }  # fmt: skip
    if kind == "qwen2_5_vl":
        config |= {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "image_token_id": IMAGE, "video_token_id": VIDEO,
        }  # fmt: skip
        config["text_config"]["model_type"] = "qwen2_5_vl_text"
        seen.setdefault("tokens_per_second", 2)
        return config | changes
    config |= {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"], "model_type": "qwen2_5_omni_thinker",
        "image_token_index": IMAGE, "video_token_index": VIDEO, "audio_token_index": AUDIO,
        "audio_config": _AUDIO | {"model_type": "qwen2_5_omni_audio_encoder"} | (audio or {}),
        "audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END,
        "position_id_per_seconds": 25, "seconds_per_chunk": 2,
    }  # fmt: skip
    config["text_config"]["model_type"] = "qwen2_5_omni_text"
    seen["model_type"] = "qwen2_5_omni_vision_encoder"
    if kind == "qwen2_5_omni_thinker":
        return config | changes
    return {
        "architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "enable_audio_output": True,
        "thinker_config": config | changes,
        "talker_config": {"model_type": "qwen2_5_omni_talker"},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    }  # fmt: skip


def write_config(directory: Path, **options: Any) -> Path:
    """A directory that holds ``config.json`` alone; options of :func:`make_config`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(make_config(**options), indent=1))
    return directory


def write_model(directory: Path, *, kind: str = "qwen2_5_vl", seed: int = 0, **options: Any) -> Path:
    """A whole model directory: configuration, weights, tokenizer, processor; options of :func:`make_config`.

    The whole of Omni has the thinker's tensors behind ``thinker.``, and some of its other parts' beside them.
    """
    whole = kind == "qwen2_5_omni"
    write_config(directory, kind="qwen2_5_omni_thinker" if whole else kind, **options)
    make_model(directory, seed).save_pretrained(directory)
    if whole:
        file = directory / "model.safetensors"
        tensors = {f"thinker.{name}": tensor for name, tensor in load_file(file).items()}
        tensors |= {
            "talker.codec_head.weight": torch.ones(4, 2),
            "token2wav.code2wav_bigvgan_model.conv_post.bias": torch.ones(3),
        }
        save_file(tensors, file, metadata={"format": "pt"})
        write_config(directory, kind=kind, **options)
    write_processor(directory, kind)
    return directory


def make_model(directory: Path, seed: int) -> Any:
    """The Hugging Face model of a configuration, in float32, every parameter drawn at random."""
    from transformers import AutoConfig, AutoModelForMultimodalLM

    model = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
    return tiny_model.draw_weights(model, seed)


def write_processor(directory: Path, kind: str = "qwen2_5_vl") -> None:
    """Tokenizer of bytes, chat template, one configuration of what is seen and heard, generation defaults."""
    omni = kind != "qwen2_5_vl"
    names = _OMNI if omni else _VL
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*_ALPHABET, *names])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(names))
    tokenizer.save(str(directory / "tokenizer.json"))
    words: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "add_bos_token": False, "add_prefix_space": False, "chat_template": make_template(kind),
    }  # fmt: skip
    if omni:
        words |= {"extra_special_tokens": _NAMED, **_NAMED}
    tiny_model.write_json(directory, "tokenizer_config.json", words)
    pixels = {**_PIXELS, "processor_class": "Qwen2_5OmniProcessor" if omni else "Qwen2_5_VLProcessor"}
    tiny_model.write_json(directory, "preprocessor_config.json", {**pixels, **(_SOUND if omni else {})})
    tiny_model.write_json(directory, "chat_template.json", {"chat_template": make_template(kind)})
    # Omni's defaults say nothing of the end of an answer; its configuration does.
    stops = {} if omni else {"bos_token_id": PAD, "eos_token_id": [END, PAD], "pad_token_id": PAD}
    tiny_model.write_json(directory, "generation_config.json", stops)


def make_template(kind: str = "qwen2_5_vl") -> str:
    """The chat template: turns between ``<|im_start|>`` and ``<|im_end|>``, each medium between its marks."""
    names = _VL if kind == "qwen2_5_vl" else _OMNI
    media = {part: f"{names[3]}{names[i]}{names[4]}" for part, i in (("image", 6), ("video", 7))}
    if kind != "qwen2_5_vl":
        media["audio"] = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    parts = "".join(f"{{% if part.type == '{part}' %}}{shown}{{% endif %}}" for part, shown in media.items())
    return (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{parts}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
