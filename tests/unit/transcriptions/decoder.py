"""Transcriptions of the rows in ``passes/recipes/decoder_rows.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import Expected, Transcription, View

Array = np.ndarray[Any, Any]


def _dot(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def _length(a: Sequence[float] | Array) -> float:
    return math.sqrt(_dot(a, a))


def _cosine(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float:
    return _dot(a, b) / (_length(a) * _length(b))


def _softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    parts = [math.exp(value - highest) for value in values]
    return [part / math.fsum(parts) for part in parts]


def _best(candidates: Sequence[int], score: Sequence[float] | dict[int, float], count: int) -> list[int]:
    return sorted(candidates, key=lambda token: (-score[token], token))[:count]


def _all_heads(keys: Array, token: int) -> list[float]:
    """The token's keys of all heads, one behind the other."""
    return [float(value) for head in keys for value in head[token]]


# DART


def dart(view: View) -> Expected:
    """Pivots by the L1 norm of their keys; each in turn takes the tokens least like it.

    Of k tokens min(4, k) are visual pivots. The others are divided by the number of pivots (with text pivots), the
    first pivots take one more. Order: visual pivots from the largest norm to the smallest, then text pivots.
    """
    norm = {token: sum(abs(x) for x in _all_heads(view.keys, token)) for token in range(view.count)}
    visual = _best(range(view.count), norm, min(4, view.k))
    words = [slot for slot in range(len(view.text_rows)) if view.text_rows[slot]]
    norm_of_word = {slot: sum(abs(x) for x in _all_heads(view.text_keys, slot)) for slot in words}
    text = _best(words, norm_of_word, 4)
    pivots = [view.normed_tokens[token] for token in visual] + [view.normed_text[slot] for slot in text]
    kept = list(visual)
    left = view.k - len(visual)
    for turn, pivot in enumerate(pivots):
        takes = left // len(pivots) + (1 if turn < left % len(pivots) else 0)
        free = [token for token in range(view.count) if token not in kept]
        unlike = {token: -_cosine(view.normed_tokens[token], pivot) for token in free}
        kept += _best(free, unlike, takes)
    return Expected(sorted(kept))


# Frame by frame


def _frames(view: View) -> list[list[int]]:
    """Tokens by frame; a single image counts as a video whose frames are the rows of its patches."""
    assert view.grid is not None
    frames, rows, columns = view.grid
    assert frames * rows * columns == view.count
    number, size = (frames, rows * columns) if frames > 1 else (rows, columns)
    return [list(range(frame * size, (frame + 1) * size)) for frame in range(number)]


def _evenly(token: int) -> float:
    """Order among tokens that nothing tells apart: the fractional part of a multiple of the golden ratio."""
    return math.modf(token * (math.sqrt(5) - 1) / 2)[0]


def dycoke(view: View) -> Expected:
    """Of four frames the first is kept; the second and third are compared with it, the fourth with the third.

    The tokens those three (times the number of groups) keep are shared out equally, one more for the earliest. When
    the budget is smaller than the first frames of all groups, only those share it.
    """
    frames = _frames(view)
    compared_with = {1: 1, 2: 2, 3: 1}  # so many frames back
    leaders = [frame for frame in range(len(frames)) if frame % 4 == 0]
    others = [frame for frame in range(len(frames)) if frame % 4 != 0]
    room = sum(len(frames[frame]) for frame in leaders)
    kept: list[int] = []
    for members, budget in ((leaders, min(view.k, room)), (others, max(view.k - room, 0))):
        for place, frame in enumerate(members):
            quota = budget // len(members) + (1 if place < budget % len(members) else 0)
            change = {}
            for at, token in enumerate(frames[frame]):
                if frame % 4 == 0:
                    change[token] = _evenly(token)
                else:
                    earlier = frames[frame - compared_with[frame % 4]][at]
                    change[token] = -_cosine(view.tokens[token], view.tokens[earlier])
            kept += _best(frames[frame], change, quota)
    return Expected(sorted(kept))


def _by_change_from_previous_frame(view: View) -> list[int]:
    """The first frame, then whatever differs most from the frame before."""
    frames = _frames(view)
    change: dict[int, float] = {}
    for number, frame in enumerate(frames):
        for at, token in enumerate(frame):
            if number == 0:
                change[token] = 255.0 + _evenly(token)
            else:
                change[token] = 1.0 - _cosine(view.tokens[token], view.tokens[frames[number - 1][at]])
    return sorted(_best(range(view.count), change, view.k))


def evs(view: View) -> Expected:
    return Expected(_by_change_from_previous_frame(view))


def framefusion(view: View) -> Expected:
    """Merging: the least changed tokens join the token before them at their place, and that one's run.

    Pruning: what the prompt attends to most, mean over heads and queries.
    """
    if view.stage == 1:
        heads = len(view.received_attention)
        attended = [sum(float(row[token]) for row in view.received_attention) / heads for token in range(view.count)]
        return Expected(sorted(_best(range(view.count), attended, view.k)))
    kept = _by_change_from_previous_frame(view)
    runs: dict[int, list[int]] = {token: [token] for token in kept}
    for at in range(len(_frames(view)[0])):
        current = None
        for frame in _frames(view):
            if frame[at] in runs:
                current = frame[at]
            elif current is not None:
                runs[current].append(frame[at])
    rows = [np.mean([view.tokens[member].astype(float) for member in runs[token]], axis=0) for token in kept]
    return Expected(kept, np.stack(rows))


# PACT


def pact(view: View) -> Expected:
    """EUTI picks 55 % (rounded, at least k) as candidates; the k of them farthest from a denser one are centres.

    Centre rows are means over the candidates nearest to them and the other tokens within 1.5 * 0.21.
    """
    heads, count = len(view.queries), view.count
    importance = [0.0] * count
    for head in range(heads):
        query = [sum(float(q[axis]) for q in view.queries[head]) / count for axis in range(view.queries.shape[2])]
        logits = [_dot(query, view.keys[head][token]) / math.sqrt(len(query)) for token in range(count)]
        for token, share in enumerate(_softmax(logits)):
            importance[token] += share / heads
    importance = [importance[token] * _length(view.tokens[token]) for token in range(count)]
    candidates = _best(range(count), importance, max(view.k, math.floor(0.55 * count + 0.5)))

    flat = [_all_heads(view.keys, token) for token in range(count)]
    distance = [[max(1.0 - _cosine(a, b), 0.0) for b in flat] for a in flat]
    density = {a: sum(math.exp(-((distance[a][b] / 2.0) ** 2)) for b in candidates) for a in candidates}
    apart = {}
    for a in candidates:
        denser = [distance[a][b] for b in candidates if density[b] > density[a]]
        apart[a] = min(denser) if denser else math.inf
    centres = sorted(_best(candidates, apart, view.k))

    clusters: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for token in range(count):
        nearest = min(centres, key=lambda centre: distance[token][centre])
        if token not in centres and (token in candidates or distance[token][nearest] <= 1.5 * 0.21):
            clusters[nearest].append(token)
    rows = [np.mean([view.tokens[member].astype(float) for member in clusters[centre]], axis=0) for centre in centres]
    return Expected(centres, np.stack(rows))


# Diversity, and leaving altogether


def _k_center(distance: list[list[float]], k: int) -> list[int]:
    """``distance[i][j]`` from i to j: the farthest from its nearest neighbour, then the farthest from all chosen."""
    count = len(distance)
    chosen: list[int] = []
    while len(chosen) < k:
        free = [token for token in range(count) if token not in chosen]
        values = {}
        for token in free:
            if chosen:
                values[token] = min(distance[other][token] for other in chosen)
            else:
                values[token] = sorted(distance[other][token] for other in range(count))[1] if count > 1 else 0.0
        chosen += _best(free, values, 1)
    return sorted(chosen)


def seats_stage1(view: View) -> Expected:
    """The distance to a token is multiplied by the attention it receives in the encoder, mean over heads."""
    heads = len(view.received_attention)
    weight = [sum(float(row[token]) for row in view.received_attention) / heads for token in range(view.count)]
    tokens = view.tokens
    distance = [
        [0.0 if i == j else (1.0 - _cosine(tokens[i], tokens[j])) * weight[j] for j in range(view.count)]
        for i in range(view.count)
    ]
    return Expected(_k_center(distance, view.k))


def todre(view: View) -> Expected:
    """Greedy k-center, and in a late layer nothing is left."""
    if view.stage == 1:
        return Expected([])
    distance = [[1.0 - _cosine(a, b) for b in view.tokens] for a in view.tokens]
    return Expected(_k_center(distance, view.k))


def visual_exit(view: View) -> Expected:
    return Expected([])


# TransPrune


def transprune(view: View) -> Expected:
    """Transition variation of the layer before, added to that of the layers before it; with the text's guidance."""
    slots = [slot for slot in range(len(view.real_slots)) if view.real_slots[slot]]
    change = [0.0] * len(view.real_slots)
    for branch in range(2):
        reads, adds = view.branch_inputs[branch], view.branch_outputs[branch]
        turns = _softmax([1.0 - _cosine(reads[slot], adds[slot]) for slot in slots])
        for slot, turn in zip(slots, turns, strict=True):
            change[slot] += _length(adds[slot]) / _length(reads[slot]) * turn
    so_far = view.signals.get("carried", np.zeros(view.count))
    total = [float(so_far[token]) + change[int(view.slots[token])] for token in range(view.count)]
    if view.stage in (1, 3, 4):  # layers that only observe
        return Expected(list(range(view.count)), carry=total)
    heads = len(view.text_attention)
    words = [word for word in range(len(view.text_rows)) if view.text_rows[word]]
    guidance = [0.0] * view.count
    for token in range(view.count):
        for word in words:
            guidance[token] += sum(float(head[word][token]) for head in view.text_attention) / heads / len(words)
    score = [total[t] / math.fsum(total) + guidance[t] / math.fsum(guidance) for t in range(view.count)]
    return Expected(sorted(_best(range(view.count), score, view.k)), carry=total)


ROWS: dict[str, Transcription] = {
    "dart": dart,
    "dycoke": dycoke,
    "evs": evs,
    "framefusion": framefusion,
    "pact": pact,
    "seats_stage1": seats_stage1,
    "todre": todre,
    "transprune": transprune,
    "visual_exit": visual_exit,
}
