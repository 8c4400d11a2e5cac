"""Selectors built around a few tokens that the others are compared with: pivots, or centres of clusters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.passes.methods.rows import take_rows, unit_rows
from secateur.passes.methods.select import Selection

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]

_FARTHER = 4.0
"""More than any cosine distance."""


def unlike_pivots(
    normed_tokens: Tensor,
    normed_text: Tensor,
    keys: Tensor,
    text_keys: Tensor,
    text_rows: Tensor,
    k: int,
    visual_pivots: Annotated[int, Field(ge=1)] = 4,
    text_pivots: Count = 4,
) -> Selection:
    """A few pivots, and for each of them in turn the tokens that resemble it least (DART).

    Pivots are the ``visual_pivots`` tokens and the ``text_pivots`` of the text slots marked in ``text_rows [G,T]``
    whose keys (``keys [G,H,N,d]``, ``text_keys [G,H,T,d]``, all heads together) have the largest sum of absolute
    values. Visual pivots survive. From the largest visual pivot to the smallest text pivot each takes the tokens not
    yet taken with the smallest cosine to it (``normed_tokens [G,N,D]``, ``normed_text [G,T,D]``).

    The k - ``visual_pivots`` tokens left to take are divided equally, earlier pivots taking one more. A k below the
    number of visual pivots keeps the largest ones. Where fewer text slots count than there are text pivots, the
    largest one stands in for those missing.
    """
    own = min(visual_pivots, k)
    chosen = keys.abs().sum(dim=(1, 3)).topk(own).indices
    pivots = take_rows(normed_tokens, chosen)
    if text_pivots:
        strength = torch.where(text_rows, text_keys.abs().sum(dim=(1, 3)), -1.0)
        best = strength.topk(min(text_pivots, strength.shape[1]))
        text = torch.where(best.values < 0, best.indices[:, :1], best.indices)
        pivots = torch.cat([pivots, take_rows(normed_text, text)], dim=1)
    alike = unit_rows(pivots) @ unit_rows(normed_tokens).transpose(1, 2)
    picked, number = [chosen], pivots.shape[1]
    for turn in range(number):
        share = (k - own) // number + (turn < (k - own) % number)
        if share:
            taken = torch.cat(picked, dim=1)
            picked.append(alike[:, turn].scatter(1, taken, _FARTHER).topk(share, largest=False).indices)
    return Selection(torch.cat(picked, dim=1).sort(dim=-1).values)


def density_centres(
    score: Tensor,
    k: int,
    keys: Tensor,
    candidates: Share = 0.55,
    reach: Annotated[float, Field(ge=0)] = 0.315,
    width: Annotated[float, Field(gt=0)] = 2.0,
) -> Selection:
    """k centres of density-peak clusters, and which cluster each token joins (PACT, with a fixed number of centres).

    Candidates are the round(``candidates`` * N) tokens with the highest ``score [G,N]``, at least k. Their distance is
    one minus the cosine of ``keys [G,H,N,d]``, all heads together; a candidate's density is the sum of
    ``exp(-(distance / width)**2)`` over the candidates. Centres are the k candidates farthest from any denser one (of
    equally dense ones the earlier counts as denser); the densest of all comes first.

    Every candidate joins the nearest centre, and so does any other token nearer to one than ``reach``.
    """
    groups, _, count, _ = keys.shape
    units = unit_rows(keys.transpose(1, 2).reshape(groups, count, -1))
    distance = (1.0 - units @ units.transpose(1, 2)).clamp_min(0.0)
    entering = max(k, math.floor(candidates * count + 0.5))
    marks = torch.zeros_like(score).scatter(1, score.topk(entering).indices, 1.0)
    candidate = marks > 0
    density = (torch.exp(-((distance / width) ** 2)) * marks.unsqueeze(1)).sum(dim=-1)
    position = torch.arange(count, device=score.device)
    mine, other = density.unsqueeze(2), density.unsqueeze(1)
    denser = (other > mine) | ((other == mine) & (position < position.unsqueeze(1)))
    apart = torch.where(denser & candidate.unsqueeze(1), distance, _FARTHER).amin(dim=2)
    keep = torch.where(candidate, apart, -1.0).topk(k).indices.sort(dim=-1).values

    to_centres = take_rows(distance, keep)
    joins = candidate | (to_centres.amin(dim=1) <= reach)
    assigned = torch.where(joins, (-to_centres).argmax(dim=1), k)
    place = torch.arange(k, device=score.device).unsqueeze(0).expand(groups, k)
    return Selection(keep, None, assigned.scatter(1, keep, place))


SELECTORS: dict[str, Callable[..., Selection]] = {
    "density_centres": density_centres,
    "unlike_pivots": unlike_pivots,
}
