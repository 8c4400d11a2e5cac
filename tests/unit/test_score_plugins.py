"""Score operators in graphs: one node through tracing and pruning, plain where there are no plugins, equal to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from secateur.compiler import pipeline, score_ops
from secateur.compiler.flops import count_flops
from secateur.compiler.function import trace_function
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.expand_scores import expand_scores
from secateur.exporters.lint import lint_graph, refuse
from secateur.exporters.onnx import Exported, export_program
from secateur.exporters.plugins.lowering import with_plugins
from secateur.exporters.plugins.table import pays
from secateur.exporters.weights import WeightLayout
from secateur.runtime.errors import UserError

PLUGINS = with_plugins(DIALECTS["tensorrt"])
LAST = torch.tensor([6, 3])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def heads(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors["query"], tensors["key"]


TABLE = torch.nn.functional.normalize(normal(2, 20, 5), dim=-1)
FEED = {
    "query": normal(2, 4, 9, 8), "key": normal(2, 2, 9, 8), "last": LAST,
    "table": TABLE @ TABLE.transpose(1, 2), "start": torch.tensor([3, 7]),
    "score": torch.rand(2, 20, generator=torch.Generator().manual_seed(1)),
}  # fmt: skip
CALLS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "received": lambda t: score_ops.received_attention(*heads(t), 0.3, True, t["last"]),
    "received_in_tower": lambda t: score_ops.received_attention(t["query"], t["query"], 0.3, False),
    "top": lambda t: score_ops.top_rows(t["score"], 6),
    "farthest": lambda t: score_ops.pick_by_fold(1.0 - t["table"], t["start"], None, 6, "farthest", 0.0),
    "sum": lambda t: score_ops.pick_by_fold(1.0 - t["table"], t["start"], None, 6, "sum", 0.0),
    "weighted": lambda t: score_ops.pick_by_fold(1.0 - t["table"], t["start"], t["score"], 6, "weighted", 0.0),
    "relevance": lambda t: score_ops.pick_by_fold(t["table"], t["start"], t["score"], 6, "relevance", 0.3),
    "coverage": lambda t: score_ops.pick_by_coverage(torch.relu(t["table"]), t["start"], t["score"], 6, True),
    "determinant": lambda t: score_ops.pick_by_determinant(t["table"], t["score"], 6),
}
NODES = {
    "received": ["RowLogSumExp", "ColumnSums"], "received_in_tower": ["RowLogSumExp", "ColumnSums"],
    "top": ["RankTake"], "coverage": ["PickByCoverage"], "determinant": ["PickByDeterminant"],
    **{name: ["PickByFold"] for name in ("farthest", "sum", "weighted", "relevance")},
}  # fmt: skip


def traced(name: str) -> Any:
    call = CALLS[name]
    return trace_function(name, lambda *given: call(dict(zip(FEED, given, strict=True))), FEED, ("out",))


def nodes(model: ir.Model, domain: str = "secateur") -> list[ir.Node]:
    return [n for n in model.graph.all_nodes() if n.domain == domain]


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_is_one_node_until_it_is_written_out(name: str) -> None:
    program = traced(name)
    assert sum(n.target in score_ops.PLAIN for n in program.graph.nodes) == 1
    plain = expand_scores(program)
    assert not [n for n in plain.graph.nodes if n.target in score_ops.PLAIN]
    feed = list(FEED.values())
    expected = CALLS[name](FEED)
    for found in (program.module(*feed)[0], plain.module(*feed)[0]):
        torch.testing.assert_close(found, expected)
    assert count_flops(program) == count_flops(plain)


@pytest.mark.parametrize("name", CALLS)
def test_the_plain_graph_computes_the_same_in_onnx_runtime(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = export_program(traced(name), DIALECTS["plain"], WeightLayout({}, b"", {}))
    assert not nodes(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {port.name for port in session.get_inputs()}
    (found,) = session.run(None, {n: t.numpy() for n, t in FEED.items() if n in wanted})
    torch.testing.assert_close(torch.from_numpy(found), CALLS[name](FEED), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_with_plugins_a_graph_has_nodes_tensorrt_takes_and_rtx_does_not(name: str) -> None:
    model = export_program(traced(name), PLUGINS, WeightLayout({}, b"", {}))
    found = nodes(model)
    assert [n.op_type for n in found] == NODES[name]
    assert not [n for n in model.graph.all_nodes() if n.op_type == "Scan"]
    for node in found:
        assert node.attributes.get_string("plugin_namespace") == "secateur"
        assert node.attributes.get_int("aot") == 1
    assert model.opset_imports["secateur"] == 1
    assert not [f for f in lint_graph(model, "tensorrt", "fp16", 89) if f.rule == "domain_is_known"]
    for target in ("tensorrt-rtx", "onnxruntime"):
        assert "domain_is_known" in {f.rule for f in lint_graph(model, target, "fp16", 89)}


def test_only_the_tensorrt_dialect_takes_plugins() -> None:
    from secateur.exporters.onnx import export_programs

    with pytest.raises(UserError, match="dialect plain has no plugins"):
        export_programs({}, "plain", WeightLayout({}, b"", {}), plugins=True)


def test_a_kernel_that_would_be_slower_is_written_out() -> None:
    assert pays("PickByFold", 20000, 2000)
    assert pays("PickByCoverage", 576, 64)
    assert not pays("PickByCoverage", 2880, 288)
    wide = torch.zeros(1, 2, 9, 300)
    program = trace_function("wide", lambda x: score_ops.received_attention(x, x, 0.1, False), {"x": wide}, ("out",))
    assert not nodes(export_program(program, PLUGINS, WeightLayout({}, b"", {})))


@pytest.mark.parametrize(("recipe", "expected"), [("divprune", ["PickByFold"]), ("fastv", ["RankTake"])])
def test_recipes_get_their_nodes(pruned: Callable[..., Any], recipe: str, expected: list[str]) -> None:
    from secateur.compiler.pipeline import export

    whole = pruned(recipe, dtype="fp16")
    with_nodes = export(whole, "tensorrt", plugins=True).models
    for model in with_nodes.values():
        refuse(lint_graph(model, "tensorrt", "fp16", 89))
    assert sorted(n.op_type for m in with_nodes.values() for n in nodes(m)) == expected
    assert not [n for m in export(whole, "tensorrt").models.values() for n in nodes(m)]


def test_nothing_imports_triton_unless_kernels_are_wanted() -> None:
    program = (
        "import sys, secateur.compiler.pipeline, secateur.exporters.plugins.register;"
        "from secateur.exporters.plugins import lowering, table, launch;"
        "assert 'triton' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if TensorRT and a GPU of architecture 90 were here; the architectures that kernels are registered for."""
    registered: list[int] = []
    library = SimpleNamespace(trt=SimpleNamespace(__version__="11.4.0"))
    monkeypatch.setattr(pipeline.tensorrt, "check_target", lambda *_, **__: (90,))
    monkeypatch.setattr(pipeline.tensorrt, "check_machine", lambda _: None)
    monkeypatch.setattr(pipeline.tensorrt, "load_library", lambda _: library)
    monkeypatch.setattr(pipeline, "check_library", lambda *_: None)
    monkeypatch.setattr("secateur.exporters.plugins.register.register_plugins", registered.append)
    return registered


def test_the_option_puts_kernels_into_the_graphs_that_engines_are_built_of(
    gpu_here: list[int], model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Exported] = []
    monkeypatch.setattr(pipeline, "build", lambda pruned, exported, *_, **__: built.extend(exported))
    options = pipeline.EngineOptions(score_plugins=True)
    pipeline.compile(model_dir(), tmp_path / "out", recipe="divprune", target="tensorrt", engines=options)
    assert gpu_here == [90]
    nodes = {node.op_type for node in built[0].models["vision"].graph.all_nodes() if node.domain == "secateur"}
    assert nodes == {"PickByFold"}


def test_engines_for_every_gpu_get_kernels_that_all_can_run(gpu_here: list[int]) -> None:
    options = pipeline.EngineOptions(score_plugins=True, hardware_compatible=True)
    pipeline.check_target("tensorrt", "fp16", None, engines=options)
    assert gpu_here == [80]


def test_kernels_for_an_unknown_gpu(gpu_here: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.tensorrt, "check_target", lambda *_, **__: ())
    with pytest.raises(UserError) as caught:
        pipeline.check_target("tensorrt", "fp16", None, engines=pipeline.EngineOptions(score_plugins=True))
    assert str(caught.value) == (
        "--score-plugins: kernels are compiled for the GPU's architecture, which is not known here; pip install "
        "'secateur[tensorrt]', whose cuda-python asks the GPU, or leave it out"
    )
    assert gpu_here == []
