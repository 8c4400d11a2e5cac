"""The papers' definitions, written out as slow loops over single tokens in NumPy.

Nothing here is shared with the vocabulary in ``secateur.passes.methods``: the two must agree because both follow the
paper. One group at a time, no batch axis. A module's ``ROWS`` maps a recipe's name to a function of a :class:`View`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class View:
    """One stage as a paper sees it: which stage of the recipe, how many tokens stay, how the tokens lie, and the
    signals of one group, without the group axis (shapes otherwise as in ``passes/signal_table.py``). ``tokens`` is
    always there; ``carried`` is absent where no earlier stage scored."""

    stage: int
    k: int
    grid: tuple[int, int, int] | None
    signals: dict[str, np.ndarray[Any, Any]]
    frames: Sequence[int] = ()
    """Of every token of the group that entered the program, its moment; and its kind, 0 seen or 1 heard."""
    modalities: Sequence[int] = ()

    def __getattr__(self, name: str) -> np.ndarray[Any, Any]:
        try:
            return self.signals[name]
        except KeyError:
            raise AttributeError(f"no signal {name} at this stage") from None

    @property
    def count(self) -> int:
        return len(self.signals["tokens"])


@dataclass(frozen=True)
class Expected:
    """What the paper keeps, in ascending order; the rows it makes of ``tokens`` where it merges, ``[k,D]`` in the same
    order; and what it tells later stages about every token, ``[N]``, where that is not checked by ``keep``."""

    keep: Sequence[int]
    rows: np.ndarray[Any, Any] | None = None
    carry: Sequence[float] | None = None


Transcription = Callable[[View], Expected]
