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
from secateur.exporters.builder import Builder, Lower, shape_of
from secateur.exporters.lowering import aten, output, read
from secateur.exporters.lowering_attention import (
    MICROSOFT,
    as_heads,
    as_rows,
    attend,
    attend_at_once,
    attend_plainly,
    attend_repeated,
    attend_twice,
    attend_with_cache,
    group_query,
    write_plain,
    write_rows,
    write_scatter,
)
from secateur.exporters.lowering_experts import lower_looped, lower_scanned
from secateur.exporters.lowering_experts_batched import lower_batched
from secateur.exporters.lowering_scan import lower_as_loop, lower_written_out
from secateur.exporters.lowering_sorting import WITHIN_LIMIT

UNROLLED = "plain-unrolled"


@dataclass(frozen=True)
class Dialect:
    """``opset`` of the standard domain, and the lowerings that differ from the others'."""

    name: str
    opset: int
    lowerings: Mapping[Any, Lower]
    domains: Mapping[str, int]
    stays: Callable[[fx.Node], bool] = lambda node: False
    """Which operators of ``compiler/score_ops.py`` are lowered as they are and not written out first."""


def _halves(b: Builder, table: ir.Value) -> ir.Value:
    """The first half of a rotary table ``[B,S,d]``: both halves are equal, ONNX wants one."""
    return b.slice(table, 2, 0, shape_of(table)[2] // 2)


# -- the same for every backend ---------------------------------------------------------------------------


def _rms_norm(b: Builder, node: fx.Node) -> ir.Value:
    # stash_type 1: the reduction runs in float32 whatever the type of x.
    dtype, shape = output(node)
    x, weight, eps, offset = b.operands(node).read("x", "weight", "eps", "offset")
    attributes = {"axis": -1, "epsilon": float(eps), "stash_type": 1}
    if not offset:
        return b.op("RMSNormalization", read(b, x), read(b, weight), dtype=dtype, shape=shape, attributes=attributes)
    wide, scale = read(b, x, torch.float32), read(b, weight, torch.float32)
    one = b.constant(1.0, torch.float32)
    scale = b.remember(("one more", scale), lambda: b.op("Add", scale, one, dtype=torch.float32, shape=shape_of(scale)))
    made = b.op("RMSNormalization", wide, scale, dtype=torch.float32, shape=shape, attributes=attributes)
    return b.cast(made, dtype)


def _layer_norm(b: Builder, node: fx.Node) -> ir.Value:
    """In float32 between explicit casts when the model runs in half precision."""
    dtype, shape = output(node)
    given = b.operands(node)
    given.leave("cudnn_enable")
    x, sizes, weight, bias, eps = given.read("input", "normalized_shape", "weight", "bias", "eps")
    scale = b.constant(np.ones(sizes, np.float32)) if weight is None else read(b, weight, torch.float32)
    inputs = [read(b, x, torch.float32), scale, *([] if bias is None else [read(b, bias, torch.float32)])]
    attributes = {"axis": -len(sizes), "epsilon": float(eps)}
    made = b.op("LayerNormalization", *inputs, dtype=torch.float32, shape=shape, attributes=attributes)
    return b.cast(made, dtype)


def _take_rows(b: Builder, node: fx.Node) -> ir.Value:
    """A ``Gather`` over rows of all batch entries laid end to end."""
    dtype, shape = output(node)
    x, index = (read(b, a) for a in b.operands(node).read("x", "index"))
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
    x, cos, sin = (read(b, a) for a in b.operands(node).read("x", "cos", "sin"))
    attributes = {"num_heads": heads}
    made = b.op(
        "RotaryEmbedding", as_rows(b, x), _halves(b, cos), _halves(b, sin),
        dtype=dtype, shape=[batch, length, heads * width], attributes=attributes,
    )  # fmt: skip
    return as_heads(b, made, heads)


def _rotary_heads(b: Builder, node: fx.Node) -> ir.Value:
    dtype, shape = output(node)
    x, cos, sin = (read(b, a) for a in b.operands(node).read("x", "cos", "sin"))
    return b.op("RotaryEmbedding", x, _halves(b, cos), _halves(b, sin), dtype=dtype, shape=shape)


_COMMON: dict[Any, Lower] = {
    ops.rms_norm: _rms_norm,
    aten.layer_norm.default: _layer_norm,
    ops.take_rows: _take_rows,
}

_ONNXRUNTIME: dict[Any, Lower] = {
    **_COMMON,
    ops.rotary: _rotary_rows,
    ops.attention: attend_at_once,
    ops.cached_attention: group_query,
    ops.write_rows: write_rows(write_plain),
}

_PLAIN: dict[Any, Lower] = {
    **_COMMON,
    ops.rotary: _rotary_heads,
    ops.attention: attend_plainly(attend_repeated),
    ops.cached_attention: attend_with_cache(write_plain, attend_repeated),
    ops.write_rows: write_rows(write_plain),
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
                **_COMMON, **WITHIN_LIMIT, **_WITHOUT_LOOPS, ops.rotary: _rotary_heads,
                ops.attention: attend_plainly(attend),
                ops.cached_attention: attend_with_cache(write_scatter, attend_twice),
                ops.write_rows: write_rows(write_scatter),
            },
            {},
        ),
    )
}  # fmt: skip
