"""SEATS (arXiv 2605.20035): windows of moments; what is seen (0) and what is heard (1) in them.

How many tokens stay in all is planned, where the authors round a ratio; how stage II gives them out follows their
loops, one token at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from . import Expected, Transcription, View

Cell = tuple[int, int]
"""(window, kind)"""
SEEN, HEARD = 0, 1


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(float(x) ** 2 for x in a)) / math.sqrt(math.fsum(float(x) ** 2 for x in b))


def allot_some(weight: Mapping[Cell, float], total: int, most: Mapping[Cell, int]) -> dict[Cell, int]:
    """Whole numbers that sum to ``total``: what ``x * weight`` gives up to ``most``, for the one x at which these sum
    to ``total``, rounded down; one more for the largest remainders, the first of equals. Then those without any take
    one from the richest, while it has more than one."""
    low, high = 0.0, 1e18
    for _ in range(400):
        x = (low + high) / 2
        if math.fsum(min(x * weight[c], most[c]) for c in weight) < total:
            low = x
        else:
            high = x
    exact = {c: min(high * weight[c], most[c]) for c in weight}
    parts = {c: math.floor(exact[c] + 1e-9) for c in weight}
    spare = total - sum(parts.values())
    for cell in sorted(weight, key=lambda c: (parts[c] - exact[c], c))[:spare]:
        parts[cell] += 1
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


def weigh_windows(score: Sequence[float], cells: Sequence[Cell], temperature: float) -> dict[Cell, float]:
    """For each kind a softmax over all windows of the mean score there; the mean of no tokens is 0."""
    weight: dict[Cell, float] = {}
    for kind in (SEEN, HEARD):
        means = {}
        for window in sorted({window for window, _ in cells}):
            inside = [s for s, cell in zip(score, cells, strict=True) if cell == (window, kind)]
            means[window] = math.fsum(inside) / len(inside) if inside else 0.0
        power = {window: math.exp((mean - max(means.values())) / temperature) for window, mean in means.items()}
        weight |= {(window, kind): power[window] / math.fsum(power.values()) for window in power}
    return weight


def repair(budget: list[int], size: Sequence[int], total: int) -> list[int]:
    """The largest above 1 gives one away, the smallest below its size takes one, the first of equals, until the sum is
    ``total`` or nobody can."""
    budget = list(budget)
    while sum(budget) > total and max(budget) > 1:
        budget[budget.index(max(budget))] -= 1
    while sum(budget) < total and any(b < s for b, s in zip(budget, size, strict=True)):
        lowest = min(b for b, s in zip(budget, size, strict=True) if b < s)
        at = next(i for i, (b, s) in enumerate(zip(budget, size, strict=True)) if b == lowest and b < s)
        budget[at] += 1
    return budget


def split_window(budget: int, due: tuple[float, float], there: tuple[int, int]) -> tuple[int, int]:
    """What is seen gets its part of a window's budget, what is heard the rest; what one has no tokens for goes to the
    other. Who would get none of what is there gets 1, and the other gives it if it has more than 1."""
    seen = min(round(budget * due[0] / math.fsum(due)), there[0])
    heard = min(budget - seen, there[1])
    seen += min(budget - seen - heard, there[0] - seen)
    if there[0] and seen < 1:
        seen = 1
        if heard > 1:
            heard = max(1, min(there[1], budget - seen))
    if there[1] and heard < 1:
        heard = 1
        if seen > 1:
            seen = max(1, min(there[0], budget - heard))
    return seen, heard


def share_windows(
    score: Sequence[float], cells: Sequence[Cell], k: int, kept: Mapping[int, int], temperature: float
) -> dict[int, tuple[int, tuple[float, float], tuple[int, int]]]:
    """Of every window its budget, what is due to both kinds in it, and their tokens there."""
    weight = weigh_windows(score, cells, temperature)
    windows = sorted({window for window, _ in cells})
    there = {window: (cells.count((window, SEEN)), cells.count((window, HEARD))) for window in windows}
    size = [sum(there[window]) for window in windows]
    raw = [(weight[window, SEEN] + weight[window, HEARD]) / 2 * k for window in windows]
    first = [min(max(round(part), 1), s) for part, s in zip(raw, size, strict=True)]
    return {
        window: (budget, (weight[window, SEEN] * kept[SEEN], weight[window, HEARD] * kept[HEARD]), there[window])
        for window, budget in zip(windows, repair(first, size, k), strict=True)
    }


def stage_two(
    score: Sequence[float], cells: Sequence[Cell], k: int, kept: Mapping[int, int], temperature: float
) -> list[int]:
    """The highest scores of every window and kind, as many as its budget says. With one kind of token there are no
    windows. Where the least of one token each makes it more than k, budgets are repaired once more (the authors keep
    more than planned); where k is less than the cells, the highest of their best tokens stay."""
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    if len({kind for _, kind in cells}) == 1:
        return sorted(order[:k])
    quota: dict[Cell, int] = {}
    for window, (budget, due, there) in share_windows(score, cells, k, kept, temperature).items():
        quota[window, SEEN], quota[window, HEARD] = split_window(budget, due, there)
    quota = dict(zip(quota, repair(list(quota.values()), list(quota.values()), k), strict=True))
    chosen: list[int] = []
    for i in order:
        if quota[cells[i]]:
            quota[cells[i]] -= 1
            chosen.append(i)
    return sorted(chosen[:k])


def halves_apart(
    score: Sequence[float], cells: Sequence[Cell], k: int, kept: Mapping[int, int], temperature: float
) -> float:
    """How far the numbers that are rounded are from the nearest half. Arithmetic of less precision may round one that
    is nearer than its own error otherwise."""
    weight = weigh_windows(score, cells, temperature)
    raw = [(weight[window, SEEN] + weight[window, HEARD]) / 2 * k for window in {window for window, _ in cells}]
    shared = share_windows(score, cells, k, kept, temperature)
    raw += [budget * due[SEEN] / math.fsum(due) for budget, due, _ in shared.values()]
    return min(abs(part - math.floor(part) - 0.5) for part in raw)


def _seats(view: View, temperature: float, moments: int, sound: int) -> Expected:
    if view.stage == 0:
        heads = len(view.received_attention)
        weight = [math.fsum(float(row[t]) for row in view.received_attention) / heads for t in range(view.count)]
        return Expected(list(range(view.count)), carry=weight)
    if view.stage == 1:
        cells, heard = [], 0
        for frame, kind in zip(view.frames, view.modalities, strict=True):
            cells.append((heard // sound, HEARD) if kind == HEARD else (frame // 2, SEEN))
            heard += kind == HEARD
        return Expected(stage_one(view.tokens.tolist(), view.carried.tolist(), cells, view.k, (1.0, 1.0)))
    if view.stage == 5:
        return Expected([])
    heads = len(view.last_query_attention)
    score = [math.fsum(float(row[t]) for row in view.last_query_attention) / heads for t in range(view.count)]
    kept = kinds_kept(view.modalities, view.k, (1.0, 1.0))
    cells = [(view.frames[i] // moments, view.modalities[i]) for i in view.source]
    return Expected(stage_two(score, cells, view.k, kept, temperature))


def seats(view: View) -> Expected:
    """Two seconds of sound are 50 tokens."""
    return _seats(view, 0.1, 2, 50)


def seats_qwen3_omni(view: View) -> Expected:
    """A run of tokens is one temporal grid, two seconds of sound are 26 tokens."""
    return _seats(view, 0.3, 1, 26)


ROWS: dict[str, Transcription] = {"seats": seats, "seats_qwen3_omni": seats_qwen3_omni}
