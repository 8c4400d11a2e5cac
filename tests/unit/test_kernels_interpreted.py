"""Every kernel in Triton's interpreter, against slow arithmetic in float64 and against the plain forms.

Shapes are drawn at random from a seed, small: the interpreter takes milliseconds for an operation.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.compiler import greedy, score_ops

pytest.importorskip("triton")
Run = Callable[..., list[Tensor]]
RULES = ("farthest", "sum", "weighted", "relevance")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """``run(plugin, inputs, settings, **sizes)`` -> all outputs."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("kernels_worker.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as worker:  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None

        def ask(name: str, inputs: list[Tensor], settings: dict[str, Any], **sizes: int) -> list[Tensor]:
            pickle.dump((name, [t.contiguous() for t in inputs], settings, sizes), worker.stdin)
            worker.stdin.flush()  # type: ignore[union-attr]
            answer: list[Tensor] | str = pickle.load(worker.stdout)  # type: ignore[arg-type]
            assert not isinstance(answer, str), answer
            return answer

        yield ask
        worker.stdin.close()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shares(query: Tensor, key: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    """Attention of query rows at ``slots [B,R]`` (None: sees everything) in float64, ``[B,H,R,L]``."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.transpose(-1, -2) * scale
    if slots is not None:
        logits = logits.masked_fill((torch.arange(key.shape[2]) > slots[..., None])[:, None], float("-inf"))
    return torch.softmax(logits, -1)


def draw_heads(seed: int) -> tuple[int, int, int, int]:
    """Query heads, key heads, keys, width: grouped or not, odd lengths, widths that fill no tile."""
    source = Random(seed)
    key_heads = source.choice((1, 2, 3))
    return key_heads * source.choice((1, 2, 4)), key_heads, source.randint(1, 75), source.choice((8, 12, 24, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("seed", "causal"), [(0, True), (1, False), (2, True), (3, False)])
def test_attention_received_is_that_of_the_whole_map(run: Run, seed: int, causal: bool, dtype: torch.dtype) -> None:
    heads, key_heads, length, width = draw_heads(seed)
    query, key = (
        normal(seed, 2, heads, length, width).to(dtype),
        normal(seed + 50, 2, key_heads, length, width).to(dtype),
    )
    last = torch.tensor([length - 1, Random(seed).randrange(length)])
    settings = {"scale": width**-0.5, "causal": causal}
    (sums,) = run("RowLogSumExp", [query, key], settings)
    (found,) = run("ColumnSums", [query, key, sums, last.int()], settings)
    whole = shares(query, key, settings["scale"], torch.arange(length).expand(2, length) if causal else None)
    counts = (torch.arange(length) <= last[:, None]).double()
    expected = (whole * counts[:, None, :, None]).sum(2) / (last[:, None, None] + 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    if heads == key_heads or causal:
        plain = score_ops.received_attention(query, key, settings["scale"], causal, last)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_attention_received_from_some_queries(run: Run, seed: int) -> None:
    heads, key_heads, length, width = draw_heads(seed + 10)
    source = Random(seed)
    rows = source.randint(1, length)
    slots = torch.tensor([sorted(source.sample(range(length), rows)) for _ in range(2)])
    last = torch.stack([row[source.randrange(rows)] for row in slots])
    query, key = normal(seed, 2, heads, rows, width), normal(seed + 50, 2, key_heads, length, width)
    settings = {"scale": 0.3, "causal": True}
    (sums,) = run("RowLogSumExp", [query, key, slots.int()], settings)
    (found,) = run("ColumnSums", [query, key, sums, last.int(), slots.int()], settings)
    counts = (slots <= last[:, None]).double()
    expected = (shares(query, key, 0.3, slots) * counts[:, None, :, None]).sum(2) / counts.sum(1)[:, None, None]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("seed", "rows"), [(0, 1), (1, 3), (2, 1), (3, 7)])
def test_last_rows_are_rows_of_the_map(run: Run, seed: int, rows: int) -> None:
    heads, key_heads, length, width = draw_heads(seed + 20)
    query, key = normal(seed, 2, heads, rows, width), normal(seed + 50, 2, key_heads, length, width)
    slots = torch.randint(length, (2, rows), generator=torch.Generator().manual_seed(seed))
    (found,) = run("LastRows", [query, key, slots.int()], {"scale": 0.3})
    torch.testing.assert_close(found.double(), shares(query, key, 0.3, slots), rtol=0, atol=1e-6)
    plain = torch.softmax(score_ops.score_rows(query, key, 0.3, slots), -1)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    (found,) = run("LastRows", [query, key], {"scale": 0.3})
    torch.testing.assert_close(found.double(), shares(query, key, 0.3, None), rtol=0, atol=1e-6)


def draw_table(seed: int, groups: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines ``[G,N,N]``, where to start ``[G]``, weights ``[G,N]``."""
    units = torch.nn.functional.normalize(normal(seed, groups, count, 6), dim=-1)
    source = torch.Generator().manual_seed(seed)
    start = torch.randint(count, (groups,), generator=source)
    return units @ units.transpose(1, 2), start, torch.rand(groups, count, generator=source)


def walk_farthest(table: Tensor, start: int, k: int) -> list[int]:
    """Greedy max-min in float64, written as loops; of equal distances the lower index."""
    rows, picks = table.double().tolist(), [start]
    while len(picks) < k:
        near = {j: min(rows[i][j] for i in picks) for j in range(len(rows)) if j not in picks}
        picks.append(max(near, key=lambda j: (near[j], -j)))
    return picks


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("count", "k"), [(23, 9), (31, 1), (17, 17), (2, 2)])
def test_picks_by_fold_are_those_of_the_scan(run: Run, rule: str, count: int, k: int, tile: int | None) -> None:
    alike, start, weight = draw_table(count, 2, count)
    table = alike if rule == "relevance" else 1.0 - alike
    settings, sizes = {"k": k, "rule": rule, "trade": 0.4}, {} if tile is None else {"tile": tile}
    found = run("PickByFold", [table, start.int(), weight], settings, **sizes)[0]
    assert torch.equal(found.long(), greedy.pick_by_fold(table, start, weight, k, rule, 0.4))
    if rule == "farthest":
        assert found.tolist() == [walk_farthest(table[g], int(start[g]), k) for g in range(2)]


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_gains_the_lower_index_is_picked(run: Run, rule: str) -> None:
    table, weight = torch.ones(1, 40, 40), torch.ones(1, 40)
    for sizes in ({}, {"tile": 16}):
        found = run(
            "PickByFold", [table, torch.tensor([20]).int(), weight], {"k": 5, "rule": rule, "trade": 0.5}, **sizes
        )
        assert found[0].tolist() == [[20, 0, 1, 2, 3]]


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize(("count", "k"), [(23, 9), (31, 1), (17, 17)])
def test_picks_by_determinant_are_those_of_the_scan(run: Run, count: int, k: int, tile: int | None) -> None:
    """Six dimensions: from the seventh pick on, tokens lie inside the span and come by score."""
    alike, _, score = draw_table(count, 2, count)
    sizes = {} if tile is None else {"tile": tile}
    found = run("PickByDeterminant", [alike, score], {"k": k}, **sizes)[0]
    assert torch.equal(found.long(), greedy.pick_by_determinant(alike, score, k))
    exact = alike[0].double() * score[0].double()[:, None] * score[0].double()
    chosen: list[int] = []
    for pick in found[0].tolist()[:6]:
        volumes = [
            torch.linalg.det(exact[[*chosen, j]][:, [*chosen, j]]) if j not in chosen else -1 for j in range(count)
        ]
        assert volumes[pick] == pytest.approx(max(map(float, volumes)), rel=1e-4)
        chosen.append(pick)


@pytest.mark.parametrize("product", [True, False])
@pytest.mark.parametrize(("count", "k"), [(41, 7), (150, 3), (13, 1), (9, 9)])
def test_picks_by_coverage_are_those_of_the_scan(run: Run, count: int, k: int, product: bool) -> None:
    alike, start, weight = draw_table(count, 2, count)
    table = torch.relu(alike)
    found = run("PickByCoverage", [table, start.int(), weight], {"k": k, "product": product})[0].long()
    assert torch.equal(found, greedy.pick_by_coverage(table, start, weight, k, product))
    exact, covered = table[0].double(), table[0, start[0]].double()
    for step in range(1, min(k, 4)):
        more = torch.relu(exact - covered).sum(1)
        gain = weight[0].double() * more if product else weight[0].double() + more
        gain[found[0, :step]] = -1.0
        assert gain[found[0, step]] == pytest.approx(float(gain.max()), rel=1e-5)
        covered = torch.maximum(covered, exact[found[0, step]])


@pytest.mark.parametrize(
    ("seed", "count", "k", "tile"),
    [(0, 23, 9, 16), (1, 40, 1, None), (2, 17, 17, None), (3, 75, 40, None), (4, 1, 1, 16)],
)
def test_rank_takes_the_highest_in_order(run: Run, seed: int, count: int, k: int, tile: int | None) -> None:
    score = normal(seed, 2, count).round()  # many ties
    score[0, count // 2] = float("inf")
    score[:, : count // 4] = -0.0
    score[1, -1] = float("-inf")
    rows = normal(seed + 50, 2, count, 5).half()
    expected = score.double().sort(dim=1, descending=True, stable=True).indices[:, :k].sort().values
    sizes = {} if tile is None else {"tile": tile}
    keep, taken = run("RankTake", [score, rows], {"k": k}, **sizes)
    assert torch.equal(keep.long(), expected)
    assert torch.equal(taken, rows.gather(1, expected[..., None].expand(-1, -1, 5)))
    distinct = torch.argsort(normal(seed, 2, count), 1).float()
    found = run("RankTake", [distinct], {"k": k}, **sizes)[0].long()
    assert torch.equal(found, score_ops.top_rows(distinct, k))
