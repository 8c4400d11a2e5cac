"""Kernel: attention received per key, the mean over the queries that count, from the rows' log-sum-exp.

The second half: one program per tile of keys of a query head walks over the queries, makes the tile's probabilities
again and adds up their columns. No two programs write the same place, so sums are the same every time.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from secateur.exporters.plugins.launch import Launch, Shapes, attention_blocks, ceil_divide, cover


@triton.jit
def column_sums(  # type: ignore[no-untyped-def]
    query, key, lse, last, slots, out,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """As ``row_log_sum_exp``; ``lse [B,H,R]`` float32, ``last [B]`` int32 the highest slot of a query that counts, at
    least 0 and one that is there; ``out [B,H,L]`` float32."""
    head = tl.program_id(1)
    batch = head // HEADS
    key_head = batch * KEY_HEADS + head % HEADS // (HEADS // KEY_HEADS)
    first = tl.program_id(0) * BLOCK_KEYS
    keys = first + tl.arange(0, BLOCK_KEYS)
    width = tl.arange(0, BLOCK_WIDTH)
    real, wide = keys < KEYS, width < WIDTH
    key_rows = key_head.to(tl.int64) * KEYS + keys
    k = tl.load(key + key_rows[None, :] * WIDTH + width[:, None], mask=real[None, :] & wide[:, None], other=0.0)
    bound = tl.load(last + batch)
    begin = 0
    end = ROWS
    if slots is None:  # rows stand in the order of their slots: those before the tile and behind the bound add nothing
        if CAUSAL:
            begin = first // BLOCK_ROWS * BLOCK_ROWS
        end = tl.minimum(bound + 1, ROWS)
    received = tl.zeros([BLOCK_KEYS], tl.float32)
    counted = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(begin, end, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside = rows < ROWS
        query_rows = head.to(tl.int64) * ROWS + rows
        q = tl.load(
            query + query_rows[:, None] * WIDTH + width[None, :], mask=inside[:, None] & wide[None, :], other=0.0
        )
        sums = tl.load(lse + query_rows, mask=inside, other=0.0)
        slot = rows
        if slots is not None:
            slot = tl.load(slots + batch * ROWS + rows, mask=inside, other=0)
        counts = inside & (slot <= bound)
        counted += counts.to(tl.float32)
        seen = counts[:, None] & real[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= slot[:, None])
        score = tl.dot(q, k, input_precision="ieee") * SCALE
        received += tl.sum(tl.where(seen, tl.exp(score - sums[:, None]), 0.0), 0)
    number = tl.sum(counted, 0)
    if slots is None:
        number = end.to(tl.float32)
    tl.store(out + head.to(tl.int64) * KEYS + keys, received / number, mask=real)


def launch(shapes: Shapes, dtypes: tuple[str, ...], settings: dict[str, Any]) -> Launch:
    """``shapes`` of query, key, lse, last and, for chosen queries, slots. ``settings``: scale, causal."""
    (batch, heads, rows, width), (_, key_heads, keys, _) = shapes[:2]
    block_rows, block_keys = attention_blocks(width, dtypes[0])
    return Launch(
        column_sums,
        (ceil_divide(keys, block_keys), batch * heads, 1),
        {
            "query": dtypes[0], "key": dtypes[1], "lse": "fp32", "last": "i32",
            "slots": "i32" if len(shapes) > 4 else None, "out": "fp32",
        },
        {
            "SCALE": float(settings["scale"]), "HEADS": heads, "KEY_HEADS": key_heads, "ROWS": rows, "KEYS": keys,
            "WIDTH": width, "CAUSAL": bool(settings["causal"]), "BLOCK_ROWS": block_rows, "BLOCK_KEYS": block_keys,
            "BLOCK_WIDTH": cover(width),
        },
    )  # fmt: skip
