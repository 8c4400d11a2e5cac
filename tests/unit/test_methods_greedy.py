"""Greedy selectors and scores of geometry: options the table does not use, extremes, and that each is one scan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.compiler import score_ops
from secateur.compiler.function import trace_function
from secateur.exporters.expand_scores import expand_scores
from secateur.passes.methods.score_geometry import attention_flow, graph_flow, later_redundancy, projector_sensitivity
from secateur.passes.methods.select_greedy import (
    SELECTORS,
    coverage,
    determinant,
    farthest_by_score,
    max_marginal_relevance,
    max_sum,
)

from .transcriptions.tower import choose_one_by_one, table

SETTINGS = settings(max_examples=30, deadline=None)
Choose = Callable[[Tensor, Tensor, int], Tensor]
CHOOSE: dict[str, Choose] = {
    "coverage": lambda tokens, score, k: coverage(tokens, score, k).keep,
    "determinant": lambda tokens, score, k: determinant(tokens, score, k).keep,
    "farthest_by_score": lambda tokens, score, k: farthest_by_score(tokens, score, k).keep,
    "max_marginal_relevance": lambda tokens, score, k: max_marginal_relevance(tokens, score, k).keep,
    "max_sum": lambda tokens, _score, k: max_sum(tokens, k).keep,
}


def draw_rows(seed: int, groups: int, count: int, width: int = 12) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randn(groups, count, width, generator=source)
    return tokens, torch.rand(groups, count, generator=source)


def test_every_selector_is_tried_here() -> None:
    assert set(CHOOSE) == set(SELECTORS)


@SETTINGS
@given(st.data(), st.sampled_from(sorted(CHOOSE)))
def test_keeps_k_different_tokens_in_order(data: st.DataObject, name: str) -> None:
    """Duplicates, a row of zeros, scores that are all equal or all zero: still exactly k, group by group."""
    groups, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    k = data.draw(st.one_of(st.just(1), st.just(count), st.integers(1, count)))
    tokens, score = draw_rows(data.draw(st.integers(0, 999)), groups, count, width=4)
    if data.draw(st.booleans()):
        tokens = tokens[:, torch.arange(count) % data.draw(st.integers(1, count))]
    if data.draw(st.booleans()):
        tokens[:, 0] = 0.0
    score = score * data.draw(st.sampled_from([0.0, 1.0])) + data.draw(st.sampled_from([0.0, 0.5]))
    keep = CHOOSE[name](tokens, score, k)
    assert keep.shape == (groups, k)
    assert keep.dtype == torch.int64
    assert ((keep >= 0) & (keep < count)).all()
    assert (keep[:, 1:] > keep[:, :-1]).all(), "not strictly increasing"
    for group in range(groups):
        alone = CHOOSE[name](tokens[group : group + 1], score[group : group + 1], k)
        assert (alone[0] == keep[group]).all(), "groups are not independent"


@pytest.mark.parametrize("k", [1, 2, 9, 14])
@pytest.mark.parametrize("first", ["largest_sum", "first_token"])
def test_max_sum_takes_the_largest_sum_of_distances(first: str, k: int) -> None:
    """ToDRE's second version; the table does not use it."""
    tokens, _ = draw_rows(3, 2, 15)
    keep = max_sum(tokens, k, first=first).keep  # type: ignore[arg-type]
    for group in range(2):
        distance = [[1.0 - s for s in row] for row in table(tokens[group].numpy())]

        def gain(i: int, chosen: list[int], distance: list[list[float]] = distance) -> float:
            if not chosen and first == "first_token":
                return -i
            return sum(distance[i][j] for j in (chosen or range(15)))

        assert keep[group].tolist() == sorted(choose_one_by_one(15, k, gain))


@pytest.mark.parametrize(("power", "combine"), [(2.0, "product"), (0.5, "product"), (1.0, "sum")])
def test_coverage_options(power: float, combine: str) -> None:
    tokens, score = draw_rows(4, 2, 14)
    keep = coverage(tokens, score, 5, power=power, combine=combine).keep  # type: ignore[arg-type]
    for group in range(2):
        alike, weight = table(tokens[group].numpy()), score[group].tolist()

        def gain(i: int, chosen: list[int], alike: list[list[float]] = alike, weight: list[float] = weight) -> float:
            covered = [max([0.0, *(alike[c][j] for c in chosen)]) for j in range(14)]
            more = sum(max(0.0, alike[i][j] - covered[j]) for j in range(14))
            return weight[i] ** power * more if combine == "product" else weight[i] ** power + more

        assert keep[group].tolist() == sorted(choose_one_by_one(14, 5, gain))


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_relevance_alone_and_unlikeness_alone(weight: float) -> None:
    tokens, score = draw_rows(5, 1, 16)
    keep = max_marginal_relevance(tokens, score, 6, weight=weight).keep[0].tolist()
    alike, given_score = table(tokens[0].numpy()), score[0].tolist()

    def gain(i: int, chosen: list[int]) -> float:
        if not chosen:
            return given_score[i]
        return weight * given_score[i] - (1 - weight) * max(alike[i][c] for c in chosen)

    assert keep == sorted(choose_one_by_one(16, 6, gain))
    if weight == 1.0:
        assert keep == score[0].topk(6).indices.sort().values.tolist()


def test_farthest_points_weighted_by_score() -> None:
    """In loops: score times one minus the highest cosine to what was chosen."""
    tokens, score = draw_rows(11, 2, 14)
    for row in range(2):
        units = tokens[row].double().numpy()
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        weight = score[row].double().numpy()
        chosen = [int(weight.argmax())]
        while len(chosen) < 6:
            worth = weight * (1 - (units @ units[chosen].T).max(axis=1))
            worth[chosen] = -np.inf
            chosen.append(int(worth.argmax()))
        assert farthest_by_score(tokens, score, 6).keep[row].tolist() == sorted(chosen)


def test_determinant_is_the_greedy_maximum() -> None:
    """Against determinants worked out by NumPy."""
    tokens, score = draw_rows(6, 1, 12)
    alike, q = np.array(table(tokens[0].numpy())), score[0].double().numpy()
    kernel = q[:, None] * alike * q

    def gain(i: int, chosen: list[int]) -> float:
        members = [*chosen, i]
        return float(np.linalg.det(kernel[np.ix_(members, members)]))

    assert determinant(tokens, score, 6).keep[0].tolist() == sorted(choose_one_by_one(12, 6, gain))


def test_determinant_goes_on_by_score_when_nothing_new_is_left() -> None:
    """Five copies of three tokens: the best scored copy of each, then simply the best scored."""
    tokens, _ = draw_rows(7, 1, 3)
    score = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.7, 0.1, 0.1], [0.6, 0.1, 0.15], [0.5, 0.1, 0.1]])
    score = score.reshape(1, 15)
    keep = determinant(tokens.repeat(1, 5, 1), score, 6).keep[0].tolist()
    assert keep == [0, 2, 3, 4, 6, 9]
    assert determinant(tokens.repeat(1, 5, 1), score, 3).keep[0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("name", sorted(CHOOSE))
@pytest.mark.parametrize("k", [3, 11])
def test_one_operator_and_one_scan_whatever_k(name: str, k: int) -> None:
    feed = dict(zip(("tokens", "score"), draw_rows(8, 2, 20), strict=True))
    traced = trace_function(name, lambda tokens, score: (CHOOSE[name](tokens, score, k),), feed, ("keep",))
    assert sum(node.target in score_ops.PLAIN for node in traced.graph.nodes) == 1
    plain = expand_scores(traced)
    (scan,) = plain.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan)
    body = getattr(plain.module, scan.args[0].target)
    (argmax,) = body.graph.find_nodes(op="call_function", target=torch.ops.aten.argmax.default)
    assert argmax.args[0].meta["val"].ndim == 2, "TensorRT refuses an ArgMax of fewer dimensions"


def test_selectors_run_where_gradients_are_recorded() -> None:
    tokens, score = draw_rows(9, 2, 12)
    for name, choose in CHOOSE.items():
        expected = choose(tokens, score, 5)
        assert (choose(tokens.clone().requires_grad_(), score.clone().requires_grad_(), 5) == expected).all(), name


def test_projector_sensitivity_is_the_mean_norm() -> None:
    slopes = torch.zeros(1, 2, 3, 4)
    slopes[0, 0, 1] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    slopes[0, 1, 2, 0] = 8.0
    assert projector_sensitivity(slopes).tolist() == [[0.0, 2.5, 4.0]]


def test_the_last_token_is_never_redundant() -> None:
    tokens = torch.ones(2, 5, 3)
    assert later_redundancy(tokens)[:, -1].tolist() == [1.0, 1.0]
    torch.testing.assert_close(later_redundancy(tokens)[:, :-1], -torch.ones(2, 4))
    assert later_redundancy(torch.ones(1, 1, 3)).tolist() == [[1.0]]


def test_a_graph_without_edges_keeps_the_norms() -> None:
    tokens = torch.diag(torch.tensor([1.0, 2.0, 3.0])).unsqueeze(0)
    torch.testing.assert_close(graph_flow(tokens), torch.tensor([[1.0, 2.0, 3.0]]))
    assert graph_flow(torch.zeros(1, 4, 3)).isfinite().all()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("threshold", "temperature"), [(0.5, 0.03), (0.0, 0.5)])
def test_norms_flow_step_by_step(steps: int, threshold: float, temperature: float) -> None:
    """Three wide, so that tokens have many neighbours; the power of the table, as the authors write it."""
    tokens, _ = draw_rows(10, 1, 12, width=3)
    found = graph_flow(tokens, threshold=threshold, temperature=temperature, steps=steps)[0]
    alike = np.array(table(tokens[0].numpy()))
    near = alike >= threshold
    assert 2 < near.sum(axis=1).mean() < 12
    shares = np.where(near, np.exp(alike / temperature), 0.0)
    shares /= shares.sum(axis=1, keepdims=True)
    norms = np.linalg.norm(tokens[0].double().numpy(), axis=1)
    expected = norms @ np.linalg.matrix_power(shares, steps) / near.sum(axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_flow_carries_half_of_what_came_before() -> None:
    source = torch.Generator().manual_seed(1)
    attention = torch.rand(2, 3, 7, generator=source).softmax(-1)
    values, cls = torch.randn(2, 3, 7, 4, generator=source), torch.randn(2, 3, 4, generator=source)
    first = attention_flow(attention, cls, values)
    assert first.score is first.carry
    before = torch.rand(2, 7, generator=source)
    torch.testing.assert_close(attention_flow(attention, cls, values, before).score, 0.5 * before + 0.5 * first.score)
    torch.testing.assert_close(attention_flow(attention, cls, values, before, momentum=0.0).score, first.score)


def test_flow_by_its_formula() -> None:
    """In float64; the CLS token's resemblance to itself takes its part of each head's softmax."""
    draws = [torch.randn(*shape, generator=torch.Generator().manual_seed(3)) for shape in ((2, 3, 4), (2, 3, 7, 4))]
    cls_values, values = draws[0], 0.5 * draws[1]
    attention = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(4))
    cls, rows = cls_values.double().numpy(), values.double().numpy()
    logits = np.concatenate([(cls**2).sum(axis=2, keepdims=True), np.einsum("ghnd,ghd->ghn", rows, cls)], axis=2)
    raised = np.exp(logits - logits.max(axis=2, keepdims=True))
    similar = (raised / raised.sum(axis=2, keepdims=True))[:, :, 1:].mean(axis=1)
    relation = attention.double().numpy().mean(axis=1)
    share = relation / relation.sum(axis=1, keepdims=True) + similar / similar.sum(axis=1, keepdims=True)
    want = share * np.abs(rows.mean(axis=1)).sum(axis=2)
    got = attention_flow(attention, cls_values, values).score
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4)
