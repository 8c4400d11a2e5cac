"""Scores from several rows of attention, ``[G,N]`` float32: who looks, which heads, and how the rows are reduced.

G counts groups, H heads, N prunable tokens, T text slots, L all slots; attention is softmaxed unless it says logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.passes.methods.rows import Scored
from secateur.passes.methods.score import Heads, reduce_heads

Rows = Literal["mean", "sum", "max"]


def visual_attention_mean(self_attention: Tensor, heads: Heads = "mean") -> Tensor:
    """What the visual tokens attend to: ``self_attention [G,H,N,N]`` over heads, mean over queries, ``[G,N]``.

    In the decoder the queries are causal, so early tokens are seen by more of them (VisionDrop).
    """
    return reduce_heads(self_attention, heads).mean(dim=1)


def text_attention_mean(
    text_attention: Tensor, text_rows: Tensor, heads: Heads = "mean", rows: Rows = "mean"
) -> Tensor:
    """What the text attends to: ``text_attention [G,H,T,N]`` over heads, then over the rows that count, ``[G,N]``.

    ``rows="mean"`` is TransPrune's text score, ``"max"`` the individual attention of MustDrop.
    """
    counts = text_rows.to(torch.float32)
    attention = reduce_heads(text_attention, heads) * counts.unsqueeze(-1)
    if rows == "max":
        return attention.amax(dim=1)
    total = attention.sum(dim=1)
    return total if rows == "sum" else total / counts.sum(dim=1, keepdim=True).clamp_min(1.0)


def rater_attention_mean(text_attention: Tensor, text_rows: Tensor, tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """What the text tokens that concern the image attend to, mean over heads and over these raters (SparseVLM).

    ``text_attention [G,H,T,N]``; raters are told by :func:`_weigh_raters` from ``tokens [G,N,D]`` and
    ``text_tokens [G,T,D]``.
    """
    raters = _weigh_raters(tokens, text_tokens, text_rows)
    return (text_attention.mean(dim=1) * raters.unsqueeze(-1)).sum(dim=1)


def rater_attention_corrected(
    text_attention: Tensor,
    text_rows: Tensor,
    tokens: Tensor,
    text_tokens: Tensor,
    slots: Tensor,
    carried: Tensor | None = None,
    head_share: Annotated[float, Field(gt=0, le=1)] = 14 / 32,
    head_width: Annotated[int, Field(gt=0, multiple_of=2)] = 128,
    rotary_base: Annotated[float, Field(gt=1)] = 10000.0,
) -> Scored:
    """:func:`rater_attention_mean` without the pull of nearby positions and with the visual heads only (SparseVLM+).

    Attention ``[G,H,T,N]`` is divided by what rotary positions alone give, that is by the scaled product of two
    vectors of ones of width d = ``head_width`` at the same two positions: ``2 / sqrt(d) * sum_i cos(gap * base **
    (-2i / d))``. Of the H heads, the round(``head_share`` * H) with the most corrected attention from raters to
    visual tokens count. The default is the authors' 14 heads of 32.

    The gap between text and visual token is the unpruned one. It starts from ``slots [G,N]`` at the first stage of
    its kind; what is carried on, ``[G,N]``, is each token's distance to the first slot behind the visual ones.
    """
    behind = (slots[:, -1:] - slots + 1).to(torch.float32) if carried is None else carried
    step = (text_rows.to(torch.float32).cumsum(dim=1) - 1.0).clamp_min(0.0)
    gap = behind.unsqueeze(1) + step.unsqueeze(2)
    frequency = [rotary_base ** (-2 * i / head_width) for i in range(head_width // 2)]
    angles = gap.unsqueeze(-1) * torch.tensor(frequency, dtype=torch.float32, device=gap.device)
    pull = torch.cos(angles).sum(dim=-1) * (2 / math.sqrt(head_width))
    # Beyond some 1,700 positions (at the defaults) the product swings around zero, where dividing by it would blow
    # scores up or turn their sign.
    pull = pull.clamp_min(0.25)

    raters = _weigh_raters(tokens, text_tokens, text_rows)
    by_head = (text_attention / pull.unsqueeze(1) * raters.unsqueeze(1).unsqueeze(-1)).sum(dim=2)
    heads = max(1, math.floor(head_share * by_head.shape[1] + 0.5))
    chosen = by_head.sum(dim=2).topk(heads, dim=1).indices
    score = by_head.gather(1, chosen.unsqueeze(-1).expand(-1, -1, by_head.shape[2])).mean(dim=1)
    return Scored(score, behind)


def text_weighted_attention(text_attention: Tensor, text_to_text_attention: Tensor, text_rows: Tensor) -> Tensor:
    """What the text attends to, each text token as heavy as the text around it makes it (AdaptInfer), ``[G,N]``.

    In each head a text token weighs the column sum of ``S + S^T - diag(S)``, S being ``text_to_text_attention
    [G,H,T,T]`` among the rows that count. The weighted rows of ``text_attention [G,H,T,N]`` are summed over rows and
    heads.
    """
    counts = text_rows.to(torch.float32)
    pairs = text_to_text_attention * counts[:, None, :, None] * counts[:, None, None, :]
    position = torch.arange(pairs.shape[-1], device=pairs.device)
    diagonal = torch.where(position.unsqueeze(1) == position, pairs, 0.0)
    weight = (pairs + pairs.transpose(2, 3) - diagonal).sum(dim=2)
    return (weight.unsqueeze(2) @ text_attention).squeeze(2).sum(dim=1)


def self_times_text_attention(self_attention: Tensor, text_attention: Tensor, text_rows: Tensor) -> Tensor:
    """Attention from visual tokens (mean) times attention from the text (sum), each of its strongest head, ``[G,N]``.

    ``self_attention [G,H,N,N]`` and ``text_attention [G,H,T,N]`` are reduced to their maximum over heads before
    queries are summed (FitPrune).
    """
    return visual_attention_mean(self_attention, "max") * text_attention_mean(text_attention, text_rows, "max", "sum")


def page_rank(
    attention_logits: Tensor,
    slots: Tensor,
    real_slots: Tensor,
    temperature: Annotated[float, Field(gt=0)] = 0.1,
    steps: Annotated[int, Field(ge=1)] = 5,
) -> Tensor:
    """PageRank on the whole prompt's attention, read at the visual tokens' ``slots [G,N]`` (AIM), ``[G,N]``.

    ``attention_logits [G,H,L,L]`` are divided by ``temperature`` before the softmax. Every real slot starts with the
    same rank, which then moves ``steps`` times along the attention of each head, without damping. The score is the
    root of the mean square over heads. What stays below 1e-30 is more than float32 can order at this temperature;
    of such tokens the first is the better.
    """
    moves = torch.softmax(attention_logits / temperature, dim=-1)
    real = real_slots.to(torch.float32)
    rank = (real / real.sum(dim=1, keepdim=True)).unsqueeze(1).unsqueeze(1)
    rank = rank.expand(-1, moves.shape[1], -1, -1)
    for _ in range(steps):
        rank = rank @ moves
    # In units of the highest head: the squares of small ranks would vanish in float32.
    unit = rank.amax(dim=1, keepdim=True).clamp_min(1e-37)
    importance = unit * torch.sqrt(((rank / unit) * (rank / unit)).mean(dim=1, keepdim=True))
    found = importance.squeeze(2).squeeze(1).gather(1, slots)
    position = torch.arange(found.shape[1], device=found.device)
    return torch.where(found > 1e-30, found, -1.0 - position)


def global_query_attention(self_attention: Tensor, threshold: Annotated[float, Field(gt=0)] = 34.8) -> Tensor:
    """What the tower's global tokens attend to, mean over heads and over these tokens (VFlowOpt), ``[G,N]``.

    Global are the tokens of ``self_attention [G,H,N,N]`` that receive more than ``threshold`` times the mean.
    Where none does, all of them count.
    """
    attention = self_attention.mean(dim=1)
    received = attention.mean(dim=1)
    weight = _weigh_chosen(received > threshold * received.mean(dim=1, keepdim=True), torch.ones_like(received))
    return (attention * weight.unsqueeze(-1)).sum(dim=1)


def carried_score(carried: Tensor) -> Tensor:
    """What the last stage with a score told this one, ``[G,N]``: ranking goes on where it was (VFlowOpt)."""
    return carried


def _weigh_raters(tokens: Tensor, text_tokens: Tensor, text_rows: Tensor) -> Tensor:
    """Equal weights that sum to one for the text rows that visual tokens find most like them, ``[G,T]``.

    Each visual token spreads a softmax over the text rows that count, by dot product. A rater is a row that gets
    more than the mean. Where none does (a single row), every row that counts is one.
    """
    alike = tokens @ text_tokens.transpose(1, 2)
    # A finite number, so that a prompt without any row that counts does not become NaN.
    found = torch.softmax(torch.where(text_rows.unsqueeze(1), alike, -1e30), dim=2).mean(dim=1)
    counts = text_rows.to(torch.float32)
    mean = (found * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp_min(1.0)
    return _weigh_chosen((found > mean) & text_rows, counts)


def _weigh_chosen(chosen: Tensor, others: Tensor) -> Tensor:
    """``chosen`` (bool) as weights that sum to one along dim 1, or ``others`` (1 or 0) where nothing is chosen."""
    weight = chosen.to(torch.float32)
    weight = torch.where(weight.amax(dim=1, keepdim=True) > 0, weight, others)
    return weight / weight.sum(dim=1, keepdim=True).clamp_min(1.0)


SCORES: dict[str, Callable[..., Tensor | Scored]] = {
    "carried_score": carried_score,
    "global_query_attention": global_query_attention,
    "page_rank": page_rank,
    "rater_attention_corrected": rater_attention_corrected,
    "rater_attention_mean": rater_attention_mean,
    "self_times_text_attention": self_times_text_attention,
    "text_attention_mean": text_attention_mean,
    "text_weighted_attention": text_weighted_attention,
    "visual_attention_mean": visual_attention_mean,
}
