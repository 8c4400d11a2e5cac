"""Score operators as nodes of domain ``secateur``, each one kernel launch, for TensorRT with plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.compiler import score_ops
from secateur.compiler.program import args_of
from secateur.exporters.builder import Builder, Lower, shape_of
from secateur.exporters.dialects import Dialect
from secateur.exporters.lowering import read
from secateur.exporters.plugins.table import DOMAIN, PLUGINS, pays, write_settings

_TYPES = {"fp32": torch.float32, "i32": torch.int32}
_WIDEST = 256
"""Of a head: wider ones would not fit the kernels' tiles."""


def with_plugins(dialect: Dialect) -> Dialect:
    """The dialect with nodes for the operators that have a kernel and gain by it."""
    return replace(
        dialect, lowerings={**dialect.lowerings, **_LOWERINGS}, domains={**dialect.domains, DOMAIN: 1}, stays=_stays
    )


def _stays(node: fx.Node) -> bool:
    shape = args_of(node)[0].meta["val"].shape
    if node.target is score_ops.received_attention:
        return int(shape[3]) <= _WIDEST
    if (name := _GREEDY.get(node.target)) is not None:
        return pays(name, int(shape[1]), int(node.meta["val"].shape[1]))
    return node.target in _LOWERINGS


def _emit(b: Builder, name: str, inputs: Sequence[ir.Value], settings: Mapping[str, Any]) -> ir.Value:
    """The node; of its outputs the first, the others are scratch."""
    plugin = PLUGINS[name]
    assert plugin.inserted, name
    assert (len(inputs), set(settings)) == (len(plugin.ports), set(plugin.settings)), name
    types = [(_TYPES[kind], shape) for kind, shape in plugin.outputs([shape_of(v) for v in inputs], settings)]
    attributes = {
        "plugin_namespace": DOMAIN, "plugin_version": "1", "aot": True, "settings": write_settings(settings),
    }  # fmt: skip
    return b.ops(name, *inputs, types=types, domain=DOMAIN, attributes=attributes)[0]


def _received_attention(b: Builder, node: fx.Node) -> ir.Value:
    query, key, scale, causal, last = b.operands(node).read("query", "key", "scale", "causal", "last")
    settings = {"scale": float(scale), "causal": bool(causal)}
    q, k = read(b, query), read(b, key)
    batch, _, rows, _ = shape_of(q)
    bound = b.constant(np.full(batch, rows - 1, np.int32)) if last is None else read(b, last, torch.int32)
    sums = _emit(b, "RowLogSumExp", [q, k], settings)
    return _emit(b, "ColumnSums", [q, k, sums, bound], settings)


def _top_rows(b: Builder, node: fx.Node) -> ir.Value:
    score, k = b.operands(node).read("score", "k")
    return b.cast(_emit(b, "RankTake", [read(b, score, torch.float32)], {"k": int(k)}), torch.int64)


def _pick_by_fold(b: Builder, node: fx.Node) -> ir.Value:
    table, start, weight, k, rule, trade = b.operands(node).read("table", "start", "weight", "k", "rule", "trade")
    # Rules without a weight do not read it: any tensor does.
    scale = b.constant(np.zeros((1, 1), np.float32)) if weight is None else read(b, weight, torch.float32)
    inputs = [read(b, table, torch.float32), read(b, start, torch.int32), scale]
    settings = {"k": int(k), "rule": str(rule), "trade": float(trade)}
    return b.cast(_emit(b, "PickByFold", inputs, settings), torch.int64)


def _pick_by_coverage(b: Builder, node: fx.Node) -> ir.Value:
    table, start, weight, k, product = b.operands(node).read("table", "start", "weight", "k", "product")
    inputs = [read(b, table, torch.float32), read(b, start, torch.int32), read(b, weight, torch.float32)]
    return b.cast(_emit(b, "PickByCoverage", inputs, {"k": int(k), "product": bool(product)}), torch.int64)


def _pick_by_determinant(b: Builder, node: fx.Node) -> ir.Value:
    table, score, k = b.operands(node).read("table", "score", "k")
    inputs = [read(b, table, torch.float32), read(b, score, torch.float32)]
    return b.cast(_emit(b, "PickByDeterminant", inputs, {"k": int(k)}), torch.int64)


_GREEDY: Mapping[Any, str] = {
    score_ops.pick_by_fold: "PickByFold",
    score_ops.pick_by_coverage: "PickByCoverage",
    score_ops.pick_by_determinant: "PickByDeterminant",
}
_LOWERINGS: Mapping[Any, Lower] = {
    score_ops.received_attention: _received_attention,
    score_ops.top_rows: _top_rows,
    score_ops.pick_by_fold: _pick_by_fold,
    score_ops.pick_by_coverage: _pick_by_coverage,
    score_ops.pick_by_determinant: _pick_by_determinant,
}
