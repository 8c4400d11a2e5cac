"""What the overhead benchmark takes out of a compiled program, and what it makes of the times."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secateur.compiler.pipeline import RECIPES
from secateur.tools.bench import overhead_page
from secateur.tools.bench.isolate import cut_stages
from secateur.tools.bench.overhead import FRAMES, TOKENS, Sizes, classify, interleave, make_ids, open_cut, sizes_for

from .tiny_model import IMAGE, PATCHES

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

RECORD = {
    "recipe": "fastv", "class": "slice", "share": 0.001, "stages_seconds": 0.008, "prefill_seconds": 8.0, "scans": 0,
    "nodes": 50, "images": 1, "load": 0.1,
}  # fmt: skip


def cut(traced: Any, name: str, features: int = PATCHES) -> Any:
    # The fixture's geometry has 24 text tokens; the benchmark's own is fuller.
    ids = make_ids(IMAGE, features)
    ids["input_ids"] = ids["input_ids"][:, 20:-20]
    ids["lengths"] = ids["lengths"] - 40
    return cut_stages(traced(), RECIPES[name], 0.5, ids)


def run_graph(model: bytes, feed: Any) -> list[Any]:
    import onnxruntime as ort

    return list(ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, dict(feed)))


def test_a_decoder_stage_alone_keeps_what_it_should(traced: Any) -> None:
    (found,) = cut(traced, "fastv")
    assert (found.program, found.scans) == ("prefill", 0)
    shapes = sorted(v.shape for v in found.feed.values())
    assert (1, 4, 40, 16) in shapes, "queries of every head, of which the stage takes one row"
    results = run_graph(found.model, found.feed)
    assert [r.shape for r in results if r.dtype == np.int64 and r.size == PATCHES // 2], "K kept indices"
    assert [r for r in results if r.shape == (1, 40 - PATCHES // 2, 64)], "the shorter stream"
    assert all(np.isfinite(r).all() for r in results)


def test_layers_are_left_out(traced: Any) -> None:
    (found,) = cut(traced, "fastv")
    import onnx

    operators = [node.op_type for node in onnx.load_from_string(found.model).graph.node]
    assert "Softmax" in operators
    assert "TopK" in operators
    assert not {"Attention", "GroupQueryAttention", "MultiHeadAttention"} & set(operators)
    assert sum(op == "MatMul" for op in operators) == 1, "the product of one query row with the keys"


def test_a_tower_side_stage_alone(traced: Any) -> None:
    (found,) = cut(traced, "divprune", PATCHES // 2)
    assert (found.program, found.scans) == ("vision", 1)
    (tokens,) = (v for v in found.feed.values() if v.shape == (1, PATCHES, 64))
    features = next(r for r in run_graph(found.model, found.feed) if r.shape == (1, PATCHES // 2, 64))
    rows = {row.tobytes() for row in tokens[0]}
    assert all(row.tobytes() in rows for row in features[0]), "survivors are rows of what came in"


def test_a_cut_can_be_timed(traced: Any) -> None:
    (found,) = cut(traced, "fastv")
    assert 0 < open_cut(found, 1)() < 60


def test_classes() -> None:
    assert classify({"last_query_attention", "carried"}, 0) == "slice"
    assert classify({"last_query_attention"}, 1) == "greedy"
    assert classify({"tokens"}, 1) == "greedy"
    assert classify({"cls_attention", "keys"}, 0) == "other"
    assert classify({"tokens"}, 0) == "other"


def test_rows_that_look_at_frames_get_as_many_tokens() -> None:
    assert sizes_for(RECIPES["fastv"]) == Sizes(1)
    assert sizes_for(RECIPES["dycoke"]) == Sizes(FRAMES)
    for sizes in (Sizes(1), Sizes(FRAMES)):
        assert sizes.side**2 * sizes.images == TOKENS


def test_stages_and_prefill_run_in_turn() -> None:
    order: list[str] = []
    times = itertools.count(1)

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return seconds if next(times) > 11 else 1000.0  # the first turn warms up

    added, whole = interleave([lambda: run("a", 1.0), lambda: run("b", 2.0)], lambda: run("p", 100.0), 2)
    assert (added, whole) == (3.0, 100.0)
    assert "".join(order) == ("ab" * 5 + "p") * 3


def test_the_page_says_who_is_over_the_bar() -> None:
    slow = {**RECORD, "recipe": "slow", "class": "greedy", "share": 0.2, "scans": 1}
    other = {**RECORD, "recipe": "pairs", "class": "other", "share": 0.5}
    machine = {"cpu": "X", "cores": 2, "onnxruntime": "1", "threads": 2}
    report = {
        "machine": machine, "records": [slow, other, RECORD], "tokens": 1024, "kept": 128, "text_tokens": 64,
        "frames": 4, "tower_layers": 6,
    }  # fmt: skip
    rows = overhead_page.table_rows(report["records"])
    assert [line[0] for line in rows[1:]] == ["fastv", "slow", "pairs"], "the cheapest first"
    assert [line[3] for line in rows[1:]] == ["2 %", "10 %, **over**", "none"]
    text = overhead_page.write(report)
    assert "**Over the bar: slow.**" in text
    assert "All of them are within" in overhead_page.write({**report, "records": [RECORD, other]})


def test_a_stage_that_projects_again_brings_its_weights(traced: Any) -> None:
    (found,) = cut(traced, "pyramiddrop")
    (plain,) = cut(traced, "fastv")
    assert len(found.model) > len(plain.model) + 64 * 64 * 4, "projections of the next layer"


def test_stages_at_keep_one_are_still_there(traced: Any) -> None:
    recipe = replace(RECIPES["fastv"], name="mine")
    ids = make_ids(IMAGE, PATCHES)
    ids["input_ids"] = ids["input_ids"][:, 20:-20]
    ids["lengths"] = ids["lengths"] - 40
    (found,) = cut_stages(traced(), recipe, 1.0, ids)
    assert found.nodes > 10
