"""Scores from how tokens lie to each other, or how much the projector makes of them: ``[G,N]`` float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.passes.methods.rows import Scored, unit_rows

Positive = Annotated[float, Field(gt=0)]


def projector_sensitivity(probe_slopes: Tensor) -> Tensor:
    """How much the projector's output moves with each token (ZOO-Prune): the mean norm of ``probe_slopes [G,m,N,D]``,
    its slopes along m random directions."""
    return torch.linalg.vector_norm(probe_slopes, dim=-1).mean(dim=1)


def later_redundancy(tokens: Tensor) -> Tensor:
    """Minus the highest cosine of each of ``tokens [G,N,D]`` with a token behind it (TextMonkey).

    The last token has none behind it and scores 1, no less than any other.
    """
    units = unit_rows(tokens)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    alike = units @ units.transpose(1, 2)
    return -torch.where(position > position.unsqueeze(1), alike, -1.0).amax(dim=2)


def graph_flow(
    tokens: Tensor,
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.5,
    temperature: Positive = 0.03,
    steps: Annotated[int, Field(ge=1)] = 5,
) -> Tensor:
    """What reaches each token when the norms of ``tokens [G,N,D]`` flow through the graph of alike ones (G-Prune).

    Two tokens are neighbours when their cosine is at least ``threshold``; a token is its own neighbour. In each step
    a token hands on what it holds to its neighbours in shares of softmax(cosine / temperature). What it holds after
    the last step is divided by the number of its neighbours. The N x N table is never raised to a power.
    """
    units = unit_rows(tokens)
    alike = units @ units.transpose(1, 2)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    near = (alike >= threshold) | (position.unsqueeze(1) == position)
    shares = torch.softmax(torch.where(near, alike / temperature, -math.inf), dim=2)
    held = torch.linalg.vector_norm(tokens, dim=-1).unsqueeze(1)
    for _ in range(steps):
        held = held @ shares
    return held.squeeze(1) / near.to(torch.float32).sum(dim=2)


def attention_flow(
    cls_attention: Tensor,
    cls_values: Tensor,
    values: Tensor,
    carried: Tensor | None = None,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
) -> Scored:
    """How much each patch passes on to the CLS token, gathered over layers (FlowCut). Carries the score itself.

    The share of ``cls_attention [G,H,N]`` averaged over heads, plus the share of softmax(V_cls . V_j) averaged over
    heads (``cls_values [G,H,d]``, ``values [G,H,N,d]``, not scaled; the softmax runs over CLS and patches, so that a
    head whose CLS value resembles itself most counts least), times the L1 norm of the values' mean over heads. Of what
    earlier stages carried ``momentum`` counts, and the rest of the new score.
    """
    patches = (values @ cls_values.unsqueeze(-1)).squeeze(-1)
    itself = (cls_values * cls_values).sum(dim=-1, keepdim=True)
    similar = torch.softmax(torch.cat([itself, patches], dim=-1), dim=-1)[..., 1:].mean(dim=1)
    relation = cls_attention.mean(dim=1)
    share = relation / relation.sum(dim=1, keepdim=True) + similar / similar.sum(dim=1, keepdim=True)
    score = share * torch.linalg.vector_norm(values.mean(dim=1), ord=1, dim=-1)
    if carried is not None:
        score = momentum * carried + (1.0 - momentum) * score
    return Scored(score, score)


SCORES: dict[str, Callable[..., Tensor | Scored]] = {
    "attention_flow": attention_flow,
    "graph_flow": graph_flow,
    "later_redundancy": later_redundancy,
    "projector_sensitivity": projector_sensitivity,
}
