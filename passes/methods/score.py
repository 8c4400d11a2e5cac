"""Scores: how much each prunable token matters, ``[G,N]`` float32, higher = keep."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Heads = Literal["mean", "sum", "max"]


def cls_attention_mean(cls_attention: Tensor, heads: Heads = "mean") -> Tensor:
    """What the tower's CLS token attends to: ``cls_attention [G,H,N]`` over its heads, ``[G,N]``.

    FasterVLM takes the mean over heads, VisionZip the sum; both order the tokens alike.
    """
    return reduce_heads(cls_attention, heads)


def last_query_attention_mean(last_query_attention: Tensor, heads: Heads = "mean") -> Tensor:
    """What the prompt's last token attends to: ``last_query_attention [G,H,N]`` over its heads, ``[G,N]``.

    The softmax ran over the whole prompt, so a group's scores do not sum to one (FastV, PyramidDrop).
    """
    return reduce_heads(last_query_attention, heads)


def seeded_random(tokens: Tensor, seed: int = 0) -> Tensor:
    """A fixed random order of the N tokens, ``[G,N]``: ranks 0 to N-1 shuffled by ``seed``, without ties.

    ``tokens [G,N,D]`` is read for its shape only. The ranks are an ordinary constant when the function is traced
    (the draws are Python's Mersenne Twister, whose sequence is the same in every version, not a tensor operation).
    Every group gets the same ranks, so what an image loses does not depend on its place in the batch.
    """
    groups, count = tokens.shape[0], tokens.shape[1]
    source = random.Random(seed)
    draws = [source.random() for _ in range(count)]
    ranks = sorted(range(count), key=draws.__getitem__)
    constant = torch.tensor(ranks, dtype=torch.float32, device=tokens.device)
    return constant.unsqueeze(0).expand(groups, count)


def reduce_heads(attention: Tensor, heads: Heads) -> Tensor:
    """``attention [G,H,...]`` without its heads."""
    if heads == "max":
        return attention.amax(dim=1)
    return attention.sum(dim=1) if heads == "sum" else attention.mean(dim=1)


SCORES: dict[str, Callable[..., Tensor]] = {
    "cls_attention_mean": cls_attention_mean,
    "last_query_attention_mean": last_query_attention_mean,
    "seeded_random": seeded_random,
}
