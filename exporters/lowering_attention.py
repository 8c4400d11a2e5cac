"""Attention and its caches as each backend wants them written. Every operand has a form here, or is refused by name.

ONNX Runtime has fused kernels of its own, which take a soft cap in decoders, and a bias. The standard's ``Attention``
is written without its soft cap: TensorRT refuses it, and ONNX Runtime 1.23 caps the mask as well. Where there is one,
attention is written in its parts. ONNX Runtime 1.23 also refuses a bias of each head where heads share keys, so that
these are repeated there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.exporters.builder import Builder, shape_of, type_of
from secateur.exporters.lint_attention import FEWEST_ROWS, MOST_KEYS
from secateur.exporters.lowering import output, read
from secateur.exporters.masks import add_mask, read_limits, see_cached, see_fresh
from secateur.runtime.errors import SecateurError

MICROSOFT = "com.microsoft"

Write = Callable[[Builder, ir.Value, ir.Value, ir.Value, bool], ir.Value]
"""A cache, new rows, their first slots, whether those are all 0 -> the cache with them."""


class Scores(NamedTuple):
    """How products of queries and keys become weights, beside what a row may see."""

    scale: float
    softcap: float | None
    bias: ir.Value | None


Attend = Callable[[Builder, ir.Value, ir.Value, ir.Value, Scores, ir.Value | None, bool], ir.Value]
"""q, k, v, scores, booleans of what is seen, whether rows see those up to their own instead -> ``[B,H,S,d]``."""


def read_scores(b: Builder, node: fx.Node) -> Scores:
    scale, softcap, bias = b.operands(node).read("scale", "softcap", "bias")
    return Scores(float(scale), softcap or None, None if bias is None else read(b, bias))


def as_rows(b: Builder, value: ir.Value) -> ir.Value:
    """``[B,H,S,d]`` -> ``[B,S,H*d]``."""
    batch, heads, length, width = shape_of(value)
    return b.reshape(b.swap(value), [batch, length, heads * width])


def as_heads(b: Builder, value: ir.Value, heads: int) -> ir.Value:
    """``[B,S,H*d]`` -> ``[B,H,S,d]``."""
    batch, length, width = shape_of(value)
    return b.swap(b.reshape(value, [batch, length, heads, width // heads]))


# -- onnxruntime ------------------------------------------------------------------------------------------


def attend_at_once(b: Builder, node: fx.Node) -> ir.Value:
    """Attention without a cache. That of decoders is causal and may share keys among heads, that of towers neither."""
    dtype, (batch, heads, length, width) = output(node)
    q, k, v = (read(b, a) for a in b.operands(node).read("q", "k", "v"))
    scores, causal = read_scores(b, node), bool(b.operands(node)["causal"])
    wide = [batch, length, heads * width]
    if not causal and scores.softcap is None and shape_of(k)[1] == heads:
        more = [] if scores.bias is None else [None, None, add_mask(b, None, dtype, scores.bias)]
        made = b.op(
            "MultiHeadAttention", *(as_rows(b, x) for x in (q, k, v)), *more, domain=MICROSOFT, dtype=dtype, shape=wide,
            attributes={"num_heads": heads, "scale": scores.scale, "unidirectional": 0},
        )  # fmt: skip
        return as_heads(b, made, heads)
    if not causal or scores.bias is not None or not read_limits(b, node, fresh=True).causal_alone:
        return attend_plainly(attend_repeated)(b, node)
    last, total = b.constant(np.full(batch, length - 1, np.int32)), b.constant(np.array(length, np.int32))
    own = [batch, shape_of(k)[1], length, width]
    outputs = b.ops(
        "GroupQueryAttention", *(as_rows(b, x) for x in (q, k, v)), None, None, last, total, domain=MICROSOFT,
        types=[(dtype, wide), (dtype, own), (dtype, own)], attributes=_grouped(heads, own[1], scores),
    )  # fmt: skip
    return as_heads(b, outputs[0], heads)


def group_query(b: Builder, node: fx.Node) -> list[ir.Value]:
    """Attention with a cache that is written in place."""
    given = b.operands(node)
    q, k, v, past_k, past_v, start = (read(b, a) for a in given.read("q", "k", "v", "past_k", "past_v", "start"))
    fresh, scores = bool(given["fresh"]), read_scores(b, node)
    limits = read_limits(b, node, fresh=fresh)
    if fresh and not (limits.causal_alone and scores.bias is None):
        # Its kernel is causal whatever bias it is given, and the CUDA provider's takes none in prefill.
        return attend_with_cache(write_plain, attend_repeated)(b, node)
    batch, heads, length, width = shape_of(q)
    cache = shape_of(past_k)
    more: list[ir.Value | None] = []
    if fresh:
        last = b.constant(np.full(batch, length - 1, np.int32))
        total = b.constant(np.array(length, np.int32))
    else:
        _check_one_row(b, node, length)
        last = b.cast(start, torch.int32)
        total = b.constant(np.array(cache[2], np.int32))
        seen = None if limits.window is None else see_cached(b, start, cache[2], limits)
        if seen is not None or scores.bias is not None:
            more = [None, None, None, add_mask(b, seen, type_of(q), scores.bias)]
    kind = type_of(q)
    outputs = b.ops(
        "GroupQueryAttention", *(as_rows(b, x) for x in (q, k, v)), past_k, past_v, last, total, *more,
        domain=MICROSOFT, types=[(kind, [batch, length, heads * width]), (kind, cache), (kind, cache)],
        attributes=_grouped(heads, cache[1], scores),
    )  # fmt: skip
    return [as_heads(b, outputs[0], heads), *outputs[1:]]


def _grouped(heads: int, shared: int, scores: Scores) -> dict[str, Any]:
    softcap = float(scores.softcap or 0.0)
    return {"num_heads": heads, "kv_num_heads": shared, "scale": scores.scale, "softcap": softcap}


# -- standard operators -----------------------------------------------------------------------------------


def attend(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, scores: Scores, seen: ir.Value | None, causal: bool
) -> ir.Value:
    """One ``Attention``, or its parts where there is a soft cap. ``causal`` stands alone: without bias, soft cap or
    ``seen``."""
    if scores.softcap is not None:
        assert not causal, "the parts have no mask of their own"
        return _attend_in_parts(b, q, k, v, scores, seen)
    mask = seen if scores.bias is None else add_mask(b, seen, type_of(q), scores.bias)
    attributes = {"scale": scores.scale, "is_causal": int(causal)}
    inputs = [q, k, v] + ([mask] if mask is not None else [])
    return b.op("Attention", *inputs, dtype=type_of(q), shape=shape_of(q), attributes=attributes)


def attend_repeated(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, scores: Scores, seen: ir.Value | None, causal: bool
) -> ir.Value:
    """As :func:`attend`, with keys and values of their own for heads that have a bias of their own."""
    groups = shape_of(q)[1] // shape_of(k)[1]
    if groups > 1 and scores.softcap is None and scores.bias is not None and shape_of(scores.bias)[1] > 1:
        k, v = (_repeat_heads(b, x, groups) for x in (k, v))
    return attend(b, q, k, v, scores, seen, causal)


def attend_twice(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, scores: Scores, seen: ir.Value | None, causal: bool
) -> ir.Value:
    """Decode for TensorRT, which has no fused kernel for one query row when ``B*H < 4`` or the cache is very long:
    the row is sent twice and the second answer dropped."""
    batch, heads, length, width = shape_of(q)
    many = batch * heads >= FEWEST_ROWS and shape_of(k)[2] + width <= MOST_KEYS
    if length > 1 or many or scores.softcap is not None:
        return attend(b, q, k, v, scores, seen, causal)
    twice = b.op("Concat", q, q, dtype=type_of(q), shape=[batch, heads, 2, width], attributes={"axis": 2})
    return b.slice(attend(b, twice, k, v, scores, seen, causal), 2, 0, 1)


def attend_plainly(attend: Attend) -> Callable[[Builder, fx.Node], ir.Value]:
    """Attention without a cache."""

    def lower(b: Builder, node: fx.Node) -> ir.Value:
        q, k, v = (read(b, a) for a in b.operands(node).read("q", "k", "v"))
        scores, causal = read_scores(b, node), bool(b.operands(node)["causal"])
        if not causal:
            return attend(b, q, k, v, scores, None, False)
        return attend(b, q, k, v, scores, *_see_fresh(b, node, scores, shape_of(q)))

    return lower


def attend_with_cache(write: Write, attend: Attend) -> Callable[[Builder, fx.Node], list[ir.Value]]:
    """Attention of new rows to a cache that they are written to."""

    def lower(b: Builder, node: fx.Node) -> list[ir.Value]:
        given = b.operands(node)
        q, k, v, past_k, past_v, start = (read(b, a) for a in given.read("q", "k", "v", "past_k", "past_v", "start"))
        fresh, scores = bool(given["fresh"]), read_scores(b, node)
        present = [write(b, past, new, start, fresh) for past, new in ((past_k, k), (past_v, v))]
        if fresh:  # attend to the fresh rows: causal over equal lengths needs no mask
            return [attend(b, q, k, v, scores, *_see_fresh(b, node, scores, shape_of(q))), *present]
        _check_one_row(b, node, shape_of(q)[2])
        seen = see_cached(b, start, shape_of(past_k)[2], read_limits(b, node, fresh=False))
        return [attend(b, q, present[0], present[1], scores, seen, False), *present]

    return lower


def _see_fresh(b: Builder, node: fx.Node, scores: Scores, shape: list[int]) -> tuple[ir.Value | None, bool]:
    """What fresh rows ``[B,H,S,d]`` see, as booleans or as the flag that says they see those up to their own."""
    limits = read_limits(b, node, fresh=True)
    if limits.causal_alone and scores.bias is None and scores.softcap is None:
        return None, True
    return see_fresh(b, limits, shape[0], shape[2]), False


def _check_one_row(b: Builder, node: fx.Node, length: int) -> None:
    if length != 1:
        raise b.refuse(node, "q", "give one new row at a time, or say that rows are fresh")


def _repeat_heads(b: Builder, value: ir.Value, groups: int) -> ir.Value:
    """``[B,Hkv,S,d]`` -> ``[B,Hkv*groups,S,d]``, each head as often one after the other."""
    batch, heads, length, width = shape_of(value)
    single = b.reshape(value, [batch, heads, 1, length, width])
    make = lambda: b.expand(single, [batch, heads, groups, length, width])  # noqa: E731
    return b.reshape(b.remember(("repeated", value, groups), make), [batch, heads * groups, length, width])


def _attend_in_parts(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, scores: Scores, seen: ir.Value | None
) -> ir.Value:
    """Products, soft cap, bias, softmax, products: from the cap to the softmax in float32, and queries that share keys
    as rows of one product."""
    (batch, heads, length, width), (_, shared, keys, _), kind = shape_of(q), shape_of(k), type_of(q)
    assert scores.softcap is not None
    number = lambda value: b.constant(value, torch.float32)  # noqa: E731
    folded, whole = [batch, shared, heads // shared * length, width], [batch, heads, length, keys]
    products = [*folded[:3], keys]
    # A power of two first, which rounds nothing: products of half precision may pass its largest number.
    exact = 2.0 ** math.floor(math.log2(scores.scale))
    small = b.op("Mul", q, b.constant(np.array(exact, kind.numpy())), dtype=kind, shape=shape_of(q))
    turned = b.op("Transpose", k, dtype=kind, shape=[batch, shared, width, keys], attributes={"perm": [0, 1, 3, 2]})
    made = b.op("MatMul", b.reshape(small, folded), turned, dtype=kind, shape=products)
    made = b.cast(made, torch.float32)
    inside = number(scores.scale / exact / scores.softcap)
    made = b.op("Mul", made, inside, dtype=torch.float32, shape=products)
    made = b.op("Tanh", made, dtype=torch.float32, shape=products)
    made = b.op("Mul", made, number(scores.softcap), dtype=torch.float32, shape=products)
    made = b.reshape(made, whole)
    if scores.bias is not None:
        made = b.op("Add", made, b.cast(scores.bias, torch.float32), dtype=torch.float32, shape=whole)
    if seen is not None:
        hidden = number(torch.finfo(torch.float32).min)
        made = b.op("Where", seen, made, hidden, dtype=torch.float32, shape=whole)
    made = b.op("Softmax", made, dtype=torch.float32, shape=whole, attributes={"axis": -1})
    made = b.reshape(b.cast(made, kind), products)
    return b.reshape(b.op("MatMul", made, v, dtype=kind, shape=folded), [batch, heads, length, width])


# -- caches -----------------------------------------------------------------------------------------------


def write_plain(b: Builder, past: ir.Value, new: ir.Value, start: ir.Value, fresh: bool) -> ir.Value:
    capacity, length = shape_of(past)[2], shape_of(new)[2]
    if fresh:
        rest = b.slice(past, 2, length, capacity)
        return b.op("Concat", new, rest, dtype=type_of(past), shape=shape_of(past), attributes={"axis": 2})
    if length != 1:
        raise SecateurError(
            f"{length} rows are written into a cache that is not empty", where="export",
            fix="write one row at a time, or say that rows are fresh",
        )  # fmt: skip

    def make() -> ir.Value:
        batch = shape_of(start)[0]
        slots = b.constant(np.arange(capacity, dtype=np.int64).reshape(1, 1, capacity, 1))
        own = b.reshape(start, [batch, 1, 1, 1])
        return b.op("Equal", slots, own, dtype=torch.bool, shape=[batch, 1, capacity, 1])

    here = b.remember(("here", start, capacity), make)
    return b.op("Where", here, new, past, dtype=type_of(past), shape=shape_of(past))


def write_scatter(b: Builder, past: ir.Value, new: ir.Value, start: ir.Value, fresh: bool) -> ir.Value:
    return b.op(
        "TensorScatter", past, new, start, dtype=type_of(past), shape=shape_of(past),
        attributes={"axis": -2, "mode": "linear"},
    )  # fmt: skip


def write_rows(write: Write) -> Callable[[Builder, fx.Node], ir.Value]:
    def lower(b: Builder, node: fx.Node) -> ir.Value:
        past, new, start, fresh = b.operands(node).read("past", "new", "start", "fresh")
        return write(b, read(b, past), read(b, new), read(b, start), bool(fresh))

    return lower
