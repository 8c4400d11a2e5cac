"""SEATS (arXiv 2605.20035): windows of two moments; what is seen (0) and what is heard (1) in them.

Budgets are whole numbers by largest remainder, the first of equal ones, where the authors round and repair in loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from . import Expected, Transcription, View

Cell = tuple[int, int]
"""(window, kind)"""


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(float(x) ** 2 for x in a)) / math.sqrt(math.fsum(float(x) ** 2 for x in b))


def allot(
    weight: Mapping[Cell, float], total: int, least: Mapping[Cell, int], most: Mapping[Cell, int]
) -> dict[Cell, int]:
    """Whole numbers that sum to ``total``: what ``x * weight`` gives between ``least`` and ``most``, for the one x at
    which these sum to ``total``, rounded down; one more for the largest remainders. Where ``least`` sums to more than
    ``total`` it is 0."""
    if sum(least.values()) > total:
        least = dict.fromkeys(least, 0)
    low, high = 0.0, 1e18
    for _ in range(400):
        x = (low + high) / 2
        if math.fsum(min(max(x * weight[c], least[c]), most[c]) for c in weight) < total:
            low = x
        else:
            high = x
    exact = {c: min(max(high * weight[c], least[c]), most[c]) for c in weight}
    parts = {c: math.floor(exact[c] + 1e-9) for c in weight}
    spare = total - sum(parts.values())
    for cell in sorted(weight, key=lambda c: (parts[c] - exact[c], c))[:spare]:
        parts[cell] += 1
    return parts


def allot_some(weight: Mapping[Cell, float], total: int, most: Mapping[Cell, int]) -> dict[Cell, int]:
    """The same without lower bounds; then those without any take one from the richest, while it has more than one."""
    parts = allot(weight, total, dict.fromkeys(weight, 0), most)
    for cell in sorted(parts):
        richest = min(parts, key=lambda c: (-parts[c], c))
        if parts[cell] == 0 and parts[richest] > 1:
            parts[cell], parts[richest] = 1, parts[richest] - 1
    return parts


def kinds_kept(kinds: Sequence[int], k: int, rates: Sequence[float]) -> dict[int, int]:
    """Of all tokens that entered, by kind, how many stay of k: in proportion to their number times the kind's rate."""
    held = {kind: sum(other == kind for other in kinds) for kind in sorted(set(kinds))}
    parts = allot_some({(0, kind): n * rates[kind] for kind, n in held.items()}, k, {(0, n): held[n] for n in held})
    return {kind: n for (_, kind), n in parts.items()}


def stage_one(
    tokens: Sequence[Sequence[float]], weight: Sequence[float], cells: Sequence[Cell], k: int, rates: Sequence[float]
) -> list[int]:
    """In every cell greedy max-min: first the token whose weighted distance to its nearest neighbour is largest, then
    the one whose weighted distance to the nearest chosen one is. The distance from i to j counts j's weight."""
    if k == len(tokens):
        return list(range(k))
    chosen: list[int] = []
    for kind, kept in kinds_kept([kind for _, kind in cells], k, rates).items():
        mine = sorted({cell for cell in cells if cell[1] == kind})
        sizes = {cell: cells.count(cell) for cell in mine}
        quota = allot_some({c: float(n) for c, n in sizes.items()}, kept, sizes)
        for cell in mine:
            members = [i for i, other in enumerate(cells) if other == cell]
            picked: list[int] = []
            while len(picked) < quota[cell]:
                far = {}
                for j in (m for m in members if m not in picked):
                    near = picked or [m for m in members if m != j]
                    far[j] = min(((1 - _cosine(tokens[i], tokens[j])) * weight[j] for i in near), default=math.inf)
                picked.append(max(far, key=lambda j: (far[j], -j)))
            chosen += picked
    return sorted(chosen)


def stage_two(
    score: Sequence[float], cells: Sequence[Cell], k: int, kept: Mapping[int, int], temperature: float
) -> list[int]:
    """Softmax over windows of each kind's mean score; a window's budget; a kind's part of it; its highest scores."""
    present = sorted(set(cells))
    mean = {
        c: math.fsum(s for s, other in zip(score, cells, strict=True) if other == c) / cells.count(c) for c in present
    }
    share: dict[Cell, float] = {}
    for kind in kept:
        mine = [c for c in present if c[1] == kind]
        top = max((mean[c] for c in mine), default=0.0)
        parts = {c: math.exp((mean[c] - top) / temperature) for c in mine}
        share |= {c: part / math.fsum(parts.values()) for c, part in parts.items()}
    windows = sorted({window for window, _ in present})
    inside = {w: [c for c in present if c[0] == w] for w in windows}
    budgets = allot(
        {(w, 0): math.fsum(share[c] for c in inside[w]) / len(kept) for w in windows}, k,
        {(w, 0): len(inside[w]) for w in windows}, {(w, 0): sum(cells.count(c) for c in inside[w]) for w in windows},
    )  # fmt: skip
    chosen: list[int] = []
    for window in windows:
        quota = allot(
            {c: share[c] * kept[c[1]] for c in inside[window]}, budgets[window, 0], dict.fromkeys(inside[window], 1),
            {c: cells.count(c) for c in inside[window]},
        )  # fmt: skip
        for cell in inside[window]:
            members = [i for i, other in enumerate(cells) if other == cell]
            chosen += sorted(members, key=lambda i: (-score[i], i))[: quota[cell]]
    return sorted(chosen)


def _seats(view: View, temperature: float) -> Expected:
    cells = [(frame // 2, kind) for frame, kind in zip(view.frames, view.modalities, strict=True)]
    if view.stage == 0:
        heads = len(view.received_attention)
        weight = [math.fsum(float(row[t]) for row in view.received_attention) / heads for t in range(view.count)]
        return Expected(list(range(view.count)), carry=weight)
    if view.stage == 1:
        return Expected(stage_one(view.tokens.tolist(), view.carried.tolist(), cells, view.k, (1.0, 1.0)))
    if view.stage == 5:
        return Expected([])
    heads = len(view.last_query_attention)
    score = [math.fsum(float(row[t]) for row in view.last_query_attention) / heads for t in range(view.count)]
    kept = kinds_kept(view.modalities, view.k, (1.0, 1.0))
    return Expected(stage_two(score, [cells[i] for i in view.source], view.k, kept, temperature))


def seats(view: View) -> Expected:
    return _seats(view, 0.1)


def seats_qwen3_omni(view: View) -> Expected:
    return _seats(view, 0.3)


ROWS: dict[str, Transcription] = {"seats": seats, "seats_qwen3_omni": seats_qwen3_omni}
