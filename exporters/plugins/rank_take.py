"""Kernel: the K highest of a score in ascending order of their index and, fused, their rows.

Of equal scores the lower index goes first, as ONNX's TopK has it. Every program finds the K-th highest score bit by bit
(32 counts over the group's scores, which stay in cache), and then knows by itself which tokens stay and at which
place: no program waits for another. With rows, each program gathers ``PLACES`` of the survivors. No limit on K.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from secateur.exporters.plugins.launch import Launch, Shapes, ceil_divide, cover

TILE = 4096
PLACES = 16


@triton.jit
def _order(score):  # type: ignore[no-untyped-def]
    """Integers that compare as the floats do; both zeros are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def rank_take(  # type: ignore[no-untyped-def]
    score, rows, keep, taken,
    COUNT: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """``score [G,N]`` float32, ``rows [G,N,D]`` or None; ``keep [G,K]`` int32, ``taken [G,K,D]`` or None."""
    group = tl.program_id(1).to(tl.int64)
    score += group * COUNT
    keep += group * K
    lanes = tl.arange(0, TILE)
    least = tl.full([], -2147483648, tl.int64)
    for bit in range(0, 32):
        tried = least + (tl.full([], 1, tl.int64) << (31 - bit))
        above = 0
        for first in range(0, COUNT, TILE):
            at = first + lanes
            own = _order(tl.load(score + at, mask=at < COUNT, other=0.0))
            above += tl.sum(((own >= tried) & (at < COUNT)).to(tl.int32), 0)
        least = tl.where(above >= K, tried, least)
    higher = 0
    for first in range(0, COUNT, TILE):
        at = first + lanes
        own = _order(tl.load(score + at, mask=at < COUNT, other=0.0))
        higher += tl.sum(((own > least) & (at < COUNT)).to(tl.int32), 0)
    room = K - higher  # for those of exactly the K-th score, the first ones
    begin = tl.program_id(0) * PLACES
    equal = 0
    before = 0
    for first in range(0, COUNT, TILE):
        at = first + lanes
        own = _order(tl.load(score + at, mask=at < COUNT, other=0.0))
        ties = ((own == least) & (at < COUNT)).to(tl.int32)
        nth = equal + tl.cumsum(ties, 0) - ties
        stays = (((own > least) & (at < COUNT)) | ((ties > 0) & (nth < room))).to(tl.int32)
        place = before + tl.cumsum(stays, 0) - stays
        mine = (stays > 0) & (place >= begin) & (place < begin + PLACES)
        tl.store(keep + place, at, mask=mine)
        equal += tl.sum(ties, 0)
        before += tl.sum(stays, 0)
    if rows is not None:
        tl.debug_barrier()  # what a thread stored another may read
        rows += group * COUNT * WIDTH
        taken += group * K * WIDTH
        places = begin + tl.arange(0, PLACES)
        inside = places < K
        source = tl.load(keep + places, mask=inside, other=0).to(tl.int64)
        for first in range(0, WIDTH, ACROSS):
            across = first + tl.arange(0, ACROSS)
            there = inside[:, None] & (across < WIDTH)[None, :]
            part = tl.load(rows + source[:, None] * WIDTH + across[None, :], mask=there)
            tl.store(taken + places.to(tl.int64)[:, None] * WIDTH + across[None, :], part, mask=there)


def launch(shapes: Shapes, dtypes: tuple[str, ...], settings: dict[str, Any], tile: int = TILE) -> Launch:
    """``shapes`` of score and, where rows are gathered, of them. ``settings``: k."""
    groups, count = shapes[0]
    k, gathers = int(settings["k"]), len(shapes) > 1
    width = shapes[1][2] if gathers else 0
    places = PLACES if gathers else cover(k)
    kind = dtypes[1] if gathers else None
    return Launch(
        rank_take,
        (ceil_divide(k, places), groups, 1),
        {"score": "fp32", "rows": kind, "keep": "i32", "taken": kind},
        {
            "COUNT": count, "K": k, "WIDTH": width, "PLACES": places, "TILE": min(tile, cover(count, 128)),
            "ACROSS": min(cover(width), 512),
        },
        warps=8,
    )  # fmt: skip
