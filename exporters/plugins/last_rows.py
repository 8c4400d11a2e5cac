"""Kernel: attention of a few query rows to all keys, softmax in float32.

One program per tile of the rows of all query heads that share a key head, which stand side by side: every key is read
once for all of them. The keys are walked over twice, first for the softmax's denominator, then to write.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from secateur.exporters.plugins.launch import Launch, Shapes, attention_blocks, ceil_divide, cover


@triton.jit
def last_rows(  # type: ignore[no-untyped-def]
    query, key, slots, out,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """``query [B,H,R,d]``, ``key [B,Hkv,L,d]``, ``slots [B,R]`` int32: a query sees the keys up to its own slot, or all
    where slots is None; ``out [B,H,R,L]`` float32."""
    key_head = tl.program_id(1)
    shared: tl.constexpr = HEADS // KEY_HEADS * ROWS
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    width = tl.arange(0, BLOCK_WIDTH)
    inside, wide = rows < shared, width < WIDTH
    query_rows = key_head.to(tl.int64) * shared + rows
    q = tl.load(query + query_rows[:, None] * WIDTH + width[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
    slot = tl.full([BLOCK_ROWS], KEYS, tl.int32)
    if slots is not None:
        slot = tl.load(slots + key_head // KEY_HEADS * ROWS + rows % ROWS, mask=inside, other=0)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, KEYS, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        real = keys < KEYS
        key_rows = key_head.to(tl.int64) * KEYS + keys
        k = tl.load(key + key_rows[None, :] * WIDTH + width[:, None], mask=real[None, :] & wide[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * SCALE
        score = tl.where(real[None, :] & (keys[None, :] <= slot[:, None]), score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
        highest = higher
    for first in range(0, KEYS, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        real = keys < KEYS
        key_rows = key_head.to(tl.int64) * KEYS + keys
        k = tl.load(key + key_rows[None, :] * WIDTH + width[:, None], mask=real[None, :] & wide[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * SCALE
        part = tl.exp(score - highest[:, None]) / total[:, None]
        part = tl.where(keys[None, :] <= slot[:, None], part, 0.0)
        tl.store(out + query_rows[:, None] * KEYS + keys[None, :], part, mask=inside[:, None] & real[None, :])


def launch(shapes: Shapes, dtypes: tuple[str, ...], settings: dict[str, Any]) -> Launch:
    """``shapes`` of query, key and, where the rest is hidden, slots. ``settings``: scale."""
    (batch, heads, rows, width), (_, key_heads, keys, _) = shapes[:2]
    _, block_keys = attention_blocks(width, dtypes[0])
    together = heads // key_heads * rows
    return Launch(
        last_rows,
        (ceil_divide(together, min(cover(together), 32)), batch * key_heads, 1),
        {"query": dtypes[0], "key": dtypes[1], "slots": "i32" if len(shapes) > 2 else None, "out": "fp32"},
        {
            "SCALE": float(settings["scale"]), "HEADS": heads, "KEY_HEADS": key_heads, "ROWS": rows, "KEYS": keys,
            "WIDTH": width, "BLOCK_ROWS": min(cover(together), 32), "BLOCK_KEYS": block_keys,
            "BLOCK_WIDTH": cover(width),
        },
    )  # fmt: skip
