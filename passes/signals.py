"""Signals as plain functions of what a layer computes: the compiled graph and the eager oracle share them.

Attention signals are thin slices: the query rows that are needed against all keys, beside the fused attention
and never the full map. Softmax is in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.compiler import ops


def attend_from_row(query: Tensor, key: Tensor, scale: float, last: Tensor) -> Tensor:
    """Post-softmax attention of one query row. ``query [B,H,1,d]``, ``key [B,Hkv,L,d]``, ``last [B]`` -> ``[B,H,L]``.

    Keys after slot ``last[b]`` (padding) get no weight: this is the causal row of the last real token.
    """
    batch, heads, _, width = query.shape
    groups = heads // key.shape[1]
    folded = query.float().reshape(batch, key.shape[1], groups, width)
    logits = (folded @ key.float().transpose(-1, -2) * scale).reshape(batch, heads, key.shape[2])
    future = torch.arange(key.shape[2]) > last[:, None]
    return torch.softmax(logits.masked_fill(future[:, None], float("-inf")), -1)


def attend_from_cls(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Post-softmax attention of row 0 to the other rows: ``[M,H,1+N,d]`` twice -> ``[M,H,N]``."""
    logits = (query[:, :, :1].float() * scale) @ key.float().transpose(-1, -2)
    return torch.softmax(logits, -1)[:, :, 0, 1:]


def find_prunable(prunable: Tensor, count: int) -> Tensor:
    """Slots of the ``count`` true entries of each row, ascending: bool ``[B,L]`` -> int64 ``[B,count]``.

    Each true entry is scattered to its rank; the rest goes to a spill slot. That needs no top-k, so no backend's
    limit on k applies.
    """
    batch, length = prunable.shape
    rank = torch.cumsum(prunable.to(torch.int64), 1) - 1
    slot = torch.where(prunable, rank, count)
    # Longer than needed: TensorRT wants the scattered data at least as long as the indices.
    spare = torch.zeros(batch, length + 1, dtype=torch.int64)
    source = torch.arange(length).expand(batch, length)
    return spare.scatter(1, slot, source)[:, :count]


def take_columns(attention: Tensor, columns: Tensor) -> Tensor:
    """``[B,H,L]``, ``[B,V]`` -> ``[B,H,V]``."""
    return ops.take_rows(attention.transpose(1, 2), columns).transpose(1, 2)
