"""Signals as plain functions of what a layer computes: the compiled graph and the eager oracle share them.

What they read are a few *raw* tensors per stage: projections of some rows, what a branch reads and adds. Attention
signals are thin slices where the method allows: the query rows that are needed against all keys, beside the fused
attention. Softmax is in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.compiler import ops, score_ops
from secateur.compiler.plan_recipe import PlannedStage
from secateur.compiler.score_ops import attend_rows, mean_over_real, score_rows
from secateur.passes.stage import StageFunction
from secateur.passes.units import Merge, mean_units, sum_units

Join = Callable[[Tensor, int, bool], Tensor]
"""(numbers per token of each grid, the dimension of the tokens, whether they are attention paid to these) -> numbers
per token of each image."""

STATE = ("carried", "size", "source")
"""Signals that are handed from stage to stage, one number per prunable token of a row."""


class Raw(NamedTuple):
    """One tensor a signal is made of. ``kind``: "key", "value" (all rows), "query" (all rows), "last_query",
    "text_query", "visual_query" (those rows), the same with "plain_" before rotation, "normed", "attention_in",
    "attention_out", "mlp_in", "mlp_out". ``where``: the projections option, in the decoder."""

    kind: str
    where: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.where}" if self.where else self.kind

    @property
    def rows(self) -> str:
        """Which rows of the sequence it holds: "last", "text", "visual" or "all"."""
        head = self.kind.removeprefix("plain_").partition("_")[0]
        return head if head in ("last", "text", "visual") else "all"


_KINDS: dict[str, tuple[str, ...]] = {
    "last_query_attention": ("last_query", "key"),
    "text_attention": ("text_query", "key"),
    "text_to_text_attention": ("text_query", "key"),
    "self_attention": ("visual_query", "key"),
    "received_attention": ("query", "key"),
    "attention_logits": ("query", "key"),
    "queries": ("visual_query",),
    "keys": ("key",),
    "text_keys": ("key",),
    "values": ("value",),
    "normed_tokens": ("normed",),
    "normed_text": ("normed",),
    "branch_inputs": ("attention_in", "mlp_in"),
    "branch_outputs": ("attention_out", "mlp_out"),
}


def raws_of(stage: StageFunction, signal: str) -> tuple[Raw, ...]:
    """The raw tensors ``signal`` of a decoder stage is made of."""
    options = stage.signal_options[signal]
    plain = "plain_" if options.get("rotary") == "none" else ""
    return tuple(Raw(plain + kind, options.get("projections", "")) for kind in _KINDS.get(signal, ()))


def list_raws(stage: StageFunction) -> list[Raw]:
    """Every raw tensor a decoder stage needs, each once, sorted."""
    return sorted({raw for signal in stage.signals for raw in raws_of(stage, signal)})


@dataclass(frozen=True)
class SequenceView:
    """A decoder stage's surroundings. ``hidden [B,L,D]``; ``last [B]`` slot of the last real token; ``columns [B,V]``
    slots of the prunable tokens and ``texts [B,T]`` of the others, both ascending; ``raw`` by name (heads
    ``[B,H,rows,d]``, streams ``[B,L,D]``); ``scale`` of attention by name; ``state [B,V]`` of earlier stages;
    ``entered``: prunable tokens of a row before any stage."""

    hidden: Tensor
    last: Tensor
    columns: Tensor
    texts: Tensor
    raw: Mapping[str, Tensor]
    scale: Mapping[str, float]
    state: Mapping[str, Tensor]
    entered: int
    extra_rows: int = 0
    """Rows behind each image's tokens that are no text and not prunable."""
    block_ids: Tensor | None = None
    """``[B,L]``, where rows of one image attend to each other in both directions."""
    question: Tensor | None = None
    """Real rows behind the last image ``[B]``, where such rows stand between its tokens as well: when a stage has
    removed some of those, nobody can tell from the slots how many are left behind the last one."""
    window: Mapping[str, int] = field(default_factory=dict)
    """Sliding windows of attention by name of the query, where they hide anything."""
    positions: Tensor | None = None
    """``[B,L]``: what windows are counted in; None for slots."""

    @property
    def length(self) -> int:
        return self.hidden.shape[1]

    def slots(self, rows: str) -> Tensor:
        """Slots ``[B,R]`` of the rows a :class:`Raw` holds."""
        if rows == "all":
            return torch.arange(self.length).expand(self.hidden.shape[0], self.length)
        return {"last": self.last[:, None], "text": self.texts, "visual": self.columns}[rows]


def sequence_signals(stage: StageFunction, seen: SequenceView) -> dict[str, Tensor]:
    """The signals of a decoder stage, float32, per group: shapes in ``passes/signal_table.py``."""
    found = {name: _sequence_signal(name, stage, seen) for name in stage.signals}
    return {name: value for name, value in found.items() if value is not None}


def _sequence_signal(name: str, stage: StageFunction, seen: SequenceView) -> Tensor | None:
    planned, options = stage.planned, stage.signal_options[name]
    raw = [(part, seen.raw[part.name]) for part in raws_of(stage, name)]
    if name in STATE:
        if name not in seen.state:
            return None
        split = split_groups(seen.state[name], planned)
        if name == "source":
            first = [group % planned.groups * (seen.entered // planned.groups) for group in range(split.shape[0])]
            return split - torch.tensor(first)[:, None]
        return split
    if name in ("tokens", "normed_tokens"):
        rows = seen.hidden if name == "tokens" else raw[0][1]
        return split_groups(ops.take_rows(rows, seen.columns).float(), planned)
    if name in ("text_tokens", "normed_text"):
        rows = seen.hidden if name == "text_tokens" else raw[0][1]
        return repeat_groups(ops.take_rows(rows, seen.texts).float(), planned)
    if name == "text_rows":
        counts = seen.texts <= seen.last[:, None]
        if options["which"] == "question":
            behind = seen.columns[:, -1:] + seen.extra_rows
            if seen.question is not None:
                behind = (seen.last - seen.question)[:, None]
            counts = counts & (seen.texts > behind)
        return repeat_groups(counts, planned)
    if name == "slots":
        return split_groups(seen.columns, planned)
    if name == "real_slots":
        return repeat_groups(torch.arange(seen.length) <= seen.last[:, None], planned)
    if name in ("branch_inputs", "branch_outputs"):
        return repeat_groups(torch.stack([value.float() for _, value in raw], 1), planned)
    if name in ("queries", "keys", "values", "text_keys"):
        part, heads = raw[0]
        if name == "text_keys":
            return repeat_groups(take_head_rows(heads.float(), seen.texts), planned)
        heads = heads if part.rows == "visual" else take_head_rows(heads, seen.columns)
        return _split_heads(heads.float(), planned)
    (part, query), (_, key) = raw
    blocks = seen.block_ids if part.rows in ("all", "visual") else None  # text is in no block
    if name == "received_attention" and blocks is None and part.name not in seen.window:
        received = score_ops.received_attention(query, key, seen.scale[part.name], True, seen.last)
        return _split_columns(take_columns(received, seen.columns), planned)
    slots = seen.slots(part.rows)
    logits = score_rows(query, key, seen.scale[part.name], slots, blocks)
    if part.name in seen.window:
        logits = logits.masked_fill(_outside(slots, seen.window[part.name], seen), float("-inf"))
    if name == "attention_logits":
        padding = (torch.arange(seen.length) > seen.last[:, None])[:, None, None]
        return repeat_groups(logits.masked_fill(padding, float("-inf")), planned)
    attention = logits if options.get("softmax") == "none" else torch.softmax(logits, -1)
    if name == "received_attention":
        return _split_columns(take_columns(mean_over_real(attention, seen.last), seen.columns), planned)
    if name == "last_query_attention":
        return _split_columns(take_columns(attention[:, :, 0], seen.columns), planned)
    if name == "text_to_text_attention":
        return repeat_groups(_take_keys(attention, seen.texts), planned)
    picked = _take_keys(attention, seen.columns)
    if name == "text_attention":
        return _split_columns(picked, planned)
    return _diagonal_blocks(picked, planned)


def _outside(slots: Tensor, window: int, seen: SequenceView) -> Tensor:
    """Which keys lie too far before the rows at ``slots [B,R]`` for a sliding window: bool ``[B,1,R,L]``."""
    if seen.positions is None:
        return (torch.arange(seen.length) <= slots[..., None] - window)[:, None]
    own = seen.positions.gather(1, slots)[..., None]
    return (seen.positions[:, None] <= own - window)[:, None]


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


def take_head_rows(heads: Tensor, slots: Tensor) -> Tensor:
    """``[B,H,L,d]``, ``[B,R]`` -> ``[B,H,R,d]``."""
    return ops.take_rows(heads.transpose(1, 2), slots).transpose(1, 2)


def split_groups(rows: Tensor, planned: PlannedStage) -> Tensor:
    """``[B,V,...]`` -> ``[B*groups, V/groups, ...]``."""
    return rows.reshape(rows.shape[0] * planned.groups, planned.length_in, *rows.shape[2:])


def repeat_groups(rows: Tensor, planned: PlannedStage) -> Tensor:
    """What all groups of a row share: ``[B,...]`` -> ``[B*groups,...]``."""
    if planned.groups == 1:
        return rows
    batch, *rest = rows.shape
    return rows[:, None].expand(batch, planned.groups, *rest).reshape(batch * planned.groups, *rest)


def _take_keys(attention: Tensor, columns: Tensor) -> Tensor:
    """``[B,H,R,L]``, ``[B,V]`` -> ``[B,H,R,V]``."""
    batch, heads, rows, length = attention.shape
    picked = take_columns(attention.reshape(batch, heads * rows, length), columns)
    return picked.reshape(batch, heads, rows, columns.shape[1])


def _split_columns(attention: Tensor, planned: PlannedStage) -> Tensor:
    """``[B,H,...,V]`` -> ``[B*groups,H,...,V/groups]``."""
    if planned.groups == 1:
        return attention
    order = [0, attention.dim() - 1, *range(1, attention.dim() - 1)]
    split = split_groups(attention.permute(order), planned)
    return split.permute([0, *range(2, attention.dim()), 1])


def _split_heads(heads: Tensor, planned: PlannedStage) -> Tensor:
    """``[B,H,V,d]`` -> ``[B*groups,H,V/groups,d]``."""
    return split_groups(heads.transpose(1, 2), planned).transpose(1, 2)


def _diagonal_blocks(attention: Tensor, planned: PlannedStage) -> Tensor:
    """``[B,H,V,V]`` -> ``[B*groups,H,V/groups,V/groups]``: what a group's tokens pay to each other."""
    groups, count = planned.groups, planned.length_in
    if groups == 1:
        return attention
    batch, heads = attention.shape[:2]
    tiles = attention.reshape(batch, heads, groups, count, groups, count)
    own = torch.stack([tiles[:, :, i, :, i] for i in range(groups)], 1)
    return own.reshape(batch * groups, heads, count, count)


@dataclass(frozen=True)
class PatchView:
    """A tower-side stage's surroundings. ``tokens [M,N,D]`` visual tokens of every image; ``raw`` queries, keys and
    values ``[M,H,(1+)P,d]`` by kind and tower layer (:func:`tower_raw`); ``cls`` whether row 0 is the CLS token;
    ``state [M,N]``; ``extra``: "projector_inputs [M,N,Dv]" and "probes [2*m*M,N,D]" where asked for. The P patches are
    the N tokens, or several of them make one on a ``grid`` of tokens (:mod:`secateur.passes.units`)."""

    tokens: Tensor
    raw: Mapping[str, Tensor]
    scale: float
    cls: bool
    state: Mapping[str, Tensor]
    extra: Mapping[str, Tensor]
    grid: tuple[int, int]
    merge: Merge = 1
    order: tuple[int, ...] = ()
    """Of each patch, row by row, its place among ``raw``'s; empty where they are row by row."""
    join: Join | None = None
    """Where ``tokens``, ``raw`` and ``extra`` are those of the tiles of an image, and groups are whole images: puts
    them together. ``state`` is the image's already."""
    whole: bool = False
    """Whether ``tokens`` are the image's already."""

    @property
    def rows(self) -> Tensor:
        """The tokens a stage chooses among ``[G,N,D]``."""
        return self.tokens if self.join is None or self.whole else self.join(self.tokens, 1, False)

    def heads(self, kind: str, layer: int) -> Tensor:
        """Queries, keys or values of a tower layer, patches row by row."""
        raw = self.raw[tower_raw(kind, layer)]
        return raw.index_select(2, torch.tensor(self.order)) if self.order else raw


_TOWER_KINDS: dict[str, tuple[str, ...]] = {
    "cls_attention": ("query", "key"),
    "cls_attention_layers": ("query", "key"),
    "received_attention": ("query", "key"),
    "received_attention_layers": ("query", "key"),
    "self_attention": ("query", "key"),
    "queries": ("query",),
    "keys": ("key",),
    "values": ("value",),
    "cls_values": ("value",),
}
_TOKENS_AT = {
    "tokens": 1, "projector_inputs": 1, "probe_slopes": 2, "cls_attention": 2, "cls_attention_layers": 3,
    "received_attention": 2, "received_attention_layers": 3, "queries": 2, "keys": 2, "values": 2,
}  # fmt: skip
"""The dimension of a grid's tokens in each signal that tiles of an image can be put together in."""
_PAID = ("cls_attention", "cls_attention_layers", "received_attention", "received_attention_layers")
NEED_CLS = ("cls_attention", "cls_attention_layers", "cls_values")


def tower_raw(kind: str, layer: int) -> str:
    """The name of a tower layer's "query", "key" or "value"."""
    return f"{kind}_{layer}"


def list_tower_raws(stage: StageFunction, layers: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    """(kind, layer) a tower-side stage needs, each once, sorted; ``layers`` per signal."""
    return sorted({(kind, layer) for s in stage.signals for kind in _TOWER_KINDS.get(s, ()) for layer in layers[s]})


def joins_tiles(signal: str) -> bool:
    """Whether the signal exists for an image whose tiles the tower saw one by one."""
    return signal in STATE or signal in _TOKENS_AT


def attends_in_tower(signal: str) -> bool:
    """Whether ``signal`` of a tower-side stage comes from attention projections."""
    return signal in _TOWER_KINDS


def patch_signals(stage: StageFunction, seen: PatchView, layers: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The signals of a tower-side stage, float32, per image; ``layers`` gives each signal's tower layers."""
    found = {name: _patch_signal(name, stage, seen, layers.get(name, ())) for name in stage.signals}
    if seen.join is not None:
        own = (*STATE, *(["tokens"] if seen.whole else []))
        found = {n: v if v is None or n in own else seen.join(v, _TOKENS_AT[n], n in _PAID) for n, v in found.items()}
    return {name: value for name, value in found.items() if value is not None}


def _patch_signal(name: str, stage: StageFunction, seen: PatchView, layers: tuple[int, ...]) -> Tensor | None:
    options = stage.signal_options[name]
    if name in STATE:
        return seen.state.get(name)
    if name == "tokens":
        return seen.tokens.float()
    if name == "projector_inputs":
        return seen.extra[name].float()
    if name == "probe_slopes":
        return _slopes(seen.extra["probes"].float(), seen.tokens.shape[0], float(options["step"]))
    first = 1 if seen.cls else 0
    if name.endswith("_layers"):
        each = [_tower_attention(name.removesuffix("_layers"), options, seen, layer) for layer in layers]
        return torch.stack(each, 1)
    (layer,) = layers
    if name == "cls_values":
        return seen.heads("value", layer)[:, :, 0].float()
    if name in ("queries", "keys", "values"):
        heads = seen.heads(name[:-1] if name != "queries" else "query", layer)[:, :, first:].float()
        return mean_units(heads, seen.grid, seen.merge, 2)
    return _tower_attention(name, options, seen, layer)


def _tower_attention(name: str, options: Mapping[str, object], seen: PatchView, layer: int) -> Tensor:
    query, key = seen.heads("query", layer), seen.heads("key", layer)
    first, scale = int(seen.cls), seen.scale
    if name == "cls_attention":
        query = query[:, :, :1]
        if options.get("heads") == "joint":
            scale *= query.shape[1] ** -0.5  # d ** -0.5 per head becomes (H * d) ** -0.5
            query, key = _join_heads(query), _join_heads(key)
        return sum_units(attend_rows(query, key, scale)[:, :, 0, 1:], seen.grid, seen.merge)
    if name == "received_attention":
        received = score_ops.received_attention(query, key, scale, False)
        return sum_units(received[:, :, first:], seen.grid, seen.merge)
    attention = attend_rows(query, key, scale)
    return mean_units(sum_units(attention[:, :, first:, first:], seen.grid, seen.merge), seen.grid, seen.merge, 2)


def _join_heads(heads: Tensor) -> Tensor:
    """``[M,H,S,d]`` -> ``[M,1,S,H*d]``."""
    return heads.transpose(1, 2).flatten(2).unsqueeze(1)


def make_probes(rows: Tensor, directions: int, step: float, seed: int) -> Tensor:
    """``rows [M,N,Dv]`` moved along unit directions, first all forwards, then all backwards: ``[2*m*M,N,Dv]``.

    The directions are constants, normally distributed, drawn by Python's generator, whose sequence never changes.
    """
    source = random.Random(seed)
    width = rows.shape[2]
    drawn = torch.tensor([[source.gauss(0.0, 1.0) for _ in range(width)] for _ in range(directions)])
    unit = (drawn / drawn.norm(dim=1, keepdim=True) * step).to(rows.dtype)
    both = torch.cat([unit, -unit])
    return (rows.unsqueeze(0) + both[:, None, None]).reshape(-1, *rows.shape[1:])


def _slopes(probes: Tensor, images: int, step: float) -> Tensor:
    """Projected probes ``[2*m*M,N,D]`` -> finite differences ``[M,m,N,D]``."""
    both = probes.reshape(2, -1, images, *probes.shape[1:])
    return ((both[0] - both[1]) / (2 * step)).transpose(0, 1)
