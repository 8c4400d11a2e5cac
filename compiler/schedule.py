"""Budgets that fix how several stages share one target, other than by published proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from secateur.runtime.errors import UserError


@dataclass(frozen=True)
class Exponential:
    """SEATS' schedule (arXiv 2605.20035): decoder stage i drops a number of tokens proportional to ``e ** i``.

    ``entry`` says how many times the mean over the decoder's layers the stage before its first layer leaves (SEATS:
    1.4); None where no stage stands there, so that every token enters. ``drop`` is the part of the entering tokens the
    decoder's stages drop where none gives that mean: in a shallow model stages stand late, or fall together.
    """

    entry: float | None = None
    drop: float | None = None

    def shares(self, keep: float, sites: Sequence[int], layers: int, end: int, where: str) -> tuple[float, list[float]]:
        """The share of tokens that enters the decoder, and the share left after each of its stages.

        ``sites`` are the stages' layers of ``layers``, ``end`` the first layer without any token (``layers`` if there
        is none), ``keep`` the share after the last stage. With c_i the part of the drop that is done after stage i,
        the entering tokens fall to ``1 - D * c_i``, and their mean over the layers is ``(end - D * W) / layers``
        where ``W = sum_i c_i * (k_(i+1) - k_i)``: linear in the total drop D, so that ``entry`` fixes D alone.
        Where that asks for more than every token to enter, every token enters and D follows from ``keep``.
        """
        weights = [math.exp(step) for step in range(len(sites))]
        done = [part / sum(weights) for part in accumulate(weights)]
        enter, drop = 1.0, 1.0 - keep
        if self.entry is not None:
            weighted = sum(part * (to - at) for part, (at, to) in zip(done, pairwise([*sites, end]), strict=True))
            fixed = (end - layers / self.entry) / weighted
            if not 0.0 <= fixed < 1.0 and self.drop is not None:
                fixed = self.drop
            if not 0.0 <= fixed < 1.0:
                raise UserError(
                    f"no exponential schedule over decoder layers {', '.join(map(str, sites))} of {layers} has a mean "
                    f"of 1/{self.entry:g} of the tokens that enter",
                    where=where,
                    fix=f"take an entry from {layers / end:.3g} to {layers / max(end - weighted, 1e-9):.3g}",
                )
            if keep <= 1.0 - fixed:
                enter, drop = keep / (1.0 - fixed), fixed
        return enter, [enter * (1.0 - drop * part) for part in done]
