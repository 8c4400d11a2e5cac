"""A planned stage as one function of its signals: what the compiler splices in and the eager oracle calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.compiler.plan_recipe import Gridless, PlannedStage
from secateur.compiler.token_map import TokenMap
from secateur.passes.check_function import check_stage
from secateur.passes.methods.rows import Scored
from secateur.passes.methods.select import Selection
from secateur.passes.needs import listens
from secateur.passes.vocabulary import BoundStage, BoundTerm, bind_stage
from secateur.runtime.errors import UserError


class StageResult(NamedTuple):
    """``map`` is what stays and how it is mixed; ``carry [G,N]`` float32 is what the stage tells later ones about the
    tokens that *entered* it, or None for a stage without a score."""

    map: TokenMap
    carry: Tensor | None


@dataclass(frozen=True)
class StageFunction:
    """Score, select, merge with every choice made. ``signals`` are the names it needs, sorted.

    Called with those signals by name (float32, N = ``planned.length_in``; shapes in ``passes/signal_table.py``) it
    returns a :class:`TokenMap` with exactly ``planned.length_out`` tokens per group. Every shape is static, so the
    call can be traced.
    """

    planned: PlannedStage
    bound: BoundStage

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(sorted(self.bound.signals))

    @property
    def signal_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Options by signal name, defaults filled in."""
        return self.bound.signals

    @property
    def _known(self) -> dict[str, Any]:
        """What functions receive that the plan fixes."""
        return {"k": self.planned.length_out, "grid": self.planned.grid, "layout": self.planned.layout}

    def __call__(self, signals: Mapping[str, Tensor]) -> TokenMap:
        return self.run(signals).map

    def run(self, signals: Mapping[str, Tensor], keep: Tensor | None = None) -> StageResult:
        """The stage's map and carry. ``keep [G,K]`` replaces the choice, not the merge (eager only)."""
        count, k = self.planned.length_in, self.planned.length_out
        reserved, carry = self._reserve(signals)
        if self.bound.select is None:
            assert carry is not None, f"{self.planned} neither scores nor selects"
            everything = torch.arange(count).unsqueeze(0).expand(carry.shape[0], count)
            return StageResult(TokenMap(everything), carry)
        selection = _apply(self.bound.select, signals, reserved)
        if keep is not None and not torch.equal(selection.keep, keep):
            selection = _force(selection, keep, reserved)
        keep = selection.keep
        assert keep.shape[1:] == (k,), f"{self.planned}: keep has shape {tuple(keep.shape)}"
        if self.bound.merge is None:
            return StageResult(TokenMap(keep), carry)
        mix = _apply(self.bound.merge, signals, reserved | {"selection": selection})
        assert mix.shape == (keep.shape[0], k, count), f"{self.planned}: mix has shape {tuple(mix.shape)}"
        return StageResult(TokenMap(keep, mix), carry)

    def score(self, signals: Mapping[str, Tensor]) -> Tensor:
        """The score ``[G,N]`` alone, for a stage that has one."""
        assert self.bound.score is not None, f"{self.planned} has no score"
        result: Tensor = self._reserve(signals)[0]["score"]
        return result

    def choose(self, reserved: Mapping[str, Tensor], signals: Mapping[str, Tensor] | None = None) -> Tensor:
        """``keep [G,K]`` of the selector alone, for a score given as ``{"score": [G,N]}``."""
        assert self.bound.select is not None, f"{self.planned} selects nothing"
        given = {**self._known, **reserved}
        keep: Tensor = _apply(self.bound.select, signals or {}, given).keep
        return keep

    def with_keep(self, signals: Mapping[str, Tensor], keep: Tensor) -> TokenMap:
        """The map this stage makes when told to keep ``keep [G,K]``: for comparing runs that chose differently.

        A selector that marks merge targets takes them from what its score ranks below the outright survivors, so of a
        forced set the targets are its lowest-scoring members. Eager only.
        """
        return self.run(signals, keep).map

    def _reserve(self, signals: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor | None]:
        """What functions receive besides signals, the score among it; and what the stage carries on."""
        reserved = self._known
        if self.bound.score is None:
            return reserved, None
        scored = _score(self.bound.score, signals, reserved)
        for value in scored:
            assert value.shape[1:] == (self.planned.length_in,), f"{self.planned}: score is {tuple(value.shape)}"
        return reserved | {"score": scored.score}, scored.carry


_ANOTHER = "use another recipe, such as divprune"
_GRIDLESS: Mapping[Gridless | None, tuple[str, str]] = {
    "pruned": ("an earlier stage removed some", "let it be the first stage that prunes"),
    "sizes": ("images of several sizes have several", f"compile for images of one size, or {_ANOTHER}"),
    "tiles": ("an image in tiles has several", _ANOTHER),
    "sound": ("in the decoder sound lies between them", f"compile without sound, or {_ANOTHER}"),
    None: ("how they lie is not known", _ANOTHER),
}


def stage_function(planned: PlannedStage) -> StageFunction:
    """Resolve the names of a planned stage; :class:`UserError` lists what exists when one does not.

    Functions from outside this package are tried on random signals first.
    """
    bound = bind_stage(planned, where=planned.name)
    if planned.grid is None and any("grid" in term.every_reserved() for term in bound.terms):
        lacks, fix = _GRIDLESS[planned.gridless]
        raise UserError(
            f"a function of this stage needs the whole grid of patches, and {lacks}",
            where=f"{planned.name} {planned.site}", fix=fix,
        )  # fmt: skip
    entered = 0 if planned.layout is None else len(planned.layout.frames)
    if planned.length_in != entered and any(_reads_every_token(term) for term in bound.terms):
        raise UserError(
            "a function of this stage takes every token at its moment, and an earlier stage removed some",
            where=f"{planned.name} {planned.site}",
            fix="let it be the first stage that prunes, or ask for the signal source",
        )
    deaf = planned.layout is not None and 1 not in planned.layout.modalities
    if deaf and planned.score is not None and (name := listens(planned.score)):
        raise UserError(
            f"{name} compares what is seen with what is heard, and nothing is heard",
            where=f"{planned.name} {planned.site}",
            fix="compile a model that hears for media with sound, as --audio-seconds 4, or use another recipe",
        )
    stage = StageFunction(planned, bound)
    check_stage(stage)
    return stage


def _reads_every_token(term: BoundTerm) -> bool:
    """Whether a function reads the layout without ``source``, which says where in it the tokens left are."""
    return ("layout" in term.reserved and "source" not in term.signals) or any(map(_reads_every_token, term.of))


def _score(term: BoundTerm, signals: Mapping[str, Tensor], reserved: Mapping[str, Any]) -> Scored:
    """A score with the scores it is made of. What one of those carries on counts for the whole, if only one does."""
    parts = [_score(inner, signals, reserved) for inner in term.of]
    given = dict(reserved)
    if parts:
        given |= {"score": parts[0].score, "scores": tuple(part.score for part in parts)}
    result = _apply(term, signals, given)
    if isinstance(result, Scored):
        return result
    told = [part.carry for part in parts if part.carry is not part.score]
    return Scored(result, told[0] if len(told) == 1 else result)


def _force(selection: Selection, keep: Tensor, reserved: Mapping[str, Any]) -> Selection:
    """``selection`` with other survivors. Pairs a selector made itself are lost with it: the dropped stay dropped."""
    targets, assigned = selection.targets, selection.assigned
    if targets is not None:
        order = reserved["score"].gather(1, keep).argsort(1, stable=True)
        lowest = order[:, : int(targets[0].sum())]
        targets = torch.zeros_like(targets).scatter(1, lowest, True)
    if assigned is not None:
        groups, k = keep.shape
        place = torch.arange(k).unsqueeze(0).expand(groups, k)
        assigned = torch.full_like(assigned, k).scatter(1, keep, place)
    return Selection(keep, targets, assigned)


def _apply(term: BoundTerm, signals: Mapping[str, Tensor], reserved: Mapping[str, Any]) -> Any:
    arguments: dict[str, Any] = {name: signals.get(name) for name in term.signals}
    arguments |= {name: reserved[name] for name in term.reserved}
    return term.function(**arguments, **term.options)
