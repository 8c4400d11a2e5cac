"""Kernel: greedy selection by coverage, every step of it in one launch.

A token's gain is a sum over all others, so a step reads the whole table; one program per group does that alone. For
many tokens the plain form, whose steps have the whole GPU, is faster: ``table.pays`` says from where on.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from secateur.exporters.plugins.launch import Launch, Shapes, cover

ACROSS, DOWN = 128, 32
"""Columns and rows of the tile a step walks over the table with."""


@triton.jit
def pick_by_coverage(  # type: ignore[no-untyped-def]
    table, start, weight, picks, covered, taken,
    COUNT: tl.constexpr, K: tl.constexpr, PRODUCT: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """``table [G,N,N]`` float32, ``start [G]`` int32, ``weight [G,N]`` float32; ``picks [G,K]`` int32 in the order they
    are picked, ``covered`` and ``taken [G,N]`` float32 scratch."""
    group = tl.program_id(0).to(tl.int64)
    table += group * COUNT * COUNT
    weight += group * COUNT
    picks += group * K
    covered += group * COUNT
    taken += group * COUNT
    down, across = tl.arange(0, DOWN), tl.arange(0, ACROSS)
    pick = tl.load(start + group)
    tl.store(picks, pick)
    for first in range(0, COUNT, ACROSS):
        at = first + across
        tl.store(taken + at, tl.where(at == pick, float("-inf"), 0.0), mask=at < COUNT)
    for step in range(1, K):
        for first in range(0, COUNT, ACROSS):
            at = first + across
            real = at < COUNT
            high = tl.load(table + pick.to(tl.int64) * COUNT + at, mask=real, other=0.0)
            if step > 1:
                high = tl.maximum(high, tl.load(covered + at, mask=real, other=0.0))
            tl.store(covered + at, high, mask=real)
        tl.debug_barrier()  # what a thread stored another may read
        best = float("-inf")
        following = pick
        for top in range(0, COUNT, DOWN):
            rows = top + down
            inside = rows < COUNT
            more = tl.zeros([DOWN], tl.float32)
            for first in range(0, COUNT, ACROSS):
                at = first + across
                real = at < COUNT
                there = rows.to(tl.int64)[:, None] * COUNT + at[None, :]
                alike = tl.load(table + there, mask=inside[:, None] & real[None, :], other=0.0)
                more += tl.sum(tl.maximum(alike - tl.load(covered + at, mask=real, other=0.0)[None, :], 0.0), 1)
            scale = tl.load(weight + rows, mask=inside, other=0.0)
            gain = scale * more if PRODUCT else scale + more
            gain = gain + tl.load(taken + rows, mask=inside, other=float("-inf"))
            high = tl.max(gain, 0)
            following = tl.where(high > best, top + tl.argmax(gain, 0), following)
            best = tl.maximum(best, high)
        pick = following
        tl.debug_barrier()
        tl.store(picks + step, pick)
        tl.store(taken + pick, float("-inf"))
        tl.debug_barrier()


def launch(shapes: Shapes, dtypes: tuple[str, ...], settings: dict[str, Any]) -> Launch:
    """``shapes`` of table, start, weight. ``settings``: k, product."""
    groups, count, _ = shapes[0]
    return Launch(
        pick_by_coverage,
        (groups, 1, 1),
        {"table": "fp32", "start": "i32", "weight": "fp32", "picks": "i32", "covered": "fp32", "taken": "fp32"},
        {
            "COUNT": count, "K": int(settings["k"]), "PRODUCT": bool(settings["product"]), "DOWN": DOWN,
            "ACROSS": min(ACROSS, cover(count)),
        },
        warps=16,
    )  # fmt: skip
