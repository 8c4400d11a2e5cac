"""Every function of the vocabulary by name, gathered from the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from secateur.passes.methods import (
    calibrate,
    learned,
    merge,
    merge_nearest,
    merge_pairs,
    merge_runs,
    per_modality,
    score,
    score_attention,
    score_change,
    score_geometry,
    score_tower,
    select,
    select_frames,
    select_greedy,
    select_pivots,
    select_recycle,
    select_windows,
    windows_in_time,
)

_MODULES: tuple[ModuleType, ...] = (
    score,
    select,
    merge,
    merge_pairs,
    merge_runs,
    score_change,
    score_attention,
    score_geometry,
    select_frames,
    select_greedy,
    select_pivots,
    select_recycle,
    calibrate,
    score_tower,
    select_windows,
    merge_nearest,
    windows_in_time,
    per_modality,
    learned,
)


def _gather(role: str) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for module in _MODULES:
        for name, function in getattr(module, role, {}).items():
            assert name not in found, f"two functions are called {name}"
            found[name] = function
    return found


SCORES = _gather("SCORES")
"""How much each token matters: ``[G,N]``, or :class:`Scored`."""
SELECTORS = _gather("SELECTORS")
MERGES = _gather("MERGES")
