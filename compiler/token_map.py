"""The result of a stage: which tokens stay, and how each of them is mixed from the stage's input."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenMap(NamedTuple):
    """``keep [G,K]`` int64, strictly increasing source indices; ``mix [G,K,N]`` float32 or None.

    ``keep`` moves what cannot be averaged (positions, modality, masks), ``mix`` what can (hidden rows): row j of the
    output is ``mix[j] @ rows``. None stands for the one-hot matrix of ``keep``.
    """

    keep: Tensor
    mix: Tensor | None = None
