"""What every selector keeps, read in float64 as slow loops over single tokens: of equal tokens the first.

One group at a time. Those that a row of the table uses with its default options are read by the row's transcription.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .transcriptions import View, decoder, decoder_attention, omni, seats, tower, tower_attention

Given = Mapping[str, Any]
"""Arguments of a function without the group axis: float64 arrays, ``k``, ``grid``, ``layout``."""
Reading = Callable[[Given], Sequence[int]]


def order(score: Iterable[float], among: Iterable[int] | None = None) -> list[int]:
    """Tokens from the highest to the lowest score."""
    values = [float(value) for value in score]
    return sorted(range(len(values)) if among is None else among, key=lambda token: (-values[token], token))


def view(given: Given, stage: int = 0, **signals: Any) -> View:
    """The arguments as a transcription sees them; ``tokens`` are its rows, of one number each where none are given."""
    score = given.get("score", given.get("carried"))
    rows = given.get("tokens", np.zeros((0 if score is None else len(score), 1)))
    layout = given.get("layout", ((), ()))
    return View(stage, given["k"], given.get("grid"), {"tokens": rows, **signals}, *layout)


def cosines(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units @ units.T  # type: ignore[no-any-return]


def _greedily(given: Given, gain: Callable[[int, list[int]], float]) -> list[int]:
    """k steps, each the highest gain as a float32 number, which is what a backend compares."""
    count = len(given["tokens"])
    return sorted(tower.choose_one_by_one(count, given["k"], lambda i, chosen: float(np.float32(gain(i, chosen)))))


def _farthest_by_score(given: Given) -> list[int]:
    alike, score = cosines(given["tokens"]), given["score"]
    return _greedily(given, lambda i, c: score[i] * min(1 - alike[i, j] for j in c) if c else score[i])


def _relevance(given: Given) -> list[int]:
    alike, score = cosines(given["tokens"]), given["score"]
    return _greedily(given, lambda i, c: 0.5 * score[i] - 0.5 * max(alike[i, j] for j in c) if c else score[i])


def _max_sum(given: Given) -> list[int]:
    apart = 1 - cosines(given["tokens"])
    return _greedily(given, lambda i, c: apart[i, c].sum() if c else apart[i].sum())


def _determinant(given: Given) -> list[int]:
    """The variance left of a token is what its unit row has outside the span of the chosen ones' rows."""
    rows, score = given["tokens"] / np.linalg.norm(given["tokens"], axis=1, keepdims=True), given["score"]
    chosen: list[int] = []
    while len(chosen) < given["k"]:
        span = np.linalg.qr(rows[chosen].T)[0] if chosen else np.zeros((rows.shape[1], 0))
        left = 1 - ((rows @ span) ** 2).sum(axis=1)
        free = [i for i in range(len(rows)) if i not in chosen]
        outside = [i for i in free if left[i] > 1e-4]
        values = [score[i] * math.sqrt(max(left[i], 0)) if outside else score[i] for i in range(len(rows))]
        chosen.append(order(values, outside or free)[0])
        if len(chosen) > rows.shape[1]:  # the span is whole: the others by score
            chosen += order(score, [i for i in free if i not in chosen])
    return sorted(chosen[: given["k"]])


def _uniform(given: Given) -> list[int]:
    """Three in twenty places are spread evenly over what the highest leave."""
    ranked, k = order(given["score"]), given["k"]
    places = min(max(math.floor(0.156 * k + 0.5), 1), k - 1)
    rest = sorted(ranked[k - places :])
    return sorted(ranked[: k - places] + rest[:: len(rest) // places][:places])


def _frame_quotas(given: Given) -> list[int]:
    frames, rows, columns = given["grid"]
    size = rows * columns
    leaders, others = (range(0, frames, 4), [f for f in range(frames) if f % 4])
    kept: list[int] = []
    for members, budget in (
        (leaders, min(given["k"], len(leaders) * size)), (others, max(given["k"] - len(leaders) * size, 0))
    ):  # fmt: skip
        for place, frame in enumerate(members):
            quota = budget // len(members) + (place < budget % len(members))
            kept += order(given["score"], range(frame * size, (frame + 1) * size))[:quota]
    return sorted(kept)


def _cells(given: Given) -> list[int]:
    """VFlowOpt's recycling: floor(1.73 ** 2) places for the best of each cell, the best cells and then others first."""
    _, rows, columns = given["grid"]
    ranked, k = order(given["score"]), given["k"]
    places = min(math.floor((27 / 15.6) ** 2), k - 1)
    outright = ranked[: k - places]
    best: dict[tuple[int, int], int] = {}
    for token in ranked[k - places :]:
        row, column = divmod(token, columns)
        best.setdefault((math.floor(row / (rows / 27 * 15.6)), math.floor(column / (columns / 27 * 15.6))), token)
    leaders = [token for token in ranked if token in best.values()]
    others = [token for token in ranked if token not in outright and token not in leaders]
    return sorted((outright + leaders + others)[:k])


def _clusters(given: Given) -> list[int]:
    """The highest; and of the next ones, of which three in ten take part, the density peaks."""
    count, k, ranked = len(given["score"]), given["k"], order(given["score"])
    stay = max(n for n in range(1, k + 1) if n == 1 or n + (math.floor((count - n) * 0.3) + 1) // 10 + 1 <= k)
    pool = ranked[stay : stay + max(math.floor((count - stay) * 0.3) + 1, k - stay)]
    centres, _ = decoder_attention._density_peaks(given["tokens"][pool], k - stay)
    return sorted(ranked[:stay] + [pool[centre] for centre in centres])


def _density_centres(given: Given) -> list[int]:
    rows = np.concatenate(list(given["keys"]), axis=1)
    apart = np.maximum(1 - cosines(rows), 0)
    candidates = order(given["score"])[: max(given["k"], math.floor(0.55 * len(rows) + 0.5))]
    density = {a: sum(math.exp(-((apart[a, b] / 2) ** 2)) for b in candidates) for a in candidates}
    far = [-1.0] * len(rows)
    for a in candidates:
        far[a] = min((apart[a, b] for b in candidates if (-density[b], b) < (-density[a], a)), default=math.inf)
    return sorted(order(far)[: given["k"]])


def _bipartite(rows: np.ndarray[Any, Any], k: int, first: int) -> list[int]:
    """One round: of every other token, from ``first`` on, those most like one of the rest go."""
    alike = cosines(rows)[first::2, 1 - first :: 2].max(axis=1)
    gone = {int(source) * 2 + first for source in order(alike)[: len(rows) - k]}
    return [token for token in range(len(rows)) if token not in gone]


def _complete_graph(given: Given) -> list[int]:
    alike = cosines(given["keys"].mean(axis=0))
    np.fill_diagonal(alike, -math.inf)
    alike = np.minimum(alike, alike.T)
    ranked = order(alike.max(axis=1))
    considered = {
        a: max((alike[a, b] for b in ranked[place + 1 :]), default=-math.inf) for place, a in enumerate(ranked)
    }
    value = [float(np.float32(considered[a] - given["score"][a])) for a in range(len(ranked))]
    gone = order(value)[: len(ranked) - given["k"]]
    return sorted(set(ranked) - set(gone))


def _cells_of(given: Given) -> list[tuple[int, int]]:
    return [(frame // 2, kind) for frame, kind in zip(*given["layout"], strict=True)]


def _highest(given: Given) -> list[int]:
    return sorted(order(given["score"])[: given["k"]])


SELECTORS: dict[str, Reading] = {
    "bipartite_keys": lambda g: _bipartite(g["keys"].mean(axis=0), g["k"], 1),
    "bipartite_tokens": lambda g: _bipartite(g["tokens"], g["k"], 0),
    "complete_graph_keys": _complete_graph,
    "coverage": lambda g: tower.scope(view(g, cls_attention=g["score"][None])).keep,
    "density_centres": _density_centres,
    "determinant": _determinant,
    "distinct": lambda g: tower_attention.important_and_distinct(view(g), g["score"]),
    "farthest_by_score": _farthest_by_score,
    "frame_quotas": _frame_quotas,
    "max_marginal_relevance": _relevance,
    "max_min": lambda g: tower.divprune(view(g)).keep,
    "max_sum": _max_sum,
    "merge_windows": lambda g: decoder_attention.mustdrop(view(g)).keep,
    "nothing": lambda g: [],
    "top_k": _highest,
    "top_k_and_cells": _cells,
    "top_k_and_centres": _highest,
    "top_k_and_clusters": _clusters,
    "top_k_and_uniform": _uniform,
    "top_k_and_uniform_per_window": lambda g: omni.visionzip_omni(view(g, carried=g["score"])).keep,
    "top_k_per_modality": lambda g: omni.best_of_kinds(
        g["score"], g["layout"][1], seats.kinds_kept(g["layout"][1], g["k"], (1.0, 1.0))
    ),
    "unlike_pivots": lambda g: decoder.dart(view(g, **{n: g[n] for n in _PIVOT_SIGNALS})).keep,
    "weighted_max_min": lambda g: decoder.seats_stage1(view(g, received_attention=g["score"][None])).keep,
    "windowed_max_min": lambda g: seats.stage_one(g["tokens"], g["score"], _cells_of(g), g["k"], (1.0, 1.0)),
}
_PIVOT_SIGNALS = ("normed_tokens", "normed_text", "keys", "text_keys", "text_rows")


def _two_layers(given: Given) -> np.ndarray[Any, Any]:
    return np.stack(given["scores"])[:, None]


def _quotas(given: Given) -> list[int]:
    cells, kept = _cells_of(given), seats.kinds_kept(given["layout"][1], given["k"], (1.0, 1.0))
    return seats.stage_two(given["score"], cells, given["k"], kept, given["temperature"])


def _spared(given: Given) -> list[int]:
    ranked = order(given["score"])
    return sorted(sorted(ranked, key=lambda token: -given["carried"][token])[: given["k"]])


FIRST: dict[str, Reading] = {
    "anchors_first": lambda g: tower_attention.hiprune(view(g, received_attention_layers=_two_layers(g))).keep,
    "carried_then_question": lambda g: (
        tower_attention.recoverable(view(g, 1, **{n: g[n] for n in ("carried", "text_tokens", "text_rows")})).keep
    ),
    "chunks_first": lambda g: tower_attention.holov(view(g, cls_attention=g["score"][None])).keep,
    "grid_first": lambda g: (
        tower_attention.prumerge_plus(view(g, cls_attention=g["score"][None], keys=g["tokens"][None])).keep
    ),
    "spare_carried": _spared,
    "tiles_first": lambda g: tower_attention.hired(view(g, cls_attention_layers=_two_layers(g))).keep,
    "window_modality_quotas": _quotas,
    "windows_first": lambda g: tower_attention.vscan(view(g, cls_attention_layers=_two_layers(g))).keep,
}
"""Of scores that put some tokens before others: what a top-k of them keeps."""


def _min_max(score: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (score - score.min()) / (score.max() - score.min())  # type: ignore[no-any-return]


def _ranks(score: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    place = {token: len(score) - 1 - at for at, token in enumerate(order(score))}
    return np.array([place[token] / (len(score) - 1) for token in range(len(score))])


def _sinks(given: Given) -> np.ndarray[Any, Any]:
    rows = np.abs(given["tokens"]) / np.sqrt((given["tokens"] ** 2).mean(axis=1, keepdims=True) + 1e-6)
    first = order(np.abs(given["text_tokens"][0]))[:2]
    return np.where(rows[:, first].max(axis=1) > 20.0, 0.0, given["score"])


VALUES: dict[str, Callable[[Given], np.ndarray[Any, Any]]] = {
    "min_max": lambda g: _min_max(g["score"]),
    "padding_mask": lambda g: np.where(np.arange(len(g["score"])) % 6 < 2, 0.0, g["score"]),
    "position_bias": lambda g: g["score"] * np.linspace(1.0, 0.25, len(g["score"])),
    "product": lambda g: g["scores"][0] * g["scores"][1],
    "rank": lambda g: _ranks(g["score"]),
    "sink_mask": _sinks,
    "sum_to_one": lambda g: g["score"] / g["score"].sum(),
    "top_share": lambda g: np.isin(np.arange(len(g["score"])), order(g["score"])[: math.ceil(0.08 * len(g["score"]))]),
    "weighted_sum": lambda g: g["scores"][0] + g["scores"][1],
}
"""Of scores made of others that rank by a number: that number."""
OPTIONS: dict[str, dict[str, Any]] = {
    "anchors_first": {"alpha": 0.1},
    "carried_then_question": {},
    "padding_mask": {"left": 1 / 3},
    "position_bias": {"weights": (1.0, 0.25)},
    "top_k_and_uniform_per_window": {"rates": omni.RATES},
}
"""Options under which the readings hold, beside the defaults."""
