"""Transcriptions of the rows in ``passes/recipes/tower_rows.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import Expected, Transcription, View

Rows = np.ndarray[Any, Any]


def cosine(a: Rows, b: Rows) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / (norm(a) * norm(b))


def norm(a: Rows) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in a))


def table(rows: Rows) -> list[list[float]]:
    return [[cosine(a, b) for b in rows] for a in rows]


def scale_to_unit(scores: Sequence[float]) -> list[float]:
    low, high = min(scores), max(scores)
    return [(s - low) / (high - low) if high > low else 0.0 for s in scores]


def highest(scores: Sequence[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:k])


def mean_over_heads(attention: Rows) -> list[float]:
    heads, count = attention.shape
    return [sum(float(attention[h, i]) for h in range(heads)) / heads for i in range(count)]


def mean_keys(keys: Rows) -> Rows:
    """``[H,N,d]`` -> ``[N,d]``."""
    return np.array([sum(head[i].astype(float) for head in keys) / len(keys) for i in range(keys.shape[1])])


def choose_one_by_one(count: int, k: int, gain: Callable[[int, list[int]], float]) -> list[int]:
    """k times the token with the highest gain given those chosen so far; the lower index of equals."""
    chosen: list[int] = []
    while len(chosen) < k:
        best = max((i for i in range(count) if i not in chosen), key=lambda i: (gain(i, chosen), -i))
        chosen.append(best)
    return chosen


def divprune(view: View) -> Expected:
    """First the token farthest from its nearest neighbour, then the one farthest from its nearest chosen token."""
    distance = [[1.0 - s for s in row] for row in table(view.tokens)]

    def gain(i: int, chosen: list[int]) -> float:
        if not chosen:
            return sorted(distance[j][i] for j in range(view.count))[1]
        return min(distance[j][i] for j in chosen)

    return Expected(sorted(choose_one_by_one(view.count, view.k, gain)))


def cdpruner(view: View) -> Expected:
    """The greedy maximum of the determinant of q_i S_ij q_j, q the relevance to the question scaled to [0, 1].

    A determinant grows by the squared length of q_j times unit vector j outside the span of the chosen ones. Tokens
    with less than 1e-4 of their own squared length outside it come last, by relevance.
    """
    question = [row for row, counts in zip(view.text_tokens, view.text_rows, strict=True) if counts]
    relevance = scale_to_unit([sum(cosine(token, word) for word in question) / len(question) for token in view.tokens])
    left = [token.astype(float) / norm(token) for token in view.tokens]

    def project_out(direction: Rows) -> None:
        unit = direction / norm(direction)
        for j, vector in enumerate(left):
            left[j] = vector - sum(x * y for x, y in zip(vector, unit, strict=True)) * unit

    chosen: list[int] = []
    while len(chosen) < view.k:
        others = [j for j in range(view.count) if j not in chosen]
        outside = {j: norm(left[j]) ** 2 for j in others}
        free = [j for j in others if outside[j] > 1e-4]
        best = max(free, key=lambda j: relevance[j] ** 2 * outside[j]) if free else None
        if best is None:
            best = max(others, key=lambda j: relevance[j])
        else:
            project_out(left[best].copy())
        chosen.append(best)
    return Expected(sorted(chosen))


def scope(view: View) -> Expected:
    """Saliency (CLS attention summed over heads) times what a token adds to the coverage of all tokens."""
    alike = table(view.tokens)
    saliency = [sum(float(head[i]) for head in view.cls_attention) for i in range(view.count)]

    def gain(i: int, chosen: list[int]) -> float:
        covered = [max([0.0, *(alike[c][j] for c in chosen)]) for j in range(view.count)]
        return saliency[i] * sum(max(0.0, alike[i][j] - covered[j]) for j in range(view.count))

    return Expected(sorted(choose_one_by_one(view.count, view.k, gain)))


def idpruner(view: View) -> Expected:
    """Half importance in [0, 1], half unlikeness to the most similar chosen token; importance alone comes first."""
    alike = table(view.tokens)
    importance = scale_to_unit(mean_over_heads(view.received_attention))

    def gain(i: int, chosen: list[int]) -> float:
        return importance[i] if not chosen else 0.5 * importance[i] - 0.5 * max(alike[i][c] for c in chosen)

    return Expected(sorted(choose_one_by_one(view.count, view.k, gain)))


def zoo_prune(view: View) -> Expected:
    """Sensitivity in [0, 1] times the distance to the nearest chosen token; the most sensitive comes first."""
    alike = table(view.tokens)
    slopes = view.probe_slopes
    sensitivity = [sum(norm(direction[i]) for direction in slopes) / len(slopes) for i in range(view.count)]
    weight = scale_to_unit(sensitivity)

    def gain(i: int, chosen: list[int]) -> float:
        return weight[i] if not chosen else weight[i] * min(1.0 - alike[i][c] for c in chosen)

    return Expected(sorted(choose_one_by_one(view.count, view.k, gain)))


def gprune(view: View) -> Expected:
    """Norms spread five times over neighbours (cosine of 0.5 or more) by softmax(cosine / 0.03), over the degree."""
    n, alike = view.count, table(view.tokens)
    near = [[j for j in range(n) if j == i or alike[i][j] >= 0.5] for i in range(n)]
    held = [norm(token) for token in view.tokens]
    for _ in range(5):
        passed = [0.0] * n
        for i in range(n):
            total = sum(math.exp(alike[i][j] / 0.03) for j in near[i])
            for j in near[i]:
                passed[j] += held[i] * math.exp(alike[i][j] / 0.03) / total
        held = passed
    return Expected(highest([held[i] / len(near[i]) for i in range(n)], view.k))


def textmonkey(view: View) -> Expected:
    """Keep the tokens whose highest similarity to a later token is lowest; the last one has no later token."""
    alike = table(view.tokens)
    redundancy = [max([-1.0, *alike[i][i + 1 :]]) for i in range(view.count)]
    return Expected(highest([-r for r in redundancy], view.k))


def tome(view: View, cls: bool = True) -> Expected:
    """Of the tower's row, CLS in front where there is one, even places are sources and odd ones destinations. CLS is
    protected: it takes part in no pair. The closest pairs merge, weighted by size.

    A round merges at most half of the tokens (rounded down); as many follow as the number to keep asks for, on the
    mean keys of what was merged.
    """
    keys = mean_keys(view.keys)
    groups = [[i] for i in range(view.count)]
    while len(groups) > view.k:
        metric = [np.mean([keys[i] for i in group], axis=0) for group in groups]
        pairs = []
        place = [i + cls for i in range(len(groups))]
        for source in (i for i in range(len(groups)) if place[i] % 2 == 0):
            alike = [(cosine(metric[source], metric[to]), -to) for to in range(len(groups)) if place[to] % 2]
            similarity, to = max(alike)
            pairs.append((similarity, source, -to))
        merging = sorted(pairs, reverse=True)[: min(len(groups) - view.k, len(groups) // 2)]
        for _, source, to in merging:
            groups[to] = groups[to] + groups[source]
        gone = {source for _, source, _ in merging}
        groups = [group for i, group in enumerate(groups) if i not in gone]
    rows = [
        sum(float(view.size[i]) * view.tokens[i].astype(float) for i in group) / sum(float(view.size[i]) for i in group)
        for group in groups
    ]
    return Expected([group[0] for group in groups], np.array(rows))


def crossget(view: View) -> Expected:
    """Complete-graph soft matching; what a token considers are those behind it in the order of highest similarity."""
    n, alike = view.count, table(mean_keys(view.keys))
    importance = mean_over_heads(view.received_attention)
    if view.k == n:
        return Expected(list(range(n)), view.tokens)
    closest = [max(alike[i][j] for j in range(n) if j != i) for i in range(n)]
    order = sorted(range(n), key=lambda i: (-closest[i], i))
    considered = [
        max([-math.inf, *(alike[i][j] for j in order[place + 1 :])])
        for i, place in ((i, order.index(i)) for i in range(n))
    ]
    sources = sorted(range(n), key=lambda i: importance[i] - considered[i])[: n - view.k]
    keep = [i for i in range(n) if i not in sources]
    rows = []
    for kept in keep:
        size = float(view.size[kept])
        row, total = size * view.tokens[kept].astype(float), size
        for source in sources:
            if max(keep, key=lambda i: alike[source][i]) != kept:
                continue
            mine = math.exp(importance[source]) / (math.exp(importance[source]) + math.exp(importance[kept]))
            row = row + 2 * mine * float(view.size[source]) * view.tokens[source].astype(float)
            row = row + (2 * (1 - mine) - 1) * size * view.tokens[kept].astype(float)
            total += float(view.size[source])
        rows.append(row / total)
    return Expected(keep, np.array(rows))


def flowcut(view: View) -> Expected:
    """(share of CLS attention + share of similarity to the CLS value) times value norm; half is carried over."""
    n, heads = view.count, len(view.values)
    relation = mean_over_heads(view.cls_attention)
    similar = [0.0] * n
    for head in range(heads):
        own = view.cls_values[head].astype(float)
        products = [float(np.dot(own, view.values[head, j])) for j in range(n)]
        total = math.exp(float(np.dot(own, own))) + sum(math.exp(p) for p in products)
        for j in range(n):
            similar[j] += math.exp(products[j]) / total / heads
    magnitude = [sum(abs(float(x)) for x in np.mean(view.values[:, j].astype(float), axis=0)) for j in range(n)]
    score = [(relation[j] / sum(relation) + similar[j] / sum(similar)) * magnitude[j] for j in range(n)]
    if view.stage:
        score = [0.5 * float(before) + 0.5 * now for before, now in zip(view.carried, score, strict=True)]
    return Expected(highest(score, view.k), carry=score)


ROWS: dict[str, Transcription] = {
    "cdpruner": cdpruner,
    "crossget": crossget,
    "divprune": divprune,
    "flowcut": flowcut,
    "gprune": gprune,
    "idpruner": idpruner,
    "scope": scope,
    "textmonkey": textmonkey,
    "tome": tome,
    "zoo_prune": zoo_prune,
}
