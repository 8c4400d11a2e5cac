"""Every signal of the table as slow float64 NumPy over whole tensors, transcribed from what the table says of it.

A reading sees one row, or one image, as the model computed it: all heads at every slot, before anything was sliced for
speed. It returns what each group of tokens is shown. Nothing of ``passes/`` is read.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Options = Mapping[str, Any]


class Heads(NamedTuple):
    """Of one attention module: queries ``[H,L,d]``, keys and values ``[Hkv,L,d]``, the first two also before their
    rotation, its scale, and its window if it has one."""

    query: Array
    key: Array
    value: Array
    plain_query: Array
    plain_key: Array
    scale: float
    window: int | None = None


@dataclass
class Row:
    """A row before a decoder layer. Streams ``[L,D]``, ``heads`` by the projections option, flags ``[L]``; ``size``,
    ``source`` and ``carried`` ``[V]`` of its prunable tokens, ascending. ``image`` slots that are not ``prunable``
    are the rows a model adds behind its images."""

    hidden: Array
    normed: Array
    branch_inputs: Array
    branch_outputs: Array
    heads: Mapping[str, Heads]
    prunable: Array
    image: Array
    last: int
    entered: int
    size: Array
    source: Array
    carried: Array
    positions: Array
    blocks: Array | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.hidden)

    @property
    def tokens(self) -> list[int]:
        return [slot for slot in range(self.length) if self.prunable[slot]]

    @property
    def texts(self) -> list[int]:
        return [slot for slot in range(self.length) if not self.prunable[slot]]

    def of_group(self, group: int, groups: int) -> list[int]:
        """Slots of a group's tokens: the groups of a row have equally many, one after the other."""
        count = len(self.tokens) // groups
        return self.tokens[group * count : (group + 1) * count]


def softmax(logits: Array) -> Array:
    """Over the last dimension; what is -inf gets nothing."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)  # type: ignore[no-any-return]


def sees(row: Row, heads: Heads, query: int, key: int) -> bool:
    """Whether a slot attends to another: to what is not behind it, or of its own block; and not through a window to
    what lies as far before it as the window is long."""
    block = row.blocks is not None and row.blocks[query] >= 0 and row.blocks[query] == row.blocks[key]
    if heads.window is not None and row.positions[query] - row.positions[key] >= heads.window:
        return False
    return key <= query or bool(block)


def logits_of(row: Row, heads: Heads) -> Array:
    """``[H,L,L]``: query head h reads key head h * Hkv // H."""
    count, kinds = len(heads.query), len(heads.key)
    found = np.full((count, row.length, row.length), -math.inf)
    for head in range(count):
        key = heads.key[head * kinds // count]
        for i in range(row.length):
            for j in range(row.length):
                if sees(row, heads, i, j):
                    found[head, i, j] = heads.query[head, i] @ key[j] * heads.scale
    return found


def _attention(row: Row, options: Options) -> Array:
    heads = row.heads[options["projections"]]
    logits = logits_of(row, heads)
    return logits if options.get("softmax") == "none" else softmax(logits)


def _rotated(row: Row, kind: str, options: Options) -> Array:
    heads = row.heads[options["projections"]]
    found: Array = getattr(heads, f"plain_{kind}" if options.get("rotary") == "none" else kind)
    return found


def _received(row: Row, own: Sequence[int], options: Options) -> Array:
    real = _attention(row, options)[:, : row.last + 1]
    return real.mean(1)[:, own]  # type: ignore[no-any-return]


def _question(row: Row, options: Options) -> Array:
    behind = max(slot for slot in range(row.length) if row.image[slot]) if options["which"] == "question" else -1
    return np.array([behind < slot <= row.last for slot in row.texts])


def _all_logits(row: Row, options: Options) -> Array:
    logits = logits_of(row, row.heads[options["projections"]])
    logits[:, :, row.last + 1 :] = -math.inf
    return logits


def _square(values: Array, rows: Sequence[int], columns: Sequence[int]) -> Array:
    return values[:, rows][:, :, columns]  # type: ignore[no-any-return]


Decoder = Callable[[Row, int, int, Options], Array]
"""(row, group, groups of the row, options) -> what the group is shown."""


def _of_tokens(values: Callable[[Row], Array]) -> Decoder:
    def read(row: Row, group: int, groups: int, options: Options) -> Array:
        count = len(row.tokens) // groups
        return values(row)[group * count : (group + 1) * count]  # type: ignore[no-any-return]

    return read


DECODER: dict[str, Decoder] = {
    "tokens": lambda row, g, n, o: row.hidden[row.of_group(g, n)],
    "normed_tokens": lambda row, g, n, o: row.normed[row.of_group(g, n)],
    "size": _of_tokens(lambda row: row.size),
    "carried": _of_tokens(lambda row: row.carried),
    "source": lambda row, g, n, o: (
        _of_tokens(lambda row: row.source)(row, g, n, o) - g * (row.entered // n)  # counted in the group
    ),
    "received_attention": lambda row, g, n, o: _received(row, row.of_group(g, n), o),
    "self_attention": lambda row, g, n, o: _square(_attention(row, o), row.of_group(g, n), row.of_group(g, n)),
    "queries": lambda row, g, n, o: _rotated(row, "query", o)[:, row.of_group(g, n)],
    "keys": lambda row, g, n, o: _rotated(row, "key", o)[:, row.of_group(g, n)],
    "values": lambda row, g, n, o: row.heads[o["projections"]].value[:, row.of_group(g, n)],
    "last_query_attention": lambda row, g, n, o: _attention(row, o)[:, row.last, row.of_group(g, n)],
    "text_attention": lambda row, g, n, o: _square(_attention(row, o), row.texts, row.of_group(g, n)),
    "text_to_text_attention": lambda row, g, n, o: _square(_attention(row, o), row.texts, row.texts),
    "text_rows": lambda row, g, n, o: _question(row, o),
    "text_tokens": lambda row, g, n, o: row.hidden[row.texts],
    "normed_text": lambda row, g, n, o: row.normed[row.texts],
    "text_keys": lambda row, g, n, o: _rotated(row, "key", o)[:, row.texts],
    "attention_logits": lambda row, g, n, o: _all_logits(row, o),
    "slots": lambda row, g, n, o: np.array(row.of_group(g, n)),
    "real_slots": lambda row, g, n, o: np.arange(row.length) <= row.last,
    "branch_inputs": lambda row, g, n, o: row.branch_inputs,
    "branch_outputs": lambda row, g, n, o: row.branch_outputs,
}


@dataclass
class Picture:
    """One image as the vision side sees it. ``tokens [N,D]``; ``layers`` of the tower, their rows CLS (where ``cls``)
    and the patches in the tower's own ``order`` (of each patch, row by row, its place there). ``weights [N,P]``: how
    much of each patch a token is, rows that sum to 1. ``project`` is the projector, ``rows [N,Dv]`` what it reads."""

    tokens: Array
    layers: Mapping[int, Heads]
    cls: bool
    weights: Array
    order: Sequence[int]
    size: Array
    source: Array
    carried: Array
    rows: Array
    project: Callable[[Array], Array]

    @property
    def shares(self) -> Array:
        """``[N,P]``: how what a patch is paid is shared out among the tokens it counts in."""
        whole = self.weights.sum(0)
        return self.weights / np.where(whole > 0, whole, 1.0)  # type: ignore[no-any-return]

    @property
    def patches(self) -> list[int]:
        return [int(self.cls) + place for place in self.order]

    def attention(self, layer: int) -> Array:
        """``[H,S,S]``, every row to all rows."""
        heads = self.layers[layer]
        return np.stack([softmax(q @ k.T * heads.scale) for q, k in zip(heads.query, heads.key, strict=True)])


def _to_cls(image: Picture, layer: int, options: Options) -> Array:
    heads = image.layers[layer]
    query, key, scale = heads.query, heads.key, heads.scale
    if options.get("heads") == "joint":  # all heads' widths are one head of scale D ** -0.5
        query, key = (np.concatenate(list(each), axis=1)[None] for each in (query, key))
        scale = query.shape[2] ** -0.5
    paid = np.stack([softmax(key[h] @ query[h, 0] * scale) for h in range(len(query))])
    return paid[:, image.patches] @ image.shares.T  # type: ignore[no-any-return]


def _to_all(image: Picture, layer: int, options: Options) -> Array:
    paid = image.attention(layer).mean(1)
    return paid[:, image.patches] @ image.shares.T  # type: ignore[no-any-return]


def _among_patches(image: Picture, layer: int) -> Array:
    paid = _square(image.attention(layer), image.patches, image.patches)
    return np.stack([image.weights @ head @ image.shares.T for head in paid])


def _mean(image: Picture, values: Array) -> Array:
    return np.stack([image.weights @ head[image.patches] for head in values])


def _slopes(image: Picture, options: Options) -> Array:
    """Directions come from Python's own generator, number after number, and have length 1."""
    drawn = random.Random(options["seed"])
    width, step, found = image.rows.shape[1], options["step"], []
    for _ in range(options["directions"]):
        direction = np.array([drawn.gauss(0.0, 1.0) for _ in range(width)])
        step_along = direction / math.sqrt((direction**2).sum()) * step
        found.append((image.project(image.rows + step_along) - image.project(image.rows - step_along)) / (2 * step))
    return np.stack(found)


Tower = Callable[[Picture, Sequence[int], Options], Array]
"""(image, the tower layers that are read, options) -> what the image's group is shown."""

TOWER: dict[str, Tower] = {
    "tokens": lambda image, layers, o: image.tokens,
    "size": lambda image, layers, o: image.size,
    "carried": lambda image, layers, o: image.carried,
    "source": lambda image, layers, o: image.source,
    "cls_attention": lambda image, layers, o: _to_cls(image, layers[0], o),
    "cls_attention_layers": lambda image, layers, o: np.stack([_to_cls(image, at, o) for at in sorted(layers)]),
    "received_attention": lambda image, layers, o: _to_all(image, layers[0], o),
    "received_attention_layers": lambda image, layers, o: np.stack([_to_all(image, at, o) for at in sorted(layers)]),
    "self_attention": lambda image, layers, o: _among_patches(image, layers[0]),
    "queries": lambda image, layers, o: _mean(image, image.layers[layers[0]].query),
    "keys": lambda image, layers, o: _mean(image, image.layers[layers[0]].key),
    "values": lambda image, layers, o: _mean(image, image.layers[layers[0]].value),
    "cls_values": lambda image, layers, o: image.layers[layers[0]].value[:, 0],
    "projector_inputs": lambda image, layers, o: image.rows,
    "probe_slopes": lambda image, layers, o: _slopes(image, o),
}


def square_weights(grid: tuple[int, int], down: int, across: int) -> Array:
    """``[N,P]``: each token of ``grid`` is the mean of ``down`` by ``across`` patches."""
    rows, columns = grid
    found = np.zeros((rows * columns, rows * down * columns * across))
    for row in range(rows * down):
        for column in range(columns * across):
            token = row // down * columns + column // across
            found[token, row * columns * across + column] = 1 / (down * across)
    return found


def resized_weights(before: tuple[int, int], after: tuple[int, int]) -> Array:
    """``[N,P]`` of torch's own bilinear resizing from one grid to another, read off pictures of a single patch."""
    count = before[0] * before[1]
    single = torch.eye(count, dtype=torch.float64).reshape(count, 1, *before)
    resized = torch.nn.functional.interpolate(single, size=after, mode="bilinear", align_corners=False)
    return resized.reshape(count, -1).T.numpy()
