"""Whether two runs that kept different tokens chose differently or only met a tie.

Scores within ``c * eps(float32) * max|s|`` of each other are interchangeable. c covers what two correct programs
differ by before the score is taken: other summation orders in every layer up to the site. A choice counts as a tie only
when interchanging such scores, and nothing else, leads to it.
"""

from __future__ import annotations

from itertools import combinations, islice

import torch
from torch import Tensor

from secateur.passes.stage import StageFunction

TIE_FACTOR = 256.0
_RESOLUTIONS = 500
"""Ways to resolve a tie that are tried; more tokens than that at one cut is not a tie but a constant score."""


def is_tied(stage: StageFunction, kept: Tensor, score: Tensor | None, tokens: Tensor) -> bool:
    """Whether ``kept [groups*K]`` (indices into the row, per group offset) is what the stage chooses up to ties.

    ``score [G,N]`` for selectors that rank; ``tokens [G,N,D]`` for greedy ones, whose steps are replayed one by one
    with the choices made so far held fixed. Every group must be explained.
    """
    planned = stage.planned
    groups = (
        kept.reshape(planned.groups, planned.length_out) - torch.arange(planned.groups)[:, None] * planned.length_in
    )
    tokens = tokens.reshape(planned.groups, planned.length_in, -1)
    if score is not None:
        return all(_ranks_to(stage, row, own) for row, own in zip(score, groups, strict=True))
    return all(_walks_to(group, own) for group, own in zip(tokens, groups, strict=True))


def _ranks_to(stage: StageFunction, score: Tensor, kept: Tensor) -> bool:
    """Whether some order of the scores that are equal within the tolerance selects ``kept``."""
    tolerance, k = _tolerance(score), stage.planned.length_out
    ranked = score.sort(descending=True).values
    for cut in range(1, k + 1):  # selectors of several parts cut the ranking above k as well
        edge = ranked[cut - 1]
        tied = (score - edge).abs() <= tolerance
        above = (score > edge) & ~tied
        if int(tied.sum()) < 2:
            continue
        members, room = tied.nonzero()[:, 0].tolist(), cut - int(above.sum())
        for chosen in islice(combinations(members, room), _RESOLUTIONS):
            lifted = score.clone()
            lifted[list(chosen)] = edge + 2 * tolerance
            if torch.equal(stage.choose({"score": lifted[None]})[0], kept):
                return True
    return torch.equal(stage.choose({"score": score[None]})[0], kept)


def _walks_to(tokens: Tensor, kept: Tensor) -> bool:
    """Greedy k-center towards ``kept``: each step takes the farthest token, or a kept one as far within tolerance."""
    units = torch.nn.functional.normalize(tokens.double(), dim=-1)
    distance = 1.0 - units @ units.T
    tolerance = _tolerance(distance)
    state = distance.clone().fill_diagonal_(float("inf")).amin(0)
    left = set(kept.tolist())
    first = True
    while left:
        farthest = float(state.max())
        pick = max(left, key=lambda token: float(state[token]))
        if float(state[pick]) < farthest - tolerance:
            return False
        left.remove(pick)
        state = distance[pick].clone() if first else torch.minimum(state, distance[pick])
        state[torch.tensor([t for t in kept.tolist() if t not in left])] = -float("inf")
        first = False
    return True


def _tolerance(values: Tensor) -> float:
    return TIE_FACTOR * float(torch.finfo(torch.float32).eps) * float(values.abs().max())
