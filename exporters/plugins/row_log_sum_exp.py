"""Kernel: the logarithm of every query's softmax denominator, the first half of attention received per key.

Scores are made tile by tile and thrown away; nothing of N x N is stored. One program per tile of queries of a head; a
running maximum keeps the sum finite. Grouped heads read the key head they share.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from secateur.exporters.plugins.launch import Launch, Shapes, attention_blocks, ceil_divide, cover


@triton.jit
def row_log_sum_exp(  # type: ignore[no-untyped-def]
    query, key, slots, out,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """``query [B,H,R,d]``, ``key [B,Hkv,L,d]``, ``slots [B,R]`` int32 of the queries, or None when row r is slot r;
    ``out [B,H,R]`` float32."""
    head = tl.program_id(1)
    batch = head // HEADS
    key_head = batch * KEY_HEADS + head % HEADS // (HEADS // KEY_HEADS)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    width = tl.arange(0, BLOCK_WIDTH)
    inside = rows < ROWS
    wide = width < WIDTH
    query_rows = head.to(tl.int64) * ROWS + rows
    q = tl.load(query + query_rows[:, None] * WIDTH + width[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
    slot = rows
    if slots is not None:
        slot = tl.load(slots + batch * ROWS + rows, mask=inside, other=0)
    end = KEYS
    if CAUSAL:
        end = tl.minimum(tl.max(slot, 0) + 1, KEYS)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, end, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        real = keys < KEYS
        key_rows = key_head.to(tl.int64) * KEYS + keys
        k = tl.load(key + key_rows[None, :] * WIDTH + width[:, None], mask=real[None, :] & wide[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * SCALE
        seen = real[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= slot[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
        highest = higher
    tl.store(out + query_rows, highest + tl.log(total), mask=inside)


def launch(shapes: Shapes, dtypes: tuple[str, ...], settings: dict[str, Any]) -> Launch:
    """``shapes`` of query, key and, for chosen queries, slots. ``settings``: scale, causal."""
    (batch, heads, rows, width), (_, key_heads, keys, _) = shapes[:2]
    block_rows, block_keys = attention_blocks(width, dtypes[0])
    return Launch(
        row_log_sum_exp,
        (ceil_divide(rows, block_rows), batch * heads, 1),
        {"query": dtypes[0], "key": dtypes[1], "slots": "i32" if len(shapes) > 2 else None, "out": "fp32"},
        {
            "SCALE": float(settings["scale"]), "HEADS": heads, "KEY_HEADS": key_heads, "ROWS": rows, "KEYS": keys,
            "WIDTH": width, "CAUSAL": bool(settings["causal"]), "BLOCK_ROWS": block_rows, "BLOCK_KEYS": block_keys,
            "BLOCK_WIDTH": cover(width),
        },
    )  # fmt: skip
