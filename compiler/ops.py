"""The custom operators a traced model is written in.

Each stands for something a backend has a fused kernel for, so it must survive tracing, pruning and export as
one node: attention (with and without a cache), rotary embedding, RMS normalisation, taking rows of a sequence.
Every operator has an eager kernel, so that a graph runs in plain PyTorch after any pass.

``attention``: ``q [B,H,S,d]``, ``k``/``v`` ``[B,Hkv,S,d]``. Products of q and k times ``scale``; with ``softcap`` c, c
tanh(them / c); plus ``bias``, floats that broadcast to ``[B,H,S,S]`` with their last two dimensions whole; then the
softmax over what a row sees. If not ``causal`` that is everything, and none of the following may be given.
``block_ids [B,S]`` int64: causal attention, but rows of one non-negative number see each other in both directions; -1
is in no block. ``window`` w: no row sees what lies w or more before it, whatever the block, counted in ``positions
[B,S]`` int64 or, without them, in slots.
``cached_attention``: ``q [B,H,S,d]``, ``k``/``v`` ``[B,Hkv,S,d]`` new rows, ``past_*`` ``[B,Hkv,C,d]`` buffers,
``start [B]`` slot of the first new row; returns the output and the buffers with the new rows written. Row i of b
sees slots up to ``start[b] + i``. ``fresh`` says that every start is 0; only then may ``block_ids`` be given. A
``window`` in ``positions [B,S]`` needs ``past_positions [B,C]`` where rows are not fresh, and only there: those of the
prompt's tokens, and ``BEHIND`` in all slots behind them; new tokens have consecutive ones, so that their slots tell.
``bias`` is one of ``[B,H,S,S]`` where rows are fresh, of ``[B,H,S,C]`` where they are not.
``rms_norm``: over the last dimension, in float32. ``offset``: the weight counts from 1 and is applied in float32 too.
``rotary``: ``x [B,H,S,d]``, ``cos``/``sin`` ``[B,S,d]``, halves rotated.
``write_rows``: ``past [B,Hkv,C,d]`` with ``new [B,Hkv,S,d]`` at the slots from ``start[b]`` on.
``take_rows``: ``x [B,L,...]``, ``index [B,K]`` -> ``[B,K,...]``.
``experts``: ``x [T,D]``, ``indices [T,k]`` int64 of E experts, no expert twice in a row, ``weights [T,k]``,
``gate_up [E,2F,D]``, ``down [E,D,F]`` -> ``[T,D]``: the weighted sum of what each token's experts make of it.
"""

# The schemas below type the kernels.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.runtime.errors import UserError

LIB = torch.library.Library("secateur", "DEF")
BEHIND = 1 << 30
"""As a slot's position: it is behind the prompt."""

LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, int? window=None, "
    "float? softcap=None, Tensor? bias=None, Tensor? block_ids=None, Tensor? positions=None) -> Tensor"
)
LIB.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor start, bool fresh, "
    "float scale, int? window=None, float? softcap=None, Tensor? block_ids=None, Tensor? positions=None, "
    "Tensor? past_positions=None, Tensor? bias=None) -> (Tensor, Tensor, Tensor)"
)
LIB.define("write_rows(Tensor past, Tensor new, Tensor start, bool fresh) -> Tensor")
LIB.define("take_rows(Tensor x, Tensor index) -> Tensor")
LIB.define("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor")
LIB.define("rms_norm(Tensor x, Tensor weight, float eps, bool offset=False) -> Tensor")
LIB.define("experts(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down) -> Tensor")


def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Reference attention. ``q [B,H,S,d]``, ``k``/``v`` ``[B,Hkv,C,d]``, ``mask`` bool ``[B,1,S,C]``, ``bias`` a float
    tensor that broadcasts to ``[B,H,S,C]``, added after the soft cap as transformers adds its masks."""
    groups = q.shape[1] // k.shape[1]
    if softcap is None:
        if bias is not None:
            mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, float("-inf"))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups > 1
        )
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = torch.tanh((q @ k.transpose(-1, -2)) * scale / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return torch.softmax(logits.float(), -1).to(q.dtype) @ v


def check_attention(node: str, q: Tensor, keys: int, bias: Tensor | None, banned: Mapping[str, Any], why: str) -> None:
    """Raises UserError for an operand of attention that means nothing beside the others, or a bias of another shape."""
    for name, value in banned.items():
        if value is not None:
            raise UserError(f"{node} takes no {name} {why}", where="attention", fix=f"leave {name} out")
    if bias is None:
        return
    wanted = (q.shape[0], q.shape[1], q.shape[2], keys)
    fits = bias.dim() == 4 and bias.is_floating_point() and bias.shape[2:] == wanted[2:]
    if not fits or any(n not in (1, size) for n, size in zip(bias.shape[:2], wanted[:2], strict=True)):
        raise UserError(
            f"{node} takes no bias {str(bias.dtype).removeprefix('torch.')}{list(bias.shape)}", where="attention",
            fix=f"give floats of shape [{wanted[0]} or 1, {wanted[1]} or 1, {wanted[2]}, {keys}]",
        )  # fmt: skip


def causal_mask(
    start: Tensor,
    queries: int,
    keys: int,
    window: int | None,
    block_ids: Tensor | None = None,
    positions: Tensor | None = None,
    past_positions: Tensor | None = None,
) -> Tensor:
    """``[B,1,queries,keys]``: query i of row b stands at slot ``start[b] + i`` and sees slots up to its own, and those
    of its block (``block_ids [B,keys]``, as many queries as keys), as far as the window reaches: in ``positions
    [B,queries]`` of queries and ``past_positions [B,keys]`` of keys, which are the same where none are given."""
    slot = start[:, None] + torch.arange(queries, device=start.device)
    key = torch.arange(keys, device=start.device)
    mask = key[None, None] <= slot[..., None]
    if block_ids is not None:
        mask = mask | same_block(block_ids[..., None], block_ids[:, None])
    if window is not None:
        if positions is None or past_positions is not None:
            mask = mask & (key[None, None] > slot[..., None] - window)
        if positions is not None:
            seen = positions if past_positions is None else past_positions
            mask = mask & (seen[:, None] > positions[..., None] - window)
    return mask[:, None]


def same_block(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether two rows are of one block, by their numbers; -1 is none."""
    return (queries == keys) & (keys >= 0)


@torch.library.impl(LIB, "attention", "CompositeExplicitAutograd")
def _attention(q, k, v, scale, causal, window=None, softcap=None, bias=None, block_ids=None, positions=None):
    _check_at_once(q, k, causal, window, bias, block_ids, positions)
    mask = None
    if causal:
        start = torch.zeros(q.shape[0], dtype=torch.int64)
        mask = causal_mask(start, q.shape[2], k.shape[2], window, block_ids, positions)
    return scaled_attention(q, k, v, scale, mask, softcap, bias).contiguous()


@torch.library.impl(LIB, "cached_attention", "CompositeExplicitAutograd")
def _cached_attention(
    q, k, v, past_k, past_v, start, fresh, scale, window=None, softcap=None, block_ids=None, positions=None,
    past_positions=None, bias=None,
):  # fmt: skip
    _check_cached(q, k, past_k, fresh, window, block_ids, positions, past_positions, bias)
    rows = start[:, None] + torch.arange(q.shape[2])
    at = rows[:, None, :, None].expand(k.shape)
    present_k, present_v = past_k.scatter(2, at, k), past_v.scatter(2, at, v)
    if fresh:  # the cache holds nothing older: attending to the new rows alone is the same and cheaper
        mask = causal_mask(start, q.shape[2], k.shape[2], window, block_ids, positions)
        return scaled_attention(q, k, v, scale, mask, softcap, bias).contiguous(), present_k, present_v
    mask = causal_mask(start, q.shape[2], past_k.shape[2], window, None, positions, past_positions)
    return scaled_attention(q, present_k, present_v, scale, mask, softcap, bias).contiguous(), present_k, present_v


def _check_at_once(q, k, causal, window, bias, block_ids, positions):
    limits = {} if causal else {"window": window, "block_ids": block_ids, "positions": positions}
    check_attention("secateur::attention", q, k.shape[2], bias, limits, "where it is not causal")


def _check_cached(q, k, past_k, fresh, window, block_ids, positions, past_positions, bias):
    node = "secateur::cached_attention"
    if fresh:
        check_attention(node, q, k.shape[2], bias, {"past_positions": past_positions}, "where rows are fresh")
        return
    check_attention(node, q, past_k.shape[2], bias, {"block_ids": block_ids}, "where rows are not fresh")
    if window is not None and past_positions is None:
        check_attention(node, q, 0, None, {"positions": positions}, "without past_positions where rows are not fresh")


@torch.library.impl(LIB, "write_rows", "CompositeExplicitAutograd")
def _write_rows(past, new, start, fresh):
    at = start[:, None] + torch.arange(new.shape[2])
    return past.scatter(2, at[:, None, :, None].expand(new.shape), new)


@torch.library.impl(LIB, "rotary", "CompositeExplicitAutograd")
def _rotary(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


@torch.library.impl(LIB, "rms_norm", "CompositeExplicitAutograd")
def _rms_norm(x, weight, eps, offset=False):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype) if offset else weight * normed.to(x.dtype)


@torch.library.impl(LIB, "experts", "CompositeExplicitAutograd")
def _experts(x, indices, weights, gate_up, down):
    """Expert by expert over the rows that chose it: each expert is ``down(silu(gate(x)) * up(x))``."""
    out = torch.zeros_like(x)
    for expert in indices.unique().tolist():
        row, choice = torch.where(indices == expert)
        gate, up = torch.nn.functional.linear(x[row], gate_up[expert]).chunk(2, -1)
        made = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[expert])
        out.index_add_(0, row, (made * weights[row, choice, None]).to(out.dtype))
    return out


@torch.library.register_fake("secateur::attention", lib=LIB)
def _attention_fake(q, k, v, scale, causal, window=None, softcap=None, bias=None, block_ids=None, positions=None):
    _check_at_once(q, k, causal, window, bias, block_ids, positions)
    # Contiguous strides: a later view() of a fake with q's strides would fail at run time only.
    return q.new_empty(q.shape)


@torch.library.register_fake("secateur::cached_attention", lib=LIB)
def _cached_attention_fake(
    q, k, v, past_k, past_v, start, fresh, scale, window=None, softcap=None, block_ids=None, positions=None,
    past_positions=None, bias=None,
):  # fmt: skip
    _check_cached(q, k, past_k, fresh, window, block_ids, positions, past_positions, bias)
    return q.new_empty(q.shape), past_k.new_empty(past_k.shape), past_v.new_empty(past_v.shape)


@torch.library.impl(LIB, "take_rows", "CompositeExplicitAutograd")
def _take_rows(x, index):
    rows = index.reshape(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, rows.expand(*index.shape, *x.shape[2:]))


@torch.library.register_fake("secateur::write_rows", lib=LIB)
def _write_rows_fake(past, new, start, fresh):
    return past.new_empty(past.shape)


@torch.library.register_fake("secateur::take_rows", lib=LIB)
def _take_rows_fake(x, index):
    return x.new_empty((*index.shape, *x.shape[2:]))


@torch.library.register_fake("secateur::rotary", lib=LIB)
def _rotary_fake(x, cos, sin):
    return x.new_empty(x.shape)


@torch.library.register_fake("secateur::rms_norm", lib=LIB)
def _rms_norm_fake(x, weight, eps, offset=False):
    return x.new_empty(x.shape)


@torch.library.register_fake("secateur::experts", lib=LIB)
def _experts_fake(x, indices, weights, gate_up, down):
    return x.new_empty(x.shape)


attention = torch.ops.secateur.attention.default
cached_attention = torch.ops.secateur.cached_attention.default
rotary = torch.ops.secateur.rotary.default
take_rows = torch.ops.secateur.take_rows.default
write_rows = torch.ops.secateur.write_rows.default
rms_norm = torch.ops.secateur.rms_norm.default
experts = torch.ops.secateur.experts.default
