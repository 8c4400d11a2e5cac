"""Stage one: both towers learn what lies under each token, from dense labels.

A token's feature is led towards the decoder's embedding of the digit's word, or of ``<|vision_pad|>`` where there is
none, so that the decoder finds words it can compare and copy. There are no heads to throw away.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from secateur.tools.demo.omni.architecture import GRID, MEL_FRAMES
from secateur.tools.demo.omni.clips import DIGITS
from secateur.tools.demo.omni.language import build_tokenizer

EMBEDDING_STD = 0.1
NOTHING = len(DIGITS)  # the label of a token without a digit


def use_equal_parts(model: Any) -> None:
    """Makes both towers attend within parts of equal length in one call instead of one call per part.

    Every window, grid and chunk of this demo's one geometry is equally long. The name holds 'flash' because the towers
    then hand over the parts' length.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("flash_equal_parts", attend_equal_parts)
    for tower in (model.model.visual, model.model.audio_tower):
        tower.config._attn_implementation_internal = "flash_equal_parts"


def attend_equal_parts(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, *,
    scaling: float, max_length_q: int, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of [1, H, P*L, D] within P parts of length L; returns [1, P*L, H, D]."""
    heads, total, width = query.shape[1:]
    q, k, v = (x[0].unflatten(1, (-1, int(max_length_q))).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # [P, H, L, D]
    return out.transpose(1, 2).reshape(1, total, heads, width), None


def encode_patches(model: Any, patches: torch.Tensor) -> torch.Tensor:
    """Features of T grids, float [T, 16, 192], from their patches [T*64, 1176]; grids do not see each other."""
    grids = len(patches) // (GRID * GRID)
    return model.model.visual(patches, torch.tensor([[grids, GRID, GRID]])).pooler_output.unflatten(0, (grids, -1))


def encode_mels(model: Any, mels: torch.Tensor) -> torch.Tensor:
    """Features of B clips, float [B, 100, 192], from log-mels [B, 128, 400]."""
    lengths = torch.full((len(mels),), MEL_FRAMES)
    joined = mels.transpose(0, 1).flatten(1)
    return model.model.audio_tower(joined, feature_lens=lengths).last_hidden_state.unflatten(0, (len(mels), -1))


@cache
def label_ids() -> torch.Tensor:
    """Token ids of the labels, int64 [11]: ten digits and nothing."""
    tokenizer = build_tokenizer()
    return torch.tensor(tokenizer.convert_tokens_to_ids([*(str(digit) for digit in DIGITS), "<|vision_pad|>"]))


def measure_labels(features: torch.Tensor, labels: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of features [..., N, D] against labels [..., N] (-1 is left out) by likeness to words [11, D], and
    the shares of tokens named rightly."""
    known = labels >= 0
    alike = F.normalize(features[known], dim=-1) * features.shape[-1] ** 0.5 @ words.T
    wanted = labels[known]
    weights = torch.where(wanted == NOTHING, 0.3, 1.0)
    loss = (weights * F.cross_entropy(alike, wanted, reduction="none")).sum() / weights.sum()
    with torch.no_grad():
        right, shown = (alike.argmax(-1) == wanted).float(), wanted != NOTHING
        figures = {"digit": float(right[shown].mean()), "nothing": float(right[~shown].mean())}
    return loss, figures
