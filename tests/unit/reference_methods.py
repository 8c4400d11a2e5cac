"""Options that no row of the table uses, written out as slow loops over single tokens in NumPy.

Nothing here is shared with the vocabulary in ``secateur.passes.methods``: the two must agree because both follow the
paper. One group at a time, no batch axis. ``attention [H,N]`` is the one query row a paper scores with.
"""

from __future__ import annotations

import math

import numpy as np


def rank_by_attention(attention: np.ndarray, heads: str) -> list[int]:
    """Token indices, the most attended to first."""
    count = attention.shape[1]
    scores = []
    for token in range(count):
        values = [float(attention[head, token]) for head in range(attention.shape[0])]
        if heads == "mean":
            scores.append(sum(values) / len(values))
        elif heads == "sum":
            scores.append(sum(values))
        else:
            scores.append(max(values))
    return sorted(range(count), key=lambda token: (-scores[token], token))


def keep_most_attended(attention: np.ndarray, k: int, heads: str = "mean") -> list[int]:
    """FastV, PyramidDrop (last prompt token) and FasterVLM (CLS token): the k most attended to, in order."""
    return sorted(rank_by_attention(attention, heads)[:k])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))


def merge_into_targets(
    rows: np.ndarray, keys: np.ndarray, dominant: list[int], targets: list[int], average: str = "assigned"
) -> np.ndarray:
    """VisionZip's output rows for ``rows [N,D]`` and ``keys [H,N,d]``, in token order.

    A dropped token goes to the target with the most similar head-averaged key. A target becomes itself plus the mean
    of what it was given ("assigned"), or the mean of itself and what it was given ("all").
    """
    metric = [
        sum(keys[head, token].astype(float) for head in range(len(keys))) / len(keys) for token in range(len(rows))
    ]
    given: dict[int, list[int]] = {target: [] for target in targets}
    for token in range(len(rows)):
        if targets and token not in dominant and token not in targets:
            similar = [cosine(metric[token], metric[target]) for target in targets]
            given[targets[similar.index(max(similar))]].append(token)
    out = []
    for token in sorted(dominant + targets):
        row = rows[token].astype(float)
        received = [rows[other].astype(float) for other in given.get(token, [])]
        if received and average == "assigned":
            row = row + sum(received) / len(received)
        elif received:
            row = (row + sum(received)) / (1 + len(received))
        out.append(row)
    return np.stack(out)
