"""How each backend wants attention, caches, rotary embedding, norms and row selection written.

``onnxruntime``: GroupQueryAttention with shared past/present buffers, MultiHeadAttention in towers;
``onnxruntime-cuda`` likewise, for its CUDA provider. ``tensorrt``: TensorScatter and ONNX Attention with an explicit
mask. ``plain``: standard opset 23 only, for other toolchains; ``plain-unrolled`` likewise, without Loop, Scan and If.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.compiler import ops
from secateur.compiler.program import args_of
from secateur.exporters.builder import Builder, Lower, shape_of, type_of
from secateur.exporters.lint_attention import FEWEST_ROWS, MOST_KEYS
from secateur.exporters.lowering import aten, output, read
from secateur.exporters.lowering_experts import lower_looped, lower_scanned
from secateur.exporters.lowering_experts_batched import lower_batched
from secateur.exporters.lowering_scan import lower_as_loop, lower_written_out
from secateur.exporters.lowering_sorting import WITHIN_LIMIT
from secateur.exporters.masks import add_mask, read_limits, see_cached, see_fresh

UNROLLED = "plain-unrolled"
MICROSOFT = "com.microsoft"
_AT_ONCE, _CACHED = (5, 8, 9), (8, 10, 11, 12)
"""Where attention nodes without and with a cache have window, block_ids, positions and past_positions."""


@dataclass(frozen=True)
class Dialect:
    """``opset`` of the standard domain, and the lowerings that differ from the others'."""

    name: str
    opset: int
    lowerings: Mapping[Any, Lower]
    domains: Mapping[str, int]
    stays: Callable[[fx.Node], bool] = lambda node: False
    """Which operators of ``compiler/score_ops.py`` are lowered as they are and not written out first."""


def _attention_arguments(node: fx.Node, positions: tuple[int, ...]) -> list[Any]:
    return [args_of(node)[i] if i < len(args_of(node)) else None for i in positions]


def _as_rows(b: Builder, value: ir.Value) -> ir.Value:
    """``[B,H,S,d]`` -> ``[B,S,H*d]``."""
    batch, heads, length, width = shape_of(value)
    return b.reshape(b.swap(value), [batch, length, heads * width])


def _as_heads(b: Builder, value: ir.Value, heads: int) -> ir.Value:
    """``[B,S,H*d]`` -> ``[B,H,S,d]``."""
    batch, length, width = shape_of(value)
    return b.swap(b.reshape(value, [batch, length, heads, width // heads]))


def _halves(b: Builder, table: ir.Value) -> ir.Value:
    """The first half of a rotary table ``[B,S,d]``: both halves are equal, ONNX wants one."""
    return b.slice(table, 2, 0, shape_of(table)[2] // 2)


# -- the same for every backend ---------------------------------------------------------------------------


def _rms_norm(b: Builder, node: fx.Node) -> ir.Value:
    # stash_type 1: the reduction runs in float32 whatever the type of x.
    dtype, shape = output(node)
    x, weight, eps = args_of(node)[:3]
    attributes = {"axis": -1, "epsilon": float(eps), "stash_type": 1}
    if args_of(node)[3:] != (True,):
        return b.op("RMSNormalization", read(b, x), read(b, weight), dtype=dtype, shape=shape, attributes=attributes)
    wide, scale = read(b, x, torch.float32), read(b, weight, torch.float32)
    one = b.constant(1.0, torch.float32)
    scale = b.remember(("one more", scale), lambda: b.op("Add", scale, one, dtype=torch.float32, shape=shape_of(scale)))
    made = b.op("RMSNormalization", wide, scale, dtype=torch.float32, shape=shape, attributes=attributes)
    return b.cast(made, dtype)


def _layer_norm(b: Builder, node: fx.Node) -> ir.Value:
    """In float32 between explicit casts when the model runs in half precision."""
    dtype, shape = output(node)
    x, _, weight, bias = _attention_arguments(node, (0, 1, 2, 3))
    eps = float(args_of(node)[4]) if len(args_of(node)) > 4 else 1e-5
    inputs = [read(b, v, torch.float32) for v in (x, weight, bias) if v is not None]
    made = b.op(
        "LayerNormalization", *inputs, dtype=torch.float32, shape=shape, attributes={"axis": -1, "epsilon": eps}
    )
    return b.cast(made, dtype)


def _take_rows(b: Builder, node: fx.Node) -> ir.Value:
    """A ``Gather`` over rows of all batch entries laid end to end."""
    dtype, shape = output(node)
    x, index = read(b, args_of(node)[0]), read(b, args_of(node)[1])
    batch, length, *rest = shape_of(x)
    count = shape_of(index)[1]
    if batch == 1:
        return b.op("Gather", x, b.reshape(index, [count]), dtype=dtype, shape=shape, attributes={"axis": 1})
    offset = b.constant(np.arange(batch, dtype=np.int64)[:, None] * length)
    flat_index = b.remember(
        ("row index", index, length),
        lambda: b.op("Add", index, offset, dtype=torch.int64, shape=[batch, count]),
    )
    flat = b.reshape(x, [batch * length, *rest])
    made = b.op(
        "Gather", flat, b.reshape(flat_index, [batch * count]),
        dtype=dtype, shape=[batch * count, *rest], attributes={"axis": 0},
    )  # fmt: skip
    return b.reshape(made, shape)


# -- onnxruntime ------------------------------------------------------------------------------------------


def _rotary_rows(b: Builder, node: fx.Node) -> ir.Value:
    """Rotary on ``[B,S,H*d]``: the form the projections leave and attention reads, without a transpose."""
    dtype, (batch, heads, length, width) = output(node)
    x, cos, sin = (read(b, a) for a in args_of(node))
    attributes = {"num_heads": heads}
    made = b.op(
        "RotaryEmbedding", _as_rows(b, x), _halves(b, cos), _halves(b, sin),
        dtype=dtype, shape=[batch, length, heads * width], attributes=attributes,
    )  # fmt: skip
    return _as_heads(b, made, heads)


def _attend_at_once(b: Builder, node: fx.Node) -> ir.Value:
    """Attention without a cache. That of decoders is causal and may share keys among heads, that of towers neither."""
    dtype, (batch, heads, length, width) = output(node)
    q, k, v = (read(b, a) for a in args_of(node)[:3])
    rows, scale = [_as_rows(b, x) for x in (q, k, v)], float(args_of(node)[3])
    if not args_of(node)[4]:
        made = b.op(
            "MultiHeadAttention", *rows, domain=MICROSOFT, dtype=dtype, shape=[batch, length, heads * width],
            attributes={"num_heads": heads, "scale": scale, "unidirectional": 0},
        )  # fmt: skip
        return _as_heads(b, made, heads)
    (softcap,), limits = _attention_arguments(node, (6,)), read_limits(b, node, *_AT_ONCE)
    if not limits.causal_alone:
        return _attend(b, q, k, v, see_fresh(b, limits, batch, length), scale, False)
    last, total = b.constant(np.full(batch, length - 1, np.int32)), b.constant(np.array(length, np.int32))
    own = [batch, shape_of(k)[1], length, width]
    outputs = b.ops(
        "GroupQueryAttention", *rows, None, None, last, total, domain=MICROSOFT,
        types=[(dtype, [batch, length, heads * width]), (dtype, own), (dtype, own)],
        attributes={"num_heads": heads, "kv_num_heads": own[1], "scale": scale, "softcap": float(softcap or 0.0)},
    )  # fmt: skip
    return _as_heads(b, outputs[0], heads)


def _group_query(b: Builder, node: fx.Node) -> list[ir.Value]:
    q, k, v, past_k, past_v, start = (read(b, a) for a in args_of(node)[:6])
    fresh, scale = bool(args_of(node)[6]), float(args_of(node)[7])
    (softcap,), limits = _attention_arguments(node, (9,)), read_limits(b, node, *_CACHED)
    if fresh and not limits.causal_alone:
        # Its kernel is causal whatever bias it is given.
        return _attend_with_cache(b, node)
    batch, heads, length, width = shape_of(q)
    cache = shape_of(past_k)
    more: list[ir.Value | None] = []
    if fresh:
        last = b.constant(np.full(batch, length - 1, np.int32))
        total = b.constant(np.array(length, np.int32))
    else:
        last = b.cast(start, torch.int32)
        total = b.constant(np.array(cache[2], np.int32))
        if limits.window is not None:
            seen = see_cached(b, start, cache[2], limits)
            more = [None, None, None, add_mask(b, seen, args_of(node)[0].meta["val"].dtype)]
    kind = type_of(q)
    outputs = b.ops(
        "GroupQueryAttention", *(_as_rows(b, x) for x in (q, k, v)), past_k, past_v, last, total, *more,
        domain=MICROSOFT, types=[(kind, [batch, length, heads * width]), (kind, cache), (kind, cache)],
        attributes={"num_heads": heads, "kv_num_heads": cache[1], "scale": scale, "softcap": float(softcap or 0.0)},
    )  # fmt: skip
    return [_as_heads(b, outputs[0], heads), *outputs[1:]]


# -- standard operators -----------------------------------------------------------------------------------


def _rotary_heads(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    x, cos, sin = (read(b, a) for a in args_of(node))
    return b.op("RotaryEmbedding", x, _halves(b, cos), _halves(b, sin), dtype=dtype, shape=shape)


def _attend(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float, causal: bool
) -> ir.Value:
    inputs = [q, k, v] + ([mask] if mask is not None else [])
    return b.op(
        "Attention", *inputs, dtype=type_of(q), shape=shape_of(q), attributes={"scale": scale, "is_causal": int(causal)}
    )


def _attend_plainly(b: Builder, node: fx.Node) -> ir.Value:
    """Attention without a cache."""
    q, k, v = (read(b, a) for a in args_of(node)[:3])
    scale, causal = float(args_of(node)[3]), bool(args_of(node)[4])
    if not causal or (limits := read_limits(b, node, *_AT_ONCE)).causal_alone:
        return _attend(b, q, k, v, None, scale, causal)
    batch, _, length, _ = shape_of(q)
    return _attend(b, q, k, v, see_fresh(b, limits, batch, length), scale, False)


def _cached(
    write: Callable[[Builder, ir.Value, ir.Value, ir.Value, bool], ir.Value],
    attend: Callable[..., ir.Value],
) -> Callable[[Builder, fx.Node], list[ir.Value]]:
    def lower(b: Builder, node: fx.Node) -> list[ir.Value]:
        q, k, v, past_k, past_v, start = (read(b, a) for a in args_of(node)[:6])
        fresh, scale = bool(args_of(node)[6]), float(args_of(node)[7])
        present = [write(b, past, new, start, fresh) for past, new in ((past_k, k), (past_v, v))]
        limits = read_limits(b, node, *_CACHED)
        if fresh and limits.causal_alone:  # attend to the fresh rows: causal over equal lengths needs no mask
            return [_attend(b, q, k, v, None, scale, True), *present]
        if fresh:
            batch, _, length, _ = shape_of(q)
            return [_attend(b, q, k, v, see_fresh(b, limits, batch, length), scale, False), *present]
        mask = see_cached(b, start, shape_of(past_k)[2], limits)
        return [attend(b, q, *present, mask, scale, False), *present]

    return lower


def _attend_twice(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float, causal: bool
) -> ir.Value:
    """Decode for TensorRT, which has no fused kernel for one query row when ``B*H < 4`` or the cache is very long:
    the row is sent twice and the second answer dropped."""
    batch, heads, length, width = shape_of(q)
    if length > 1 or (batch * heads >= FEWEST_ROWS and shape_of(k)[2] + width <= MOST_KEYS):
        return _attend(b, q, k, v, mask, scale, causal)
    twice = b.op("Concat", q, q, dtype=type_of(q), shape=[batch, heads, 2, width], attributes={"axis": 2})
    return b.slice(_attend(b, twice, k, v, mask, scale, causal), 2, 0, 1)


def _write_plain(b: Builder, past: ir.Value, new: ir.Value, start: ir.Value, fresh: bool) -> ir.Value:
    capacity, length = shape_of(past)[2], shape_of(new)[2]
    if fresh:
        rest = b.slice(past, 2, length, capacity)
        return b.op("Concat", new, rest, dtype=type_of(past), shape=shape_of(past), attributes={"axis": 2})

    def make() -> ir.Value:
        batch = shape_of(start)[0]
        slots = b.constant(np.arange(capacity, dtype=np.int64).reshape(1, 1, capacity, 1))
        own = b.reshape(start, [batch, 1, 1, 1])
        return b.op("Equal", slots, own, dtype=torch.bool, shape=[batch, 1, capacity, 1])

    here = b.remember(("here", start, capacity), make)
    return b.op("Where", here, new, past, dtype=type_of(past), shape=shape_of(past))


def _write_scatter(b: Builder, past: ir.Value, new: ir.Value, start: ir.Value, fresh: bool) -> ir.Value:
    return b.op(
        "TensorScatter", past, new, start, dtype=type_of(past), shape=shape_of(past),
        attributes={"axis": -2, "mode": "linear"},
    )  # fmt: skip


def _write_rows(
    write: Callable[[Builder, ir.Value, ir.Value, ir.Value, bool], ir.Value],
) -> Callable[[Builder, fx.Node], ir.Value]:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        past, new, start = (read(b, a) for a in args_of(node)[:3])
        return write(b, past, new, start, bool(args_of(node)[3]))

    return lower


_attend_with_cache = _cached(_write_plain, _attend)

_COMMON: dict[Any, Lower] = {
    ops.rms_norm: _rms_norm,
    aten.layer_norm.default: _layer_norm,
    ops.take_rows: _take_rows,
}

_ONNXRUNTIME: dict[Any, Lower] = {
    **_COMMON,
    ops.rotary: _rotary_rows,
    ops.attention: _attend_at_once,
    ops.cached_attention: _group_query,
    ops.write_rows: _write_rows(_write_plain),
}

_PLAIN: dict[Any, Lower] = {
    **_COMMON,
    ops.rotary: _rotary_heads,
    ops.attention: _attend_plainly,
    ops.cached_attention: _attend_with_cache,
    ops.write_rows: _write_rows(_write_plain),
}
_WITHOUT_LOOPS: dict[Any, Lower] = {ops.experts: lower_batched, torch.ops.higher_order.scan: lower_written_out}

DIALECTS: dict[str, Dialect] = {
    d.name: d
    for d in (
        Dialect("onnxruntime", 23, {**_ONNXRUNTIME, ops.experts: lower_scanned}, {MICROSOFT: 1}),
        Dialect("onnxruntime-cuda", 23, {**_ONNXRUNTIME, ops.experts: lower_batched}, {MICROSOFT: 1}),
        Dialect("plain", 23, {**_PLAIN, ops.experts: lower_looped, torch.ops.higher_order.scan: lower_as_loop}, {}),
        Dialect(UNROLLED, 23, {**_PLAIN, **_WITHOUT_LOOPS}, {}),
        Dialect(
            "tensorrt", 24,
            {
                **_COMMON, **WITHIN_LIMIT, **_WITHOUT_LOOPS, ops.rotary: _rotary_heads, ops.attention: _attend_plainly,
                ops.cached_attention: _cached(_write_scatter, _attend_twice),
                ops.write_rows: _write_rows(_write_scatter),
            },
            {},
        ),
    )
}  # fmt: skip
