"""Kernel: greedy determinantal selection (fast greedy MAP), every step of it in one launch.

The state is K rows of a Cholesky factor and what is left of each token's variance; both lie in outputs of the kernel,
since a plugin has no workspace. One program per group. Step s reads the s rows made before it: K * K * N / 2 numbers
in all, which is what bounds it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from secateur.compiler.greedy import SPENT
from secateur.exporters.plugins.launch import Launch, Shapes, cover

TILE = 4096
TOGETHER = 4
"""Rows of the factor that are read at once."""


@triton.jit
def _spread(left, score, SPENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The square root of the variance left of tokens outside the span; minus infinity of the others."""
    return tl.where(left > SPENT, score * tl.sqrt_rn(tl.maximum(left, 0.0)), float("-inf"))


@triton.jit
def pick_by_determinant(  # type: ignore[no-untyped-def]
    table, score, picks, factor, left,
    COUNT: tl.constexpr, K: tl.constexpr, SPENT: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """``table [G,N,N]``, ``score [G,N]`` float32; ``picks [G,K]`` int32 in the order they are picked, ``factor
    [G,K,N]`` and ``left [G,N]`` float32 scratch."""
    group = tl.program_id(0).to(tl.int64)
    table += group * COUNT * COUNT
    score += group * COUNT
    picks += group * K
    factor += group * K * COUNT
    left += group * COUNT
    lanes = tl.arange(0, TILE)
    some = tl.arange(0, TOGETHER)
    best = float("-inf")
    pick = 0
    for first in range(0, COUNT, TILE):
        at = first + lanes
        real = at < COUNT
        all_left = tl.where(real, 1.0, float("-inf"))
        tl.store(left + at, all_left, mask=real)
        gain = _spread(all_left, tl.load(score + at, mask=real, other=0.0), SPENT)
        high = tl.max(gain, 0)
        pick = tl.where(high > best, first + tl.argmax(gain, 0), pick)
        best = tl.maximum(best, high)
    tl.debug_barrier()
    for step in range(0, K):
        tl.store(picks + step, pick)
        variance = tl.load(left + pick)
        inverse = tl.where(variance > SPENT, tl.div_rn(1.0, tl.sqrt_rn(tl.maximum(variance, SPENT))), 0.0)
        tl.debug_barrier()  # every thread has read what is left of the pick before its place is marked
        best = float("-inf")
        following = pick
        best_score = float("-inf")
        best_scored = pick
        for first in range(0, COUNT, TILE):
            at = first + lanes
            real = at < COUNT
            known = tl.zeros([TILE], tl.float32)
            for row in range(0, step, TOGETHER):
                rows = row + some
                made = rows < step
                there = rows.to(tl.int64) * COUNT
                part = tl.load(factor + there[:, None] + at[None, :], mask=made[:, None] & real[None, :], other=0.0)
                mine = tl.load(factor + there + pick, mask=made, other=0.0)
                known += tl.sum(part * mine[:, None], 0)
            alike = tl.load(table + tl.cast(pick, tl.int64) * COUNT + at, mask=real, other=0.0)
            new = (alike - known) * inverse
            tl.store(factor + tl.cast(step, tl.int64) * COUNT + at, new, mask=real)
            rest = tl.load(left + at, mask=real, other=float("-inf")) - new * new
            rest = tl.where(at == pick, float("-inf"), rest)
            tl.store(left + at, rest, mask=real)
            own = tl.load(score + at, mask=real, other=0.0)
            gain = _spread(rest, own, SPENT)
            high = tl.max(gain, 0)
            following = tl.where(high > best, first + tl.argmax(gain, 0), following)
            best = tl.maximum(best, high)
            free = tl.where(rest == float("-inf"), float("-inf"), own)
            high = tl.max(free, 0)
            best_scored = tl.where(high > best_score, first + tl.argmax(free, 0), best_scored)
            best_score = tl.maximum(best_score, high)
        # Inside the span of the chosen ones score alone decides.
        pick = tl.where(best > float("-inf"), following, best_scored)
        tl.debug_barrier()  # what a thread stored another may read


def launch(shapes: Shapes, dtypes: tuple[str, ...], settings: dict[str, Any], tile: int = TILE) -> Launch:
    """``shapes`` of table and score. ``settings``: k."""
    groups, count, _ = shapes[0]
    return Launch(
        pick_by_determinant,
        (groups, 1, 1),
        {"table": "fp32", "score": "fp32", "picks": "i32", "factor": "fp32", "left": "fp32"},
        {
            "COUNT": count, "K": int(settings["k"]), "SPENT": SPENT, "TILE": min(tile, cover(count, 128)),
            "TOGETHER": TOGETHER,
        },
        warps=16 if count > 1024 else 8,
    )  # fmt: skip
