"""Calls of every operator that has a lowering: for each operand at least one that is not at its default.

``CASES`` maps an operator to its calls. ``Call.refused`` names the operand that the exporter says it has no form for.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.compiler import ops, score_ops

aten = torch.ops.aten
_random = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""


def call(*args: Any, refused: str = "", **kwargs: Any) -> Call:
    return Call(args, kwargs, refused)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_random)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_random) + 0.5


def whole(*shape: int, low: int = -5, high: int = 6) -> Tensor:
    return torch.randint(low, high, shape, generator=_random)


def flags(*shape: int) -> Tensor:
    return whole(*shape) > 0


X, Y, N, M, B, P = floats(2, 3, 4), floats(3, 4), whole(2, 3, 4), whole(3, 4, low=1), flags(2, 3, 4), flags(3, 4)
MEMORY = {
    "layout": "how a tensor lies in memory is not in a graph of values",
    "device": "where it lies neither",
    "pin_memory": "nor that it may not move",
    "non_blocking": "nor when it is copied",
    "copy": "nor whether",
    "memory_format": "nor in which order",
    "half_to_float": "torch has it on CUDA alone",
}
"""Operands that no case gives, and why."""
ELSEWHERE = (ops.attention, ops.cached_attention)
"""Operators whose operands test_attention_operands.py walks, in every dialect and phase."""

_PAIRS = {
    aten.add.Tensor: [call(X, Y), call(N, M, alpha=3), call(X, Y, alpha=0.5), call(N, Y)],
    aten.add.Scalar: [call(X, 1.5), call(N, 2, 3)],
    aten.sub.Tensor: [call(X, Y), call(N, M, alpha=-2)],
    aten.sub.Scalar: [call(X, 1.5), call(N, 2, 3)],
    aten.mul.Tensor: [call(X, Y), call(N, Y)],
    aten.mul.Scalar: [call(X, 2), call(N, 3)],
    aten.div.Tensor: [call(X, Y), call(N, M)],
    aten.div.Scalar: [call(X, 3), call(N, 2)],
    aten.minimum.default: [call(X, Y), call(N, M)],
    aten.maximum.default: [call(X, Y), call(N, M)],
    aten.clamp_min.default: [call(X, 0.25), call(N, 1)],
    aten.matmul.default: [call(X, floats(2, 4, 5)), call(X, floats(4)), call(floats(3), floats(3))],
    aten.bmm.default: [call(X, floats(2, 4, 5))],
    aten.rsub.Scalar: [call(X, 1.5), call(X, 1.5, 2), call(N, 7, 3)],
    aten.floor_divide.default: [call(N, M), call(N, torch.tensor(-3)), call(X, Y)],
    aten.pow.Tensor_Scalar: [call(X, 2), call(positive(3), 0.5), call(N, 3)],
    aten.pow.Tensor_Tensor: [call(positive(2, 3), floats(2, 3))],
    **{getattr(aten, name).Tensor: [call(N, M), call(X, Y), call(B, P)] for name in ("eq", "gt", "ge", "lt", "le")},
    **{getattr(aten, name).Scalar: [call(N, 2), call(N, 1.5), call(X, 0)] for name in ("eq", "gt", "ge", "lt", "le")},
    **{
        target: [call(B, P), call(N, M)]
        for target in (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.__and__.Tensor, aten.bitwise_and.Tensor)
    },
    aten.logical_or.default: [call(B, P), call(N, M)],
    aten.logical_and.default: [call(B, P), call(N, M)],
}

_SINGLE = {
    **{getattr(aten, name).default: [call(X)] for name in ("cos", "sin", "exp", "tanh", "sigmoid", "silu", "gelu")},
    aten.neg.default: [call(X), call(N)],
    aten.abs.default: [call(X), call(N)],
    aten.relu.default: [call(X), call(N)],
    aten.round.default: [call(X * 4), call(torch.tensor([0.5, 1.5, -0.5, 2.5])), call(N)],
    aten.log.default: [call(positive(2, 3)), call(M)],
    aten.sqrt.default: [call(positive(2, 3)), call(M)],
    aten.rsqrt.default: [call(positive(2, 3)), call(M)],
    aten.logical_not.default: [call(B), call(N)],
    aten.bitwise_not.default: [call(B), call(N)],
    aten.gelu.default: [call(X), call(X, approximate="tanh")],
    aten.clamp.default: [call(X, 0.0), call(X, None, 0.5), call(X, max=0.5), call(N, min=0), call(N, 0.5)],
    aten.where.self: [call(P, X, Y), call(P, N, Y)],
    aten.where.ScalarSelf: [call(P, 1.0, X), call(P, 1, N)],
    aten.where.ScalarOther: [call(P, X, 1.0), call(P, N, 1.5)],
    aten.where.Scalar: [call(P, 1.0, 2.0), call(P, 1, 2)],
    aten.masked_fill.Scalar: [call(X, P, -1.0), call(N, P, 3)],
    aten.masked_fill.Tensor: [call(X, P, torch.tensor(-1.0))],
}

_REDUCED = {
    aten.mean.default: [call(X), call(X, dtype=torch.float64), call(N, dtype=torch.float32)],
    aten.mean.dim: [call(X, [1]), call(X, [0, -1], True), call(X, None), call(N, [1], dtype=torch.float32)],
    aten.sum.dim_IntList: [call(X, [1]), call(B, [1]), call(X, None, True), call(N, [-1], dtype=torch.float32)],
    aten.amax.default: [call(X), call(X, [1]), call(N, [0, 2], True)],
    aten.amin.default: [call(X), call(X, [1]), call(N, [0, 2], True)],
    aten.linalg_vector_norm.default: [
        call(X), call(X, 1, [1]), call(X, 2, [0, 2], True), call(X, dtype=torch.float64),
        call(X, 3, refused="ord"), call(X, float("inf"), refused="ord"), call(X, 0.5, refused="ord"),
    ],
    aten.argmax.default: [call(X), call(X, 1), call(X, -1, True), call(N, None, True)],
    aten.cumsum.default: [call(X, 1), call(X, -1), call(N, 0), call(B, 2), call(N, 1, dtype=torch.float32)],
    aten.softmax.int: [call(X, 1), call(X, -1, torch.float64), call(X.half(), 1, torch.float32)],
    aten._softmax.default: [call(X, 1, False)],
    aten.topk.default: [
        call(X, 2), call(X, 2, 1), call(X, 2, -1, False), call(X, 3, -1, True, True),
        call(X, 1, sorted=False), call(N[0], 1, 0, False),
    ],
    aten.sort.default: [call(X), call(X, 1), call(X, -1, True)],
    aten.sort.stable: [call(X, stable=False), call(N, stable=True, dim=1), call(N, stable=True, descending=True)],
    aten.argsort.default: [call(X), call(X, 1), call(X, -1, True)],
    aten.argsort.stable: [call(X, stable=False), call(N, stable=True, dim=1), call(N, stable=True, descending=True)],
}  # fmt: skip

IMAGE, KERNEL = floats(2, 4, 6, 6), floats(6, 4, 3, 3)
_LAYERS = {
    aten.linear.default: [call(X, floats(5, 4)), call(X, floats(5, 4), floats(5))],
    aten.conv1d.default: [
        call(floats(2, 4, 9), floats(6, 4, 3)),
        call(floats(2, 4, 9), floats(6, 2, 3), floats(6), [2], [1], [2], 2),
        call(floats(4, 9), floats(6, 4, 3), refused="input"),
    ],
    aten.conv2d.default: [
        call(IMAGE, KERNEL), call(IMAGE, KERNEL, floats(6), [2], [1, 2], [2, 1]),
        call(IMAGE, floats(6, 2, 3, 3), groups=2),
        call(floats(2, 4, 3, 3), KERNEL, floats(6)), call(floats(2, 4, 3, 3), KERNEL, None, [1], [1], [2]),
    ],
    aten.conv3d.default: [
        call(floats(2, 3, 2, 4, 4), floats(5, 3, 2, 2, 2), None, [2, 1, 2]),
        call(floats(2, 4, 2, 4, 4), floats(6, 2, 2, 2, 2), floats(6), [1], [0, 1, 1], [1, 2, 1], 2),
        call(floats(2, 3, 2, 2, 2), floats(5, 3, 2, 2, 2), floats(5)),
    ],
    aten.avg_pool2d.default: [
        call(IMAGE, [2, 2]), call(IMAGE, [3], [3], [0], True, False), call(IMAGE, [2, 3], [2, 3]),
        call(IMAGE, [2, 2], [1, 1], refused="average"), call(IMAGE, [2, 2], [], [1], refused="average"),
        call(IMAGE, [2, 2], divisor_override=3, refused="average"), call(IMAGE, [4, 4], refused="average"),
    ],
    aten.layer_norm.default: [
        call(X, [4]), call(X, [4], floats(4)), call(X, [4], None, floats(4)),
        call(X, [3, 4], Y, floats(3, 4), 0.1, False),
        call(X.half(), [4], floats(4).half(), floats(4).half()),
    ],
    aten.embedding.default: [call(Y, whole(2, 5, low=0, high=3)), call(Y, whole(5, low=0, high=3), 1, True, True)],
    ops.rms_norm: [call(X, floats(4), 0.1), call(X, floats(4), 1e-6, True), call(X.half(), floats(4).half(), 1e-6)],
    ops.rotary: [call(floats(2, 3, 5, 8), *(floats(2, 5, 4).repeat(1, 1, 2) for _ in range(2)))],
}  # fmt: skip

ROWS = whole(2, 2, 4, low=0, high=3)
_MOVED = {
    **{
        target: [call(X)]
        for target in (
            aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default,
            aten.lift_fresh_copy.default,
        )
    },
    aten._to_copy.default: [call(X, dtype=torch.int64), call(N, dtype=torch.float32), call(X, dtype=torch.bool)],
    aten.to.dtype: [call(X, torch.float16), call(N, torch.bool)],
    aten.reshape.default: [call(X, [6, -1])],
    aten.view.default: [call(X, [4, 6])],
    aten._unsafe_view.default: [call(X, [24])],
    aten.unsqueeze.default: [call(X, 1), call(X, -1)],
    aten.squeeze.dim: [call(floats(2, 1, 3), 1), call(floats(2, 1, 3), 0)],
    aten.squeeze.dims: [call(floats(1, 2, 1), [0, 2])],
    aten.flatten.using_ints: [call(X), call(X, 1), call(X, 0, 1)],
    aten.transpose.int: [call(X, 0, 2), call(floats(2, 3, 4, 5), 1, 2), call(floats(2, 3, 4, 5), -1, 1)],
    aten.t.default: [call(Y), call(floats(3))],
    aten.permute.default: [call(X, [2, 0, -2])],
    aten.expand.default: [call(floats(2, 1, 4), [2, 3, -1]), call(Y, [2, 3, 4], implicit=True)],
    aten.expand_as.default: [call(floats(1, 4), X)],
    aten.cat.default: [call([Y, Y]), call([X, N], -1)],
    aten.stack.default: [call([Y, Y]), call([Y, Y], -1)],
    aten.slice.Tensor: [
        call(X), call(X, 1, 1), call(X, -1, None, -1), call(X, 2, 0, 2**63 - 1, 2), call(X, 1, -2, 3), call(X, 1, 2, 2),
    ],
    aten.select.int: [call(X, 1, 2), call(X, -1, -1)],
    aten.slice_scatter.default: [
        call(X, floats(2, 3, 4)), call(X, floats(2, 2, 4), 1, 1), call(X, floats(2, 3, 2), -1, 0, 3, 2),
    ],
    aten.gather.default: [call(X, 1, ROWS), call(X, -1, whole(2, 3, 2, low=0, high=4), sparse_grad=True)],
    aten.index_select.default: [call(X, 1, torch.tensor([2, 0, 2])), call(X, -1, torch.tensor([3]))],
    aten.index.Tensor: [call(X, [torch.tensor([1, 0])]), call(X, [None, whole(2, 2, low=0, high=3)])],
    aten.split_with_sizes.default: [call(X, [1, 1]), call(X, [1, 3], -1)],
    aten.split.Tensor: [call(X, 1), call(X, 3, 2)],
    aten.unbind.int: [call(X), call(X, -1)],
    aten.scatter.src: [call(X, 1, torch.tensor([[[2, 1], [0, 2]]]), floats(2, 3, 4))],
    aten.scatter.value: [call(X, 1, torch.tensor([[[2, 1], [0, 2]]]), 7.0)],
    aten.arange.default: [call(5), call(5, dtype=torch.float32)],
    aten.arange.start: [call(2, 5), call(2, 5, dtype=torch.float32)],
    aten.arange.start_step: [call(2, 9), call(9, 2, -3), call(2, 9, 3, dtype=torch.float32)],
    aten.zeros.default: [call([2, 3]), call([2], dtype=torch.int64)],
    aten.ones.default: [call([2, 3]), call([2], dtype=torch.bool)],
    aten.full.default: [call([2, 3], 1.5), call([2], 3, dtype=torch.float32)],
    aten.scalar_tensor.default: [call(1.5), call(3, dtype=torch.int64)],
    aten.zeros_like.default: [call(X), call(X, dtype=torch.int64)],
    aten.ones_like.default: [call(N), call(X, dtype=torch.bool)],
    aten.full_like.default: [call(X, 1.5), call(N, 2, dtype=torch.float32)],
    aten.new_zeros.default: [call(X, [3]), call(X, [3], dtype=torch.int64)],
    ops.take_rows: [call(X, torch.tensor([[2, 0], [1, 1]])), call(X[:1], torch.tensor([[2, 0]]))],
}  # fmt: skip


def _choices(tokens: int, experts: int, chosen: int) -> Tensor:
    """Different experts for every token ``[T,k]``."""
    return torch.rand(tokens, experts, generator=_random).topk(chosen).indices


def _experts(tokens: int, experts: int, chosen: int) -> Call:
    width, inner = 6, 5
    return call(
        floats(tokens, width), _choices(tokens, experts, chosen), positive(tokens, chosen),
        floats(experts, 2 * inner, width), floats(experts, width, inner),
    )  # fmt: skip


Q, PAST = floats(2, 4, 3, 8), floats(2, 2, 7, 8)
TABLE = (floats(2, 8, 8) @ floats(2, 8, 8).transpose(1, 2)).contiguous()
_START = torch.tensor([1, 2])
_OWN = {
    ops.write_rows: [
        call(PAST, floats(2, 2, 3, 8), torch.tensor([0, 0]), True),
        call(PAST, floats(2, 2, 1, 8), torch.tensor([3, 6]), False),
    ],
    ops.experts: [_experts(5, 4, 2), _experts(1, 8, 2), _experts(90, 3, 2)],
    score_ops.received_attention: [
        call(Q, floats(2, 2, 3, 8), 0.3, True), call(Q, floats(2, 4, 3, 8), 0.3, False, torch.tensor([2, 1])),
    ],
    score_ops.top_rows: [call(floats(2, 9), 4)],
    score_ops.pick_by_fold: [
        call(TABLE, _START, None, 4, "farthest", 0.0),
        call(TABLE, _START, None, 4, "sum", 0.0),
        call(TABLE, _START, positive(2, 8), 4, "weighted", 0.0),
        call(TABLE, _START, positive(2, 8), 4, "relevance", 0.5),
    ],
    score_ops.pick_by_coverage: [
        call(TABLE.abs(), _START, positive(2, 8), 4, product) for product in (False, True)
    ],
    score_ops.pick_by_determinant: [call(TABLE, positive(2, 8), 4)],
}  # fmt: skip

CASES: Mapping[Any, Sequence[Call]] = {**_PAIRS, **_SINGLE, **_REDUCED, **_LAYERS, **_MOVED, **_OWN}
SEEN_IN = {
    operator.getitem: (aten.topk.default, "no schema; whoever has several results is read through it"),
    torch.ops.higher_order.scan: (score_ops.pick_by_determinant, "no schema; greedy selectors are written as one"),
}
"""Targets without cases of their own, and an operator whose cases hold them."""
