"""Whether two runs that kept different tokens chose differently or only met a tie.

Scores within ``c * eps(float32) * max|s|`` of each other are interchangeable. c covers what two correct programs
differ by before the score is taken: other summation orders in every layer up to the site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.passes.stage import StageFunction

TIE_FACTOR = 256.0


def is_tied(stage: StageFunction, score: Tensor | None, tokens: Tensor) -> bool:
    """Whether a choice of this stage was decided by less than the tolerance.

    ``score [G,N]`` for selectors that rank, ``tokens [G,N,D]`` for greedy ones, whose steps are replayed one by one
    with the choices made so far held fixed.
    """
    if score is not None:
        return any(_has_close_cut(row, cut) for row in score for cut in _cuts(stage))
    return any(_has_close_step(group, stage.planned.length_out) for group in tokens)


def _cuts(stage: StageFunction) -> list[int]:
    """Ranks at which a small difference of scores changes the outcome."""
    k = stage.planned.length_out
    contextual = stage.planned.select.options.get("contextual", 0.156)
    share = min(max(int(contextual * k + 0.5), 1), k - 1)
    return [k - share] if stage.planned.select.name == "top_k_and_uniform" else [k]


def _has_close_cut(score: Tensor, cut: int) -> bool:
    if cut >= len(score):
        return False
    ranked = score.sort(descending=True).values
    return bool(ranked[cut - 1] - ranked[cut] <= _tolerance(score))


def _has_close_step(tokens: Tensor, k: int) -> bool:
    """Replay greedy k-center and look for a step whose two best candidates are nearly equal."""
    units = torch.nn.functional.normalize(tokens.double(), dim=-1)
    distance = 1.0 - units @ units.T
    nearest = distance.clone().fill_diagonal_(float("inf")).amin(0)
    state = None
    for _ in range(min(k, len(tokens) - 1)):
        rank = (nearest if state is None else state).topk(2)
        if float(rank.values[0] - rank.values[1]) <= _tolerance(distance):
            return True
        pick = int(rank.indices[0])
        state = distance[pick].clone() if state is None else torch.minimum(state, distance[pick])
        state[pick] = -float("inf")
    return False


def _tolerance(values: Tensor) -> float:
    return TIE_FACTOR * float(torch.finfo(torch.float32).eps) * float(values.abs().max())
