"""Selection and sorting beyond what TensorRT's TopK gives: the same tokens as torch keeps, ties included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from secateur.compiler.function import trace_function
from secateur.compiler.plan_recipe import plan_recipe
from secateur.exporters import lowering_sorting
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.lint import lint_graph
from secateur.exporters.onnx import export_program, save_model
from secateur.exporters.weights import WeightLayout
from secateur.passes.drop_noops import drop_noops
from secateur.passes.methods.rows import ranks
from secateur.passes.methods.select import top_k
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import stage_function

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

N, K = 20_000, 8_000


def exported(function: Callable[[Tensor], tuple[Tensor, ...]], like: Tensor, dialect: str = "tensorrt") -> ir.Model:
    names = [f"y{i}" for i in range(len(function(like)))]
    program = trace_function("stage", function, {"x": like}, names)
    return export_program(drop_noops(program), DIALECTS[dialect], WeightLayout({}, b"", {}))


def run(model: ir.Model, x: Tensor) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"x": x.numpy()})
    return found


def draw(kind: str, groups: int = 2, count: int = N) -> Tensor:
    x = torch.randn(groups, count, generator=torch.Generator().manual_seed(3))
    if kind == "ties":
        return (x * 4).round() / 4
    if kind == "infinite":
        x[:, ::3] = -torch.inf
        x[:, 1::7] = torch.inf
    if kind == "equal":
        x[:] = 1.0
    return x


def kept(score: Tensor, k: int) -> Tensor:
    """torch leaves the choice among equal scores open in topk, but not in a stable sort."""
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


@pytest.fixture(scope="module")
def selection() -> ir.Model:
    return exported(lambda x: (top_k(x, K).keep,), draw("random"))


@pytest.mark.parametrize("kind", ["random", "ties", "infinite", "equal"])
def test_as_many_tokens_as_torch_keeps(kind: str, selection: ir.Model) -> None:
    score = draw(kind)
    (found,) = run(selection, score)
    assert np.array_equal(found, kept(score, K).numpy())


def test_other_dialects_keep_topk(selection: ir.Model) -> None:
    plain = exported(lambda x: (top_k(x, K).keep,), draw("random"), "plain")
    assert [node.op_type for node in plain.graph] == ["TopK", "TopK"]
    assert [found.rule for found in lint_graph(plain, "tensorrt-rtx", "fp16")] == ["topk_is_within_limit"] * 2
    assert lint_graph(selection, "tensorrt-rtx", "fp16") == []


def test_a_stage_of_a_paper_at_that_size() -> None:
    """FastV's, whose score is what the last row attends to."""
    plan = plan_recipe(
        RECIPES["fastv"], keep=K / N, images=1, tokens_per_image=N, vision_layers=9, decoder_layers=32, grid=(100, 200)
    )
    stage = stage_function(plan.stages[0])
    assert (stage.planned.length_in, stage.planned.length_out) == (N, K)
    (signal,) = stage.signals
    attention = torch.stack([draw("ties", 4), draw("random", 4)]).softmax(dim=-1)
    model = exported(lambda x: (stage({signal: x}).keep,), attention)
    assert np.array_equal(run(model, attention)[0], kept(stage.score({signal: attention}), K).numpy())


def test_it_builds_without_a_warning(selection: ir.Model, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    from secateur.exporters.tensorrt import build_engine

    save_model(selection, tmp_path / "stage.onnx")
    info = build_engine(tmp_path / "stage.onnx", tmp_path / "stage.engine")
    assert info.warnings == ()
    assert dict(info.layer_types)["TOPK"] == 4  # 20,000 in five runs and one shorter, 8,000 in three of which one is


@pytest.mark.parametrize("count", [7, 13, 24, 25, 64])
@pytest.mark.parametrize("largest", [True, False])
def test_every_number_of_runs(count: int, largest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and places along any axis, over floats and whole numbers, with a limit of six."""
    monkeypatch.setattr(lowering_sorting, "TOPK_LIMIT", 6)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        best = x.topk(7, dim=1, largest=largest)
        whole = (x * 8).to(torch.int64).sort(dim=1, descending=largest, stable=True)
        return best.values, whole.values, whole.indices, x.argsort(dim=1, descending=largest, stable=True)

    x = (torch.randn(2, count, 3, generator=torch.Generator().manual_seed(count)) * 2).round() / 2
    found = run(exported(function, x), x)
    for own, theirs in zip(found, function(x), strict=True):
        assert np.array_equal(own, theirs.numpy())
    plain = run(exported(function, x, "plain"), x)
    assert all(np.array_equal(own, theirs) for own, theirs in zip(found, plain, strict=True))


def test_ranks_beyond_the_limit() -> None:
    score = draw("ties", count=5000)
    model = exported(lambda x: (ranks(x),), score)
    assert lint_graph(model, "tensorrt-rtx", "fp16") == []
    assert np.array_equal(run(model, score)[0], ranks(score).numpy())
