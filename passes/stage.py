"""A planned stage as one function of its signals: what the compiler splices in and the eager oracle calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.compiler.recipe import PlannedStage
from secateur.compiler.token_map import TokenMap
from secateur.passes.methods.select import Selection
from secateur.passes.vocabulary import BoundStage, BoundTerm, bind_stage


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
    def signal_options(self) -> Mapping[str, Mapping[str, str]]:
        """Options by signal name, defaults filled in."""
        return self.bound.signals

    def __call__(self, signals: Mapping[str, Tensor]) -> TokenMap:
        count, k = self.planned.length_in, self.planned.length_out
        reserved: dict[str, Any] = {"k": k}
        if self.bound.score is not None:
            reserved["score"] = score = _apply(self.bound.score, signals, reserved)
            assert score.shape[1:] == (count,), f"{self.planned}: score has shape {tuple(score.shape)}"
        reserved["selection"] = selection = _apply(self.bound.select, signals, reserved)
        keep = selection.keep
        assert keep.shape[1:] == (k,), f"{self.planned}: keep has shape {tuple(keep.shape)}"
        if self.bound.merge is None:
            return TokenMap(keep)
        mix = _apply(self.bound.merge, signals, reserved)
        assert mix.shape == (keep.shape[0], k, count), f"{self.planned}: mix has shape {tuple(mix.shape)}"
        return TokenMap(keep, mix)

    def score(self, signals: Mapping[str, Tensor]) -> Tensor:
        """The score ``[G,N]`` alone, for a stage that has one."""
        assert self.bound.score is not None, f"{self.planned} has no score"
        result: Tensor = _apply(self.bound.score, signals, {"k": self.planned.length_out})
        return result

    def choose(self, reserved: Mapping[str, Tensor]) -> Tensor:
        """``keep [G,K]`` of the selector alone, for a score given as ``{"score": [G,N]}``."""
        keep: Tensor = _apply(self.bound.select, {}, {"k": self.planned.length_out, **reserved}).keep
        return keep

    def with_keep(self, signals: Mapping[str, Tensor], keep: Tensor) -> TokenMap:
        """The map this stage makes when told to keep ``keep [G,K]``: for comparing runs that chose differently.

        A selector that marks merge targets takes them from what its score ranks below the outright survivors, so of a
        forced set the targets are its lowest-scoring members. Eager only.
        """
        if self.bound.merge is None:
            return TokenMap(keep)
        reserved: dict[str, Any] = {"k": self.planned.length_out}
        if self.bound.score is not None:
            reserved["score"] = _apply(self.bound.score, signals, reserved)
        targets = _apply(self.bound.select, signals, reserved).targets
        if targets is not None:
            order = reserved["score"].gather(1, keep).argsort(1, stable=True)
            lowest = order[:, : int(targets[0].sum())]
            targets = torch.zeros_like(targets).scatter(1, lowest, True)
        reserved["selection"] = Selection(keep, targets)
        return TokenMap(keep, _apply(self.bound.merge, signals, reserved))


def stage_function(planned: PlannedStage) -> StageFunction:
    """Resolve the names of a planned stage; :class:`UserError` lists what exists when one does not."""
    return StageFunction(planned, bind_stage(planned, where=planned.name))


def _apply(term: BoundTerm, signals: Mapping[str, Tensor], reserved: Mapping[str, Any]) -> Any:
    arguments: dict[str, Any] = {name: signals[name] for name in term.signals}
    arguments |= {name: reserved[name] for name in term.reserved}
    return term.function(**arguments, **term.options)
