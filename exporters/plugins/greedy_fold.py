"""Kernel: greedy selection whose state is one number per token: max-min, max-sum, weighted max-min, relevance.

Each of K dependent steps folds the chosen token's row of the table into the state and looks for the highest gain. One
program per group does them all in one launch. Up to ``TILE`` tokens the state stays in registers; beyond, it lies in an
output of the kernel, since a plugin has no workspace, and a step walks over it tile by tile.

A chosen token's state is put at an infinity that every further fold leaves where it is: that marks it as taken.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from secateur.exporters.plugins.launch import Launch, Shapes, cover

TILE = 4096


@triton.jit
def _fold(state, row, RULE: tl.constexpr):  # type: ignore[no-untyped-def]
    if RULE == "sum":
        state = state + row
    elif RULE == "relevance":
        state = tl.maximum(state, row)
    else:
        state = tl.minimum(state, row)
    return state


@triton.jit
def _gain(state, weight, RULE: tl.constexpr, TRADE: tl.constexpr, REST: tl.constexpr, TAKEN: tl.constexpr):  # type: ignore[no-untyped-def]
    gain = state
    if RULE == "weighted":
        gain = weight * state
    elif RULE == "relevance":
        gain = TRADE * weight - REST * state
    return tl.where(state == TAKEN, float("-inf"), gain)


@triton.jit
def pick_by_fold(  # type: ignore[no-untyped-def]
    table, start, weight, picks, state,
    COUNT: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr, TRADE: tl.constexpr, REST: tl.constexpr,
    TAKEN: tl.constexpr, IN_REGISTERS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``table [G,N,N]`` float32, ``start [G]`` int32, ``weight [G,N]`` float32 where the rule reads it; ``picks [G,K]``
    int32 in the order they are picked, ``state [G,N]`` float32 scratch, unused where the state is in registers."""
    group = tl.program_id(0).to(tl.int64)
    table += group * COUNT * COUNT
    picks += group * K
    lanes = tl.arange(0, TILE)
    pick = tl.load(start + group)
    tl.store(picks, pick)
    if IN_REGISTERS:
        real = lanes < COUNT
        scale = tl.zeros([TILE], tl.float32)
        if RULE == "weighted" or RULE == "relevance":
            scale = tl.load(weight + group * COUNT + lanes, mask=real, other=0.0)
        held = tl.load(table + pick.to(tl.int64) * COUNT + lanes, mask=real, other=TAKEN)
        held = tl.where(lanes == pick, TAKEN, held)
        for step in range(1, K):
            pick = tl.argmax(_gain(held, scale, RULE, TRADE, REST, TAKEN), 0)
            tl.store(picks + step, pick)
            row = tl.load(table + pick.to(tl.int64) * COUNT + lanes, mask=real, other=TAKEN)
            held = tl.where(lanes == pick, TAKEN, _fold(held, row, RULE))
    else:
        state += group * COUNT
        for step in range(1, K):
            best = float("-inf")
            following = pick
            for first in range(0, COUNT, TILE):
                at = first + lanes
                real = at < COUNT
                row = tl.load(table + pick.to(tl.int64) * COUNT + at, mask=real, other=TAKEN)
                held = row
                if step > 1:
                    held = _fold(tl.load(state + at, mask=real, other=TAKEN), row, RULE)
                held = tl.where(at == pick, TAKEN, held)
                tl.store(state + at, held, mask=real)
                scale = tl.zeros([TILE], tl.float32)
                if RULE == "weighted" or RULE == "relevance":
                    scale = tl.load(weight + group * COUNT + at, mask=real, other=0.0)
                gain = _gain(held, scale, RULE, TRADE, REST, TAKEN)
                high = tl.max(gain, 0)
                following = tl.where(high > best, first + tl.argmax(gain, 0), following)
                best = tl.maximum(best, high)
            pick = following
            tl.store(picks + step, pick)
            tl.debug_barrier()  # what a thread stored another may read


def launch(shapes: Shapes, dtypes: tuple[str, ...], settings: dict[str, Any], tile: int = TILE) -> Launch:
    """``shapes`` of table, start, weight. ``settings``: k, rule (of ``compiler/greedy.py``), trade."""
    groups, count, _ = shapes[0]
    rule = str(settings["rule"])
    in_registers = count <= tile
    return Launch(
        pick_by_fold,
        (groups, 1, 1),
        {"table": "fp32", "start": "i32", "weight": "fp32", "picks": "i32", "state": "fp32"},
        {
            "COUNT": count, "K": int(settings["k"]), "RULE": rule, "TRADE": float(settings["trade"]),
            "REST": 1.0 - float(settings["trade"]), "TAKEN": float("inf" if rule == "relevance" else "-inf"),
            "IN_REGISTERS": in_registers, "TILE": cover(count, 128) if in_registers else tile,
        },
        warps=16 if count > 1024 else 8,
    )  # fmt: skip
