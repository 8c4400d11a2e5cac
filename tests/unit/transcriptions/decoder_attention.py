"""Transcriptions of the rows in ``passes/recipes/decoder_attention_rows.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from . import Expected, Transcription, View

Array = np.ndarray[Any, Any]
Scores = Sequence[float]


def _highest(score: Scores, number: int, among: Iterable[int] | None = None) -> list[int]:
    """The ``number`` tokens with the highest score, best first; of equals the first."""
    tokens = range(len(score)) if among is None else among
    return sorted(tokens, key=lambda token: (-score[token], token))[:number]


def _mean(values: Iterable[float]) -> float:
    listed = [float(value) for value in values]
    return math.fsum(listed) / len(listed)


def _cosine(a: Array, b: Array) -> float:
    dot, one, two = (
        math.fsum(float(x) * float(y) for x, y in zip(p, q, strict=True)) for p, q in ((a, b), (a, a), (b, b))
    )
    return dot / math.sqrt(one * two)


def _average(rows: Array, members: Sequence[int], weights: Sequence[float] | None = None) -> Array:
    weights = [1.0] * len(members) if weights is None else weights
    total = sum(weight * rows[member].astype(float) for weight, member in zip(weights, members, strict=True))
    return np.asarray(total / math.fsum(weights))


def _question(view: View) -> list[int]:
    """The text slots behind the visual tokens that are no padding."""
    return [slot for slot in range(len(view.text_rows)) if view.text_rows[slot]]


# FastV, PyramidDrop, and what corrects their scores


def _from_last_query(view: View) -> list[float]:
    attention = view.last_query_attention
    return [_mean(attention[head, token] for head in range(len(attention))) for token in range(view.count)]


def most_attended(view: View) -> Expected:
    """Mean over heads of what the last prompt token attends to."""
    return Expected(sorted(_highest(_from_last_query(view), view.k)))


def most_attended_debiased(view: View) -> Expected:
    """The same times a falling curve through (0, 1), (middle, 0.79) and (last, 0.358) over the places."""
    score = []
    for token, value in enumerate(_from_last_query(view)):
        place = token / (view.count - 1) if view.count > 1 else 0.0
        curve = 1 + (0.79 - 1) * 2 * place if place <= 0.5 else 0.79 + (0.358 - 0.79) * (2 * place - 1)
        score.append(value * curve)
    return Expected(sorted(_highest(score, view.k)))


def most_attended_without_sinks(view: View) -> Expected:
    """Tokens whose root-mean-square-normalised row exceeds 20 in one of two sink dimensions count nothing.

    Sink dimensions: where the first text token's row is largest in magnitude.
    """
    first = [abs(float(x)) for x in view.text_tokens[0]]
    sink_dimensions = _highest(first, 2)
    score = _from_last_query(view)
    for token in range(view.count):
        row = view.tokens[token].astype(float)
        size = math.sqrt(_mean(x * x for x in row) + 1e-6)
        if max(abs(row[dimension]) / size for dimension in sink_dimensions) > 20:
            score[token] = 0.0
    return Expected(sorted(_highest(score, view.k)))


# SparseVLM


def _raters(view: View) -> list[int]:
    """Question tokens to which the visual tokens give more than the mean; each spreads a softmax of dot products."""
    words = _question(view)
    share = dict.fromkeys(words, 0.0)
    for token in range(view.count):
        dot = {
            word: float(np.dot(view.tokens[token].astype(float), view.text_tokens[word].astype(float)))
            for word in words
        }
        top = max(dot.values())
        total = math.fsum(math.exp(value - top) for value in dot.values())
        for word in words:
            share[word] += math.exp(dot[word] - top) / total / view.count
    mean = _mean(share.values())
    return [word for word in words if share[word] > mean] or words


def _density_peaks(rows: Array, number: int) -> tuple[list[int], list[int]]:
    """Centres among ``rows``, and for every row which of the centres it belongs to. Of equals the first is denser."""
    count, width = rows.shape
    apart = [
        [
            math.sqrt(math.fsum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))) / math.sqrt(width)
            for b in rows
        ]
        for a in rows
    ]
    # Logarithms: of rows some thirty apart the densities are zero in float64 as well.
    density = [-_mean(d * d for d in sorted(apart[i])[:number]) for i in range(count)]
    peak = []
    for i in range(count):
        above = [apart[i][j] for j in range(count) if (-density[j], j) < (-density[i], i)]
        nearest = min(above, default=math.inf)
        peak.append(density[i] + math.log(nearest) if nearest > 0 else -math.inf)
    centres = _highest(peak, number)
    belongs = [min(range(number), key=lambda c: apart[i][centres[c]]) for i in range(count)]
    for place, centre in enumerate(centres):
        belongs[centre] = place
    return centres, belongs


def sparsevlm(view: View) -> Expected:
    """Mean over heads and raters; the best stay, of the rest the best 30 % (+ 1) are clustered, a cluster of ten each.

    The paper gives the number that stays, s, of N tokens; then int(0.3 (N - s)) + 1 tokens are clustered into
    int(that / 10) + 1. Here s is the largest number for which both together do not exceed k, at least 1.
    """
    raters = _raters(view)
    heads = range(len(view.text_attention))
    score = [_mean(view.text_attention[h, r, token] for h in heads for r in raters) for token in range(view.count)]
    stay, clusters = 1, view.k - 1
    for number in range(1, view.k + 1):
        dropped = view.count - number
        needed = int((int(dropped * 0.3) + 1) / 10) + 1 if dropped else 0
        if number + needed <= view.k:
            stay, clusters = number, needed
    order = _highest(score, view.count)
    members = {token: [token] for token in order[:stay]}
    if clusters:
        pool = order[stay : stay + max(int((view.count - stay) * 0.3) + 1, clusters)]
        centres, belongs = _density_peaks(view.tokens[pool], clusters)
        for place, centre in enumerate(centres):
            members[pool[centre]] = [token for token, home in zip(pool, belongs, strict=True) if home == place]
    keep = sorted(members)
    return Expected(keep, np.stack([_average(view.tokens, members[token]) for token in keep]))


def sparsevlm_plus(view: View) -> Expected:
    """Attention over the product of two rotated vectors of ones (width 128, base 10000) at the same distance.

    14 of 32 heads count (a share of 0.4375, rounded half up): those with the most corrected attention from raters to
    visual tokens. At the first stage the visual tokens are contiguous, so the t-th question token is N - i + t
    away from token i; what is carried on is N - i.
    """
    raters, words = _raters(view), _question(view)
    behind = [float(view.count - i) for i in range(view.count)] if view.stage == 0 else [float(x) for x in view.carried]
    heads = len(view.text_attention)
    corrected = np.zeros((heads, len(raters), view.count))
    for place, rater in enumerate(raters):
        for token in range(view.count):
            gap = behind[token] + words.index(rater)
            # One of the 64 pairs (1, 1) turned by its angle at both places: the products add up to 2 cos.
            pull = math.fsum(2 * math.cos(gap * 10000 ** (-2 * pair / 128)) for pair in range(64)) / math.sqrt(128)
            for head in range(heads):
                corrected[head, place, token] = float(view.text_attention[head, rater, token]) / pull
    number = max(1, math.floor(heads * 14 / 32 + 0.5))
    chosen = _highest([float(corrected[head].sum()) for head in range(heads)], number)
    score = [
        _mean(corrected[head, place, token] for head in chosen for place in range(len(raters)))
        for token in range(view.count)
    ]
    return Expected(sorted(_highest(score, view.k)), carry=behind)


# FitPrune, VisionDrop, AdaptInfer


def fitprune(view: View) -> Expected:
    """Of the strongest head each: sum over visual queries / N, times sum over the question's queries."""
    heads, n = range(len(view.self_attention)), view.count
    score = []
    for token in range(n):
        own = math.fsum(max(float(view.self_attention[h, query, token]) for h in heads) for query in range(n)) / n
        cross = math.fsum(max(float(view.text_attention[h, word, token]) for h in heads) for word in _question(view))
        score.append(own * cross)
    return Expected(sorted(_highest(score, view.k)))


_VISIONDROP = ((42, 6), (30, 5), (22, 4), (16, 3))


def visiondrop(view: View) -> Expected:
    """Dominant tokens by attention from CLS (sum of heads) or from the visual tokens (mean), and contextual ones.

    The published numbers of contextual tokens are a share of all; of k tokens it is rounded half up, at least 1 and at
    most k - 1. They are taken from the rest at even steps, and every token left over adds to the one whose
    head-averaged key is nearest by cosine: target plus mean of what it got.
    """
    dominant, contextual = _VISIONDROP[view.stage]
    if view.stage == 0:
        score = [math.fsum(float(x) for x in view.cls_attention[:, token]) for token in range(view.count)]
    else:
        score = [_mean(x for x in view.self_attention[:, :, token].flatten()) for token in range(view.count)]
    number = min(max(math.floor(contextual / (dominant + contextual) * view.k + 0.5), 1), view.k - 1)
    best = _highest(score, view.k - number)
    rest = [token for token in range(view.count) if token not in best]
    step = len(rest) // number if number else 1
    targets = [rest[place * step] for place in range(number)]
    key = view.keys.astype(float).mean(axis=0)
    got: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if targets and token not in targets:
            got[max(targets, key=lambda target: _cosine(key[token], key[target]))].append(token)
    keep = sorted(best + targets)
    rows = [
        view.tokens[token].astype(float) + (_average(view.tokens, got[token]) if got.get(token) else 0.0)
        for token in keep
    ]
    return Expected(keep, np.stack(rows))


def adaptinfer(view: View) -> Expected:
    """Every head weighs the question's tokens by how much they attend to and are attended by each other."""
    words = _question(view)
    score = [0.0] * view.count
    for head in range(len(view.text_attention)):
        among = view.text_to_text_attention[head].astype(float)
        for word in words:
            weight = math.fsum(
                among[other, word] + among[word, other] if other != word else among[word, word] for other in words
            )
            for token in range(view.count):
                score[token] += weight * float(view.text_attention[head, word, token])
    return Expected(sorted(_highest(score, view.k)))


# AIM


def _merge_bipartite(view: View) -> Expected:
    """Rounds of at most half the tokens: even ones join the odd one most like them, the most similar first.

    A token that stands for several counts with their mean, each token once.
    """
    sets = [[token] for token in range(view.count)]
    while len(sets) > view.k:
        rows = [_average(view.tokens, members) for members in sets]
        odd = list(range(1, len(sets), 2))
        alike = {even: {o: _cosine(rows[even], rows[o]) for o in odd} for even in range(0, len(sets), 2)}
        goes_to = {even: max(odd, key=lambda o: found[o]) for even, found in alike.items()}
        number = min(len(sets) // 2, len(sets) - view.k)
        leaving = sorted(alike, key=lambda even: -alike[even][goes_to[even]])[:number]
        for even in leaving:
            sets[goes_to[even]] = sets[goes_to[even]] + sets[even]
        stays = {place: members[0] for place, members in enumerate(sets)}
        sets = [sets[place] for place in stays if place not in leaving]
    return Expected([members[0] for members in sets], np.stack([_average(view.tokens, members) for members in sets]))


def aim(view: View) -> Expected:
    """Two rounds of merging, two cuts by PageRank, and no visual token at the end.

    Ranks below 1e-30 count as nothing; of tokens that have nothing the first is kept.
    """
    if view.stage < 2:
        return _merge_bipartite(view)
    if view.stage == 4:
        return Expected([])
    logits = view.attention_logits.astype(float)
    real = [slot for slot in range(len(view.real_slots)) if view.real_slots[slot]]
    square = [0.0] * logits.shape[1]
    for head in range(len(logits)):
        rank = {slot: 1 / len(real) for slot in real}
        moves = {}
        for slot in real:
            top = max(logits[head, slot])
            parts = [math.exp((value - top) / 0.1) for value in logits[head, slot]]
            moves[slot] = [part / math.fsum(parts) for part in parts]
        for _ in range(5):
            rank = {to: math.fsum(rank[slot] * moves[slot][to] for slot in real) for to in real}
        for slot in real:
            square[slot] += rank[slot] ** 2 / len(logits)
    score = [math.sqrt(square[slot]) for slot in view.slots]
    return Expected(sorted(_highest([value if value > 1e-30 else 0.0 for value in score], view.k)))


# MustDrop


def mustdrop(view: View) -> Expected:
    """Windows of 3 x 3 merge, the most uniform first; CLS marks ceil(8 %) of the tokens; the text ranks the others.

    A window's last token stays. The last window to merge does so in part, from its first token on, when the number of
    tokens asks for it; below one token a window, whole windows go, the first ones first.
    """
    if view.stage == 0:
        return _merge_uniform_windows(view)
    if view.stage == 1:
        score = [_mean(view.cls_attention[:, token]) for token in range(view.count)]
        marked = _highest(score, math.ceil(0.08 * view.count))
        return Expected(range(view.count), carry=[float(token in marked) for token in range(view.count)])
    heads = range(len(view.text_attention))
    words = _question(view)
    score = [
        max(_mean(view.text_attention[h, word, token] for h in heads) for word in words) for token in range(view.count)
    ]
    order = sorted(range(view.count), key=lambda token: (-view.carried[token], -score[token]))
    return Expected(sorted(order[: view.k]), carry=view.carried.tolist())


def _merge_uniform_windows(view: View) -> Expected:
    assert view.grid is not None
    _, rows, columns = view.grid
    windows: dict[tuple[int, int, int], list[int]] = {}
    for token in range(view.count):
        frame, place = divmod(token, rows * columns)
        windows.setdefault((frame, place // columns // 3, place % columns // 3), []).append(token)
    uniform = {}
    for name, members in windows.items():
        pairs = [_cosine(view.tokens[a], view.tokens[b]) for a in members for b in members if a != b]
        uniform[name] = _mean(pairs) if pairs else -2.0
    order = sorted(windows, key=lambda name: -uniform[name])
    leaving = [token for name in order for token in windows[name][:-1]]
    leaving += sorted(members[-1] for members in windows.values())
    gone = set(leaving[: view.count - view.k])
    sets = {}
    for members in windows.values():
        for token in members:
            if token not in gone:
                joined = [other for other in members if other in gone] if token == members[-1] else []
                sets[token] = [*joined, token]
    keep = sorted(sets)
    return Expected(keep, np.stack([_average(view.tokens, sets[token]) for token in keep]))


# VFlowOpt


def vflowopt(view: View) -> Expected:
    """What global tokens attend to, global being who receives 34.8 times the mean (if none does: all).

    Grid cells of 15.6 of 27 tokens: as many tokens as whole cells fit by area (2 a frame), at most k - 1, are the best
    of their cell among those that are not kept outright, and become the mean of what is left of the cell, weighed by
    score. Later stages rank by the same score.
    """
    if view.stage > 0:
        return Expected(sorted(_highest(view.carried.tolist(), view.k)), carry=view.carried.tolist())
    attention = view.self_attention.astype(float).mean(axis=0)
    received = [_mean(attention[:, token]) for token in range(view.count)]
    looking = [i for i in range(view.count) if received[i] > 34.8 * _mean(received)] or list(range(view.count))
    score = [_mean(attention[i, token] for i in looking) for token in range(view.count)]
    assert view.grid is not None
    frames, rows, columns = view.grid
    number = min(math.floor((27 / 15.6) ** 2) * frames, view.k - 1)
    if view.k == view.count:
        number = 0
    members = {token: [token] for token in _highest(score, view.k - number)}
    left = [token for token in range(view.count) if token not in members]
    cells: dict[tuple[int, int, int], list[int]] = {}
    for token in left if number else []:
        frame, place = divmod(token, rows * columns)
        high, wide = rows * 15.6 / 27, columns * 15.6 / 27
        cells.setdefault((frame, int(place // columns / high), int(place % columns / wide)), []).append(token)
    leaders = {_highest(score, 1, cell)[0]: cell for cell in cells.values()}
    chosen = _highest(score, number, leaders)
    chosen += _highest(score, number - len(chosen), [token for token in left if token not in leaders])
    for token in chosen:
        members[token] = [other for other in leaders.get(token, [token]) if other == token or other not in chosen]
    keep = sorted(members)
    mixed = [_average(view.tokens, members[token], [score[other] for other in members[token]]) for token in keep]
    return Expected(keep, np.stack(mixed), carry=score)


ROWS: dict[str, Transcription] = {
    "adaptinfer": adaptinfer,
    "aim": aim,
    "fastv": most_attended,
    "fastv_debiased": most_attended_debiased,
    "fastv_sink_masked": most_attended_without_sinks,
    "fitprune": fitprune,
    "mustdrop": mustdrop,
    "pyramiddrop": most_attended,
    "pyramiddrop_debiased": most_attended_debiased,
    "sparsevlm": sparsevlm,
    "sparsevlm_plus": sparsevlm_plus,
    "visiondrop": visiondrop,
    "vflowopt": vflowopt,
}
