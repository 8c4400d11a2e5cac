"""Transcriptions of the rows in ``passes/recipes/tower_attention_rows.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from . import Expected, Transcription, View

Array = np.ndarray[Any, Any]


def heads_mean(attention: Array) -> list[float]:
    """``[H,N]``: per token the mean over heads."""
    return [sum(float(head[token]) for head in attention) / len(attention) for token in range(attention.shape[1])]


def heads_sum(attention: Array) -> list[float]:
    return [sum(float(head[token]) for head in attention) for token in range(attention.shape[1])]


def by_score(score: Sequence[float], among: Iterable[int] | None = None) -> list[int]:
    """Tokens, the highest score first, ties by index."""
    return sorted(range(len(score)) if among is None else among, key=lambda token: (-score[token], token))


def cosine(a: Array, b: Array) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))


def half_up(value: float) -> int:
    return math.floor(value + 0.5)


# FasterVLM and VTC-CLS.


def fastervlm(view: View) -> Expected:
    """The k tokens the CLS token attends to most, mean over heads."""
    return Expected(sorted(by_score(heads_mean(view.cls_attention))[: view.k]))


def vtc_cls(view: View) -> Expected:
    """The same for the sum over layers of the mean over heads."""
    per_layer = [heads_mean(layer) for layer in view.cls_attention_layers]
    total = [sum(layer[token] for layer in per_layer) for token in range(view.count)]
    return Expected(sorted(by_score(total)[: view.k]))


# VisionZip.


def visionzip(view: View) -> Expected:
    """Dominant tokens by CLS attention; contextual ones at even steps among the others, first ones first.

    Of the k tokens round(0.156 k) are contextual, at least one and at most k - 1, none for k = 1. Every other token
    goes to the contextual one whose head-averaged key is most similar, which gains the mean of what it was given.
    """
    contextual = 0 if view.k == 1 else min(max(half_up(0.156 * view.k), 1), view.k - 1)
    dominant = sorted(by_score(heads_sum(view.cls_attention))[: view.k - contextual])
    others = [token for token in range(view.count) if token not in dominant]
    targets: list[int] = []
    if contextual:
        step = len(others) // contextual
        targets = [others[place] for place in range(0, len(others), step)][:contextual]
    metric = [
        sum(view.keys[head, token].astype(float) for head in range(len(view.keys))) / len(view.keys)
        for token in range(view.count)
    ]
    given: dict[int, list[int]] = {target: [] for target in targets}
    for token in others:
        if targets and token not in targets:
            similar = [cosine(metric[token], metric[target]) for target in targets]
            given[targets[similar.index(max(similar))]].append(token)
    rows = []
    for token in sorted(dominant + targets):
        row = view.tokens[token].astype(float)
        if given.get(token):
            row = row + sum(view.tokens[other].astype(float) for other in given[token]) / len(given[token])
        rows.append(row)
    return Expected(sorted(dominant + targets), np.stack(rows))


# VisPruner.


def vispruner(view: View) -> Expected:
    return Expected(important_and_distinct(view, heads_mean(view.cls_attention)))


def vispruner_siglip(view: View) -> Expected:
    return Expected(important_and_distinct(view, heads_mean(view.received_attention)))


def important_and_distinct(view: View, score: Sequence[float]) -> list[int]:
    """int(0.5 k) tokens by score; the others lose up to eight a round, at most half, until enough are gone.

    A round pairs each token at an even place of the list with the most similar one at an odd place and removes those
    whose pair is most similar. What is left at even places, in descending order of that similarity, then the odd
    places, is the next list; the first one is in descending order of score.
    """
    important = int(view.k * 0.5)
    order = by_score(score)
    chosen, rest = order[:important], order[important:]
    left = view.k - important
    while len(rest) > left:
        even, odd = rest[::2], rest[1::2]
        drop = min(8, len(rest) - left, len(odd))
        similar = {token: max(cosine(view.tokens[token], view.tokens[other]) for other in odd) for token in even}
        rest = sorted(even, key=lambda token: -similar[token])[drop:] + odd
    return sorted(chosen + rest)


# PruMerge and Recoverable Compression.


def prumerge(view: View) -> Expected:
    """k - 1 tokens by attention; the k-th place is that of the token that sums up all the others."""
    score = heads_mean(view.cls_attention)
    order = by_score(score)
    return merge_by_keys(view, score, order[: view.k - 1], order[view.k - 1])


def prumerge_plus(view: View) -> Expected:
    """A quarter of the k - 1 places by attention, the others by an even grid, what is free then by attention."""
    score = heads_mean(view.cls_attention)
    order = by_score(score)
    kept = order[: half_up(0.25 * (view.k - 1))]
    places = view.k - 1 - len(kept)
    grid = [int(place * view.count / places + 1e-9) for place in range(places)]
    kept += [token for token in grid if token not in kept]
    order = [token for token in order if token not in kept]
    while len(kept) < view.k - 1:
        kept.append(order.pop(0))
    return merge_by_keys(view, score, kept, order[0])


def merge_by_keys(view: View, weight: Sequence[float], centres: Sequence[int], last: int) -> Expected:
    """Keys of all heads as one vector decide which 32 tokens are near a centre."""
    joined = [np.concatenate([view.keys[head, token] for head in range(len(view.keys))]) for token in range(view.count)]

    def near(centre: int, other: int) -> float:
        return cosine(joined[centre], joined[other])

    return merge_around(view, weight, [], centres, last, near)


def merge_around(
    view: View, weight: Sequence[float], plain: Sequence[int], centres: Sequence[int], last: int | None, near: Any
) -> Expected:
    """A centre gains the weighted sum of the 32 tokens nearest to it, plain survivors left out; the last row is the
    weighted sum of every token that is neither plain nor a centre. Weights are not normalised."""
    rows: dict[int, Array] = {token: view.tokens[token].astype(float) for token in plain}
    for centre in centres:
        others = [token for token in range(view.count) if token != centre and token not in plain]
        nearest = sorted(others, key=lambda token, centre=centre: -near(centre, token))[:32]
        gained = [weight[token] * view.tokens[token].astype(float) for token in nearest]
        rows[centre] = view.tokens[centre].astype(float) + sum(gained)
    if last is not None:
        gone = [token for token in range(view.count) if token not in plain and token not in centres]
        rows[last] = sum(weight[token] * view.tokens[token].astype(float) for token in gone)  # type: ignore[assignment]
    return Expected(sorted(rows), np.stack([rows[token] for token in sorted(rows)]))


def recoverable(view: View) -> Expected:
    """Stage 0 carries the CLS attention on. Stage 1 keeps round(k/2) tokens by it, then round(k/4) of the others by
    mean cosine to the question's slots; the next ones by attention are centres, except the last one, which sums up."""
    if view.stage == 0:
        return Expected(range(view.count), carry=heads_mean(view.cls_attention))
    weight = [float(value) for value in view.carried]
    slots = [slot for slot in range(len(view.text_tokens)) if view.text_rows[slot]]
    similar = [
        sum(cosine(view.tokens[token], view.text_tokens[slot]) for slot in slots) / len(slots)
        for token in range(view.count)
    ]
    seen = by_score(weight)[: min(half_up(0.5 * view.k), view.k)]
    recovered = by_score(similar, [token for token in range(view.count) if token not in seen])
    plain = seen + recovered[: min(half_up(0.25 * view.k), view.k - len(seen))]
    others = by_score(weight, [token for token in range(view.count) if token not in plain])[: view.k - len(plain)]

    def near(centre: int, other: int) -> float:
        return cosine(view.tokens[centre], view.tokens[other]) + 1.8 * similar[other]

    return merge_around(view, weight, plain, others[:-1], others[-1] if others else None, near)


# HiPrune.


def hiprune(view: View) -> Expected:
    """round(k * 0.1 / 5) anchors (halves to even) of the shallow layer and their four neighbours in the sequence, a
    place and a grid row away, moved onto the first or last token where they fall off; the rest of k by the deep one."""
    assert view.grid is not None
    columns = view.grid[2]
    shallow, deep = heads_mean(view.received_attention_layers[0]), heads_mean(view.received_attention_layers[-1])
    first: set[int] = set()
    for anchor in by_score(shallow)[: round(view.k * 0.1 / 5)]:
        for token in (anchor, anchor - 1, anchor + 1, anchor - columns, anchor + columns):
            first.add(min(max(token, 0), view.count - 1))
    return Expected(sorted((by_score(deep, first) + by_score(deep, set(range(view.count)) - first))[: view.k]))


# HoloV.


def holov(view: View) -> Expected:
    """16 runs of the sequence, the first ones longer; each gives tokens by attention, as many as its weight says."""
    attention = heads_mean(view.cls_attention)
    number = min(16, view.count)
    chunks: list[list[int]] = []
    for index in range(number):
        start = chunks[-1][-1] + 1 if chunks else 0
        chunks.append(list(range(start, start + view.count // number + (index < view.count % number))))
    weights = []
    for chunk in chunks:
        variances = []
        for token in chunk:
            similar = [0.0 if other == token else cosine(view.tokens[token], view.tokens[other]) for other in chunk]
            others = len(chunk) - 1
            mean = sum(similar) / others if others else 0.0
            variances.append(sum((value - mean) ** 2 for value in similar) / others if others else 0.0)
        scaled = [1000.0 * attention[token] for token in chunk]
        ratio = (sum(scaled) / len(chunk)) / (sum(variances) / len(chunk) + 1e-6)
        weights.append(sum(a + 0.09 * v * ratio for a, v in zip(scaled, variances, strict=True)) / len(chunk))
    parts = [weight / (sum(weights) + 1e-6) for weight in weights]
    quota = [math.floor(part * view.k) for part in parts]
    for chunk_index in by_score(parts)[: view.k - sum(quota)]:
        quota[chunk_index] += 1
    kept: list[int] = []
    for chunk, places in zip(chunks, quota, strict=True):
        kept += by_score(attention, chunk)[:places]
    kept += by_score(attention, [token for token in range(view.count) if token not in kept])[: view.k - len(kept)]
    return Expected(sorted(kept))


# HiRED and VScan.


def hired(view: View) -> Expected:
    """int(k/2) tokens by the deep layer; the others from the quarters of the image, shared out by where the int(N/2)
    tokens highest in the shallow layer lie, each quarter's own by the deep layer; what rounding leaves over by it."""
    assert view.grid is not None
    _, rows, columns = view.grid
    shallow, deep = heads_sum(view.cls_attention_layers[0]), heads_sum(view.cls_attention_layers[-1])
    kept = by_score(deep)[: int(0.5 * view.k)]
    counted = by_score(shallow)[: int(0.5 * view.count)]
    budget = view.k - len(kept)
    for half in range(2):
        for side in range(2):
            quarter = [
                row * columns + column
                for row in range(rows)
                for column in range(columns)
                if row * 2 // rows == half and column * 2 // columns == side
            ]
            places = len(set(counted) & set(quarter)) * budget // len(counted)
            kept += by_score(deep, [token for token in quarter if token not in kept])[:places]
    kept += by_score(deep, [token for token in range(view.count) if token not in kept])[: view.k - len(kept)]
    return Expected(sorted(kept))


def vscan(view: View) -> Expected:
    """Stage 0: int(k/2) tokens, equally many of every window of about 6 by 6 by the shallow layer, the others by the
    deep one; a dropped token is averaged into the most similar kept one. Stage 1: by the last query's attention."""
    if view.stage == 1:
        return Expected(sorted(by_score(heads_mean(view.last_query_attention))[: view.k]))
    assert view.grid is not None
    _, rows, columns = view.grid
    down, across = max(1, half_up(rows / 6)), max(1, half_up(columns / 6))
    shallow, deep = heads_mean(view.cls_attention_layers[0]), heads_mean(view.cls_attention_layers[-1])
    kept: list[int] = []
    for top in range(down):
        for left in range(across):
            window = [
                row * columns + column
                for row in range(rows)
                for column in range(columns)
                if row * down // rows == top and column * across // columns == left
            ]
            kept += by_score(shallow, window)[: int(0.5 * view.k) // (down * across)]
    kept += by_score(deep, [token for token in range(view.count) if token not in kept])[: view.k - len(kept)]
    kept.sort()
    joined: dict[int, list[int]] = {token: [token] for token in kept}
    for token in range(view.count):
        if token not in kept:
            similar = [cosine(view.tokens[token], view.tokens[other]) for other in kept]
            joined[kept[similar.index(max(similar))]].append(token)
    rows_out = [sum(view.tokens[t].astype(float) for t in joined[token]) / len(joined[token]) for token in kept]
    return Expected(kept, np.stack(rows_out))


ROWS: dict[str, Transcription] = {
    "fastervlm": fastervlm,
    "hiprune": hiprune,
    "hired": hired,
    "holov": holov,
    "prumerge": prumerge,
    "prumerge_plus": prumerge_plus,
    "recoverable": recoverable,
    "vispruner": vispruner,
    "vispruner_siglip": vispruner_siglip,
    "visionzip": visionzip,
    "vscan": vscan,
    "vtc_cls": vtc_cls,
}
