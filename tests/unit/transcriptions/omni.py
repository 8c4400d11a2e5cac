"""Transcriptions of the rows in ``passes/recipes/omni_rows.py``, and of the one in ``tower_rows.py`` that reads learned
weights. What is seen is 0, what is heard 1."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
from tests.unit.rows import draw_weights

from . import Expected, Transcription, View
from .seats import allot_some, kinds_kept
from .tower import choose_one_by_one, cosine, highest, mean_over_heads, scale_to_unit

RATES = (0.1, 0.45)


def best_of_kinds(scores: Sequence[float], kinds: Sequence[int], kept: Mapping[int, int]) -> list[int]:
    """Of each kind its highest scores."""
    chosen: list[int] = []
    for kind, number in kept.items():
        mine = [i for i, other in enumerate(kinds) if other == kind]
        chosen += sorted(mine, key=lambda i: (-scores[i], i))[:number]
    return sorted(chosen)


def kept_behind_whole_layers(kinds: Sequence[int], k: int, rates: Sequence[float]) -> dict[int, int]:
    """FastV's conversion of averages: with all n of a kind in a share a of the layers, n (rate - a) / (1 - a) stay
    behind, a such that k stay in all; that is, what goes is in proportion to n (1 - rate). One of a kind stays."""
    held = {kind: sum(other == kind for other in kinds) for kind in sorted(set(kinds))}
    if k == len(kinds):
        return held
    spare = {(0, kind): n - (k >= len(held)) for kind, n in held.items()}
    gone = allot_some({(0, kind): n * (1 - rates[kind]) for kind, n in held.items()}, len(kinds) - k, spare)
    return {kind: n - gone[0, kind] for kind, n in held.items()}


def random_omni(view: View) -> Expected:
    """Ranks 0 to N - 1 in the order of Python's random numbers of seed 0."""
    source = random.Random(0)
    draws = [source.random() for _ in range(view.count)]
    ranks = [0.0] * view.count
    for place, token in enumerate(sorted(range(view.count), key=lambda i: draws[i])):
        ranks[place] = float(token)
    kept = kinds_kept(view.modalities, view.k, RATES)
    return Expected(best_of_kinds(ranks, view.modalities, kept))


def fastv_omni(view: View) -> Expected:
    kept = kept_behind_whole_layers(view.modalities, view.k, RATES)
    return Expected(best_of_kinds(mean_over_heads(view.last_query_attention), view.modalities, kept))


def visionzip_omni(view: View) -> Expected:
    """A window, one moment of what is seen or two of what is heard, gets its part of its kind's number. A twentieth of
    its tokens are targets among those not chosen by attention, evenly spaced; a target gains the mean of the dropped
    tokens of its window that it is most like."""
    if "carried" not in view.signals:
        return Expected(list(range(view.count)), carry=mean_over_heads(view.received_attention))
    score = [float(s) for s in view.carried]
    cells = [(frame // (2 if kind else 1), kind) for frame, kind in zip(view.frames, view.modalities, strict=True)]
    keep: list[int] = []
    rows = {i: np.array(view.tokens[i], dtype=float) for i in range(view.count)}
    for kind, kept in kinds_kept(view.modalities, view.k, RATES).items():
        sizes = {cell: cells.count(cell) for cell in sorted(set(cells)) if cell[1] == kind}
        quota = allot_some({cell: float(n) for cell, n in sizes.items()}, kept, sizes)
        for cell, size in sizes.items():
            members = [i for i, other in enumerate(cells) if other == cell]
            if not quota[cell]:
                continue
            places = min(max(round(0.05 * size), 1), quota[cell] - 1)
            dominant = sorted(members, key=lambda i: (-score[i], i))[: quota[cell] - places]
            rest = [i for i in members if i not in dominant]
            targets = rest[:: len(rest) // places][:places] if places else []
            joined: dict[int, list[int]] = {target: [] for target in targets}
            for i in (i for i in rest if i not in targets and targets):
                joined[max(targets, key=lambda t: (cosine(view.tokens[i], view.tokens[t]), -t))].append(i)
            for target, others in joined.items():
                if others:
                    rows[target] = rows[target] + sum(view.tokens[i].astype(float) for i in others) / len(others)
            keep += [*dominant, *targets]
    keep.sort()
    return Expected(keep, rows=np.array([rows[i] for i in keep]))


def contextguard_proxy(view: View) -> Expected:
    """All sound first, the i-th by the fractional part of i times the golden ratio; then what is least like the mean
    direction of the sound of its window of two moments."""
    score = []
    for token, source in zip(view.tokens, view.source, strict=True):
        window = view.frames[source] // 2
        sounds = [
            view.tokens[j].astype(float) / math.sqrt(sum(float(x) ** 2 for x in view.tokens[j]))
            for j, other in enumerate(view.source)
            if view.modalities[other] == 1 and view.frames[other] // 2 == window
        ]
        if view.modalities[source] == 1:
            before = sum(view.modalities[: source + 1])
            score.append(3.0 + math.modf(before * (math.sqrt(5) - 1) / 2)[0])
        else:
            score.append(1.0 - cosine(token, sum(sounds) / len(sounds)) if sounds else 1.0)
    return Expected(highest(score, view.k))


def echoingpixels(view: View) -> Expected:
    """RMS norm, linear, SiLU, linear to one number: a perceptron on every token by itself."""
    weights = {name: tensor.double().numpy() for name, tensor in draw_weights("echoingpixels", 12).items()}
    score = []
    for token in view.tokens.astype(float):
        row = token / math.sqrt(sum(x * x for x in token) / len(token) + 1e-6) * weights["norm.weight"]
        inner = [float(row @ weights["up.weight"][j]) + weights["up.bias"][j] for j in range(len(weights["up.bias"]))]
        bent = [x / (1 + math.exp(-x)) for x in inner]
        score.append(sum(b * float(w) for b, w in zip(bent, weights["down.weight"][0], strict=True)))
    return Expected(highest(score, view.k))


def idpruner_learned(view: View) -> Expected:
    """Importance is the mean over all tokens of a token's query times their keys, over the root of their width; then as
    ``idpruner``."""
    weights = {name: tensor.double().numpy() for name, tensor in draw_weights("idpruner_learned", 12).items()}
    query, key = (
        [weights[f"{part}.weight"] @ token + weights[f"{part}.bias"] for token in view.tokens.astype(float)]
        for part in ("q_proj", "k_proj")
    )
    width = len(weights["q_proj.bias"])
    logits = [sum(float(q @ k) / math.sqrt(width) for k in key) / len(key) for q in query]
    importance = scale_to_unit(logits)

    def gain(i: int, chosen: list[int]) -> float:
        if not chosen:
            return importance[i]
        return 0.5 * importance[i] - 0.5 * max(cosine(view.tokens[i], view.tokens[c]) for c in chosen)

    return Expected(sorted(choose_one_by_one(view.count, view.k, gain)))


ROWS: dict[str, Transcription] = {
    "contextguard_proxy": contextguard_proxy,
    "echoingpixels": echoingpixels,
    "fastv_omni": fastv_omni,
    "idpruner_learned": idpruner_learned,
    "random_omni": random_omni,
    "visionzip_omni": visionzip_omni,
}
