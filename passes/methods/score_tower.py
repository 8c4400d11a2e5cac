"""Scores from the vision tower's attention beyond one CLS row, ``[G,N]`` float32, higher = keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.passes.methods.rows import prefer, unit_rows
from secateur.passes.methods.score import Heads
from secateur.passes.methods.select_windows import top_mask

Layers = Literal["sum", "first", "last"]
Share = Annotated[float, Field(ge=0, le=1)]


def cls_attention_layers_mean(cls_attention_layers: Tensor, heads: Heads = "mean", layers: Layers = "sum") -> Tensor:
    """What the CLS token attends to in several tower layers: ``cls_attention_layers [G,A,H,N]``, ``[G,N]``.

    ``layers="sum"`` adds the layers after their heads are reduced (VTC-CLS). ``"first"`` and ``"last"`` read the
    lowest and the highest of them alone, for methods that use a shallow and a deep layer in different ways.
    """
    return _reduce_layers(cls_attention_layers, heads, layers)


def received_attention_mean(received_attention: Tensor, heads: Heads = "mean") -> Tensor:
    """What each token receives from all queries: ``received_attention [G,H,N]`` over its heads, ``[G,N]``.

    This is how methods that rank by the CLS token adapt to a tower without one (VisPruner on SigLIP).
    """
    return _reduce_heads(received_attention, heads)


def received_attention_layers_mean(
    received_attention_layers: Tensor, heads: Heads = "mean", layers: Layers = "sum"
) -> Tensor:
    """The same for several tower layers: ``received_attention_layers [G,A,H,N]``; ``layers`` as above (HiPrune)."""
    return _reduce_layers(received_attention_layers, heads, layers)


def question_similarity(tokens: Tensor, text_tokens: Tensor, text_rows: Tensor) -> Tensor:
    """Mean cosine of each of ``tokens [G,N,D]`` with the slots of ``text_tokens [G,T,D]`` that ``text_rows [G,T]``
    (bool) marks, ``[G,N]``. Zero where no slot is marked."""
    counts = text_rows.to(tokens.dtype)
    question = (unit_rows(text_tokens) * counts.unsqueeze(-1)).sum(dim=1) / counts.sum(dim=1, keepdim=True).clamp_min(1)
    return (unit_rows(tokens) @ question.unsqueeze(-1)).squeeze(-1)


def carried_then_question(
    carried: Tensor,
    tokens: Tensor,
    text_tokens: Tensor,
    text_rows: Tensor,
    k: int,
    visual: Share = 0.5,
    text: Share = 0.25,
) -> Tensor:
    """Recoverable Compression's order: what an earlier stage scored highest, then what the question recovers.

    First come the top k1 of ``carried [G,N]``, then the k2 of the others that are most similar to the question (see
    :func:`question_similarity` for the signals), then the rest by ``carried``. :func:`split_budget` says k1 and k2.
    """
    first, second = split_budget(k, visual, text)
    seen = top_mask(carried, first)
    similar = question_similarity(tokens, text_tokens, text_rows)
    recovered = top_mask(torch.where(seen > 0, -torch.inf, similar), second)
    return prefer(carried, 2.0 * seen + recovered)


def split_budget(k: int, visual: float, text: float) -> tuple[int, int]:
    """k1 = round(visual * k) and k2 = round(text * k), halves up, k2 cut to what k1 leaves of k."""
    first = min(int(visual * k + 0.5), k)
    return first, min(int(text * k + 0.5), k - first)


def _reduce_layers(attention: Tensor, heads: Heads, layers: Layers) -> Tensor:
    if layers == "sum":
        return _reduce_heads(attention, heads).sum(dim=1)
    return _reduce_heads(attention[:, 0 if layers == "first" else -1], heads)


def _reduce_heads(attention: Tensor, heads: Heads) -> Tensor:
    """``[...,H,N]`` to ``[...,N]``."""
    if heads == "max":
        return attention.amax(dim=-2)
    return attention.sum(dim=-2) if heads == "sum" else attention.mean(dim=-2)


SCORES: dict[str, Callable[..., Tensor]] = {
    "carried_then_question": carried_then_question,
    "cls_attention_layers_mean": cls_attention_layers_mean,
    "question_similarity": question_similarity,
    "received_attention_layers_mean": received_attention_layers_mean,
    "received_attention_mean": received_attention_mean,
}
