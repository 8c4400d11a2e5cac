"""Small mixture-of-experts models with seeded random weights, and choices of experts of several kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HIDDEN = 32, 24
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 48, "moe_intermediate_size": HIDDEN,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
LOADS = ("even", "uneven", "one")
"""Choices as random scores make them, with favourites among the experts, and the same experts for every token."""


def draw(tokens: int, experts: int, chosen: int, load: str, seed: int = 0) -> tuple[Tensor, ...]:
    """``x [T,D]``, ``indices [T,k]``, ``weights [T,k]``, ``gate_up [E,2F,D]`` and ``down [E,D,F]``."""
    source = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=source)  # noqa: E731
    scores = normal(tokens, experts)
    if load == "uneven":
        scores = scores + 3 * normal(experts)
    if load == "one":
        scores = torch.arange(float(experts)).expand(tokens, experts)
    weights, indices = torch.softmax(scores, -1).topk(chosen)
    gate_up, down = normal(experts, 2 * HIDDEN, WIDTH), normal(experts, WIDTH, HIDDEN)
    return normal(tokens, WIDTH), indices, weights, gate_up * WIDTH**-0.5, down * HIDDEN**-0.5


def make_model(kind: type, config: Any, seed: int = 0) -> Any:
    """A Hugging Face model of a configuration in float32, every parameter drawn at random."""
    source = torch.Generator().manual_seed(seed)
    model = kind._from_config(config).eval() if hasattr(kind, "_from_config") else kind(config).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, max(parameter.shape[-1], 1) ** -0.5, generator=source)
    return model


def make_block(name: str) -> tuple[nn.Module, Any]:
    """A router with its experts, as one of transformers' decoder layers has them, and its configuration."""
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe, modeling_qwen3_omni_moe
    from transformers.models.qwen3_vl_moe import configuration_qwen3_vl_moe, modeling_qwen3_vl_moe

    config: Any
    block: Any
    if name == "qwen3_moe":
        config = configuration_qwen3_moe.Qwen3MoeConfig(**TEXT, norm_topk_prob=False)
        block = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock
    elif name == "qwen3_vl_moe":
        config = configuration_qwen3_vl_moe.Qwen3VLMoeTextConfig(**TEXT)
        block = modeling_qwen3_vl_moe.Qwen3VLMoeTextSparseMoeBlock
    else:
        config = configuration_qwen3_omni_moe.Qwen3OmniMoeTextConfig(**TEXT, norm_topk_prob=True)
        block = modeling_qwen3_omni_moe.Qwen3OmniMoeThinkerTextSparseMoeBlock
    config._experts_implementation = "eager"
    return make_model(block, config), config


BLOCKS = ("qwen3_moe", "qwen3_vl_moe", "qwen3_omni_moe")
