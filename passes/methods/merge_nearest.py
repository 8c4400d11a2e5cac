"""Merges into the nearest survivor, and into centres with one token for all that is left over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.passes.methods.rows import take_rows, unit_rows
from secateur.passes.methods.score_tower import Share, question_similarity, split_budget
from secateur.passes.methods.select import Selection, top_k

Neighbours = Annotated[int, Field(gt=0)]


def nearest_mean(selection: Selection, tokens: Tensor) -> Tensor:
    """VScan: each dropped token joins the survivor whose row of ``tokens [G,N,D]`` is most similar (cosine); a
    survivor becomes the mean of itself and what joined it. ``mix [G,k,N]``, rows sum to one."""
    unit = unit_rows(tokens)
    nearest = (take_rows(unit, selection.keep) @ unit.transpose(1, 2)).argmax(dim=1)
    survivor = torch.arange(selection.keep.shape[1], device=tokens.device).unsqueeze(-1)
    stays = _one_hot(selection.keep, tokens.shape[1])
    dropped = 1.0 - stays.sum(dim=1, keepdim=True)
    joined = stays + (survivor == nearest.unsqueeze(1)).to(stays.dtype) * dropped
    return joined / joined.sum(dim=-1, keepdim=True)


def centres_by_keys(
    selection: Selection, score: Tensor, cls_attention: Tensor, keys: Tensor, neighbours: Neighbours = 32
) -> Tensor:
    """PruMerge: every centre gains the CLS-attention-weighted sum of the tokens whose keys are most similar to its own.

    Similarity is the cosine of all heads' keys in one, ``keys [G,H,N,d]``; the weight of a token is its
    ``cls_attention [G,H,N]``, mean over heads. See :func:`merge_centres`. ``mix [G,k,N]``.
    """
    unit = unit_rows(keys.transpose(1, 2).flatten(2))
    nearness = take_rows(unit, selection.keep) @ unit.transpose(1, 2)
    return merge_centres(selection, score, cls_attention.mean(dim=1), nearness, neighbours)


def centres_by_question(
    selection: Selection,
    score: Tensor,
    carried: Tensor,
    tokens: Tensor,
    text_tokens: Tensor,
    text_rows: Tensor,
    question: float = 1.8,
    neighbours: Neighbours = 32,
) -> Tensor:
    """Recoverable Compression: the same with ``carried [G,N]`` as weights; near is what is similar to the centre and
    to the question.

    Nearness is the cosine of ``tokens [G,N,D]`` plus ``question`` times the token's similarity to the question (see
    :func:`question_similarity`). The default is the authors' 50 / sqrt(768).
    """
    unit = unit_rows(tokens)
    similar = question_similarity(tokens, text_tokens, text_rows).unsqueeze(1)
    nearness = take_rows(unit, selection.keep) @ unit.transpose(1, 2) + question * similar
    return merge_centres(selection, score, carried, nearness, neighbours)


def merge_centres(selection: Selection, score: Tensor, weight: Tensor, nearness: Tensor, neighbours: int) -> Tensor:
    """Centres and one leftover token, ``mix [G,k,N]`` whose rows do not sum to one.

    Of the selection's targets (all survivors, if it marks none) the lowest in ``score [G,N]`` is the place of the
    leftover token, the ``weight [G,N]``-weighted sum of all that did not survive and of what stood in that place. The
    other targets are centres: to a centre is added the weighted sum of the ``neighbours`` tokens nearest to it
    (``nearness [G,k,N]``), itself and survivors that are no targets left out. Those stay as they are.
    """
    keep = selection.keep
    k, count = keep.shape[1], score.shape[1]
    target = torch.ones_like(keep, dtype=torch.bool) if selection.targets is None else selection.targets
    height = torch.where(target, -score.gather(1, keep), -torch.inf)
    place = torch.arange(k, device=keep.device)
    last = ((place == height.argmax(dim=1, keepdim=True)) & target).to(score.dtype).unsqueeze(-1)
    centre = target.to(score.dtype).unsqueeze(-1) - last

    stays = _one_hot(keep, count)
    plain = (stays * (1.0 - target.to(score.dtype).unsqueeze(-1))).sum(dim=1, keepdim=True)
    candidates = (1.0 - plain) * (1.0 - stays)
    nearness = torch.where(candidates > 0.5, nearness, -torch.inf)
    near = nearness.topk(min(neighbours, count), dim=-1).indices
    gained = torch.zeros_like(nearness).scatter(2, near, 1.0) * candidates
    weight = weight.unsqueeze(1)
    gone = 1.0 - (stays * (1.0 - last)).sum(dim=1, keepdim=True)
    return stays * (1.0 - last) + centre * gained * weight + last * gone * weight


def top_k_and_centres(score: Tensor, k: int, visual: Share = 0.5, text: Share = 0.25) -> Selection:
    """The k highest of ``score [G,N]``, of which all but the k1 + k2 highest are targets (:func:`split_budget`)."""
    keep = top_k(score, k).keep
    plain = sum(split_budget(k, visual, text))
    if plain == 0:
        return Selection(keep, torch.ones_like(keep, dtype=torch.bool))
    highest = score.gather(1, keep).topk(plain, dim=1).indices
    return Selection(keep, torch.ones_like(keep, dtype=torch.bool).scatter(1, highest, False))


def _one_hot(keep: Tensor, count: int) -> Tensor:
    """``keep [G,k]`` as rows ``[G,k,N]`` with a one each, float32."""
    return (torch.arange(count, device=keep.device) == keep.unsqueeze(-1)).to(torch.float32)


SELECTORS: dict[str, Callable[..., Selection]] = {"top_k_and_centres": top_k_and_centres}
MERGES: dict[str, Callable[..., Tensor]] = {
    "centres_by_keys": centres_by_keys,
    "centres_by_question": centres_by_question,
    "nearest_mean": nearest_mean,
}
