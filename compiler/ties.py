"""Whether two runs that kept different tokens chose differently or only met a tie.

Scores within ``c * eps(float32) * max|s|`` of each other are interchangeable. c covers what two correct programs
differ by before the score is taken: other summation orders in every layer up to the site. A choice counts as a tie only
when interchanging such scores, and nothing else, leads to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, combinations, islice

import torch
from torch import Tensor

from secateur.passes.stage import StageFunction

TIE_FACTOR = 256.0
_SHAKES = 64
_RESOLUTIONS = 500
"""Ways to resolve a tie that are tried; more tokens than that at one cut is not a tie but a constant score."""


def is_tied(stage: StageFunction, kept: Tensor, score: Tensor | None, signals: Mapping[str, Tensor]) -> bool:
    """Whether ``kept [groups*K]`` (indices into the row, per group offset) is what the stage chooses up to ties.

    ``score [G,N]`` for selectors that rank by it alone: scores are interchanged, and where the score is made of others
    that may not explain it, signals are shaken as below. Greedy k-center is replayed step by
    step with the choices made so far held fixed. Every other selector is run again on ``signals`` (by name, all G
    groups) that differ by less than the tolerance. Every group must be explained.
    """
    planned = stage.planned
    groups = (
        kept.reshape(planned.groups, planned.length_out) - torch.arange(planned.groups)[:, None] * planned.length_in
    )
    select = stage.bound.select
    assert select is not None, "a stage that only scores chooses nothing"
    if score is not None and not select.signals:
        if all(_ranks_to(stage, row, own) for row, own in zip(score, groups, strict=True)):
            return True
        # A score made of others, or one that knows k, may rank one of two tied tokens far above the other: quotas do. A
        # selector that ranks kinds of token apart has cuts of its own in each.
        assert stage.bound.score is not None
        chained = bool(stage.bound.score.of) or "k" in stage.bound.score.reserved
        apart = chained or "layout" in select.reserved
        return apart and _wavers_to(stage, signals, groups)
    if score is None and select.signals == ("tokens",) and select.name == "max_min":
        return all(_walks_to(group, own) for group, own in zip(signals["tokens"], groups, strict=True))
    return _wavers_to(stage, signals, groups)


def _wavers_to(stage: StageFunction, signals: Mapping[str, Tensor], kept: Tensor) -> bool:
    """Whether every token that was chosen otherwise is one whose choice changes when signals change by no more than
    the tolerance: greedy choices, chains of scores and matchings, where no single rank decides."""
    own = stage.run(signals).map.keep
    differs = _members(own, stage.planned.length_in) != _members(kept, stage.planned.length_in)
    source = torch.Generator().manual_seed(0)
    seen = _members(own, stage.planned.length_in)
    always, ever = seen.clone(), seen.clone()
    for _ in range(_SHAKES):
        shaken = {
            name: value + _tolerance(value[value.isfinite()]) * (2 * torch.rand(value.shape, generator=source) - 1)
            if value.is_floating_point()
            else value
            for name, value in signals.items()
        }
        chosen = _members(stage.run(shaken).map.keep, stage.planned.length_in)
        always, ever = always & chosen, ever | chosen
    return bool((differs <= (ever & ~always)).all())


def _members(kept: Tensor, count: int) -> Tensor:
    """Indices ``[G,K]`` as flags ``[G,count]``."""
    return torch.zeros(len(kept), count, dtype=torch.bool).scatter(1, kept, True)


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
        ways: Iterable[tuple[int, ...]] = islice(combinations(members, room), _RESOLUTIONS)
        own = set(kept.tolist())
        wanted = [token for token in members if token in own]
        if edge == 0 and len(wanted) == room and bool((score != 0).any()):
            # What lies outside a sliding window is attended to exactly as little: there every choice is as good. A
            # score of nothing but zeros is none.
            ways = chain([tuple(wanted)], ways)
        for chosen in ways:
            lifted = score.clone()
            lifted[list(chosen)] = edge + (2 * tolerance or 1.0)
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
