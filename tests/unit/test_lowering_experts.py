"""Experts as ONNX: every dialect computes what the operator does, with static shapes, and engines build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from secateur.compiler import ops
from secateur.compiler.experts import use_experts
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.lint import lint_graph
from secateur.exporters.onnx import export_program, save_model
from secateur.exporters.weights import Placed, WeightLayout
from secateur.passes.drop_noops import drop_noops

from .other_toolchains import run_in_openvino
from .tiny_experts import BLOCKS, LOADS, WIDTH, draw, make_block

NAMES = ("x", "indices", "weights", "gate_up", "down")
NOTHING = WeightLayout({}, b"", {})
SIZES = [(1, 8, 2), (3, 8, 3), (40, 8, 2), (200, 16, 3), (200, 4, 4), (300, 16, 8)]
"""Tokens, experts, experts per token: a step of decoding, one round, several rounds, blocks of one expert."""


def trace(tensors: tuple[Tensor, ...]) -> Program:
    return trace_function("experts", lambda *feed: ops.experts(*feed), dict(zip(NAMES, tensors, strict=True)), ("out",))


def run(model: ir.Model | Path, feed: Mapping[str, Tensor]) -> list[np.ndarray[Any, Any]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feed.items()})  # type: ignore[no-any-return]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("tokens", "experts", "chosen"), SIZES)
def test_every_dialect_computes_the_operator(dialect: str, tokens: int, experts: int, chosen: int) -> None:
    model = export_program(trace(draw(tokens, experts, chosen, "even")), DIALECTS[dialect], NOTHING)
    assert lint_graph(model, "plain", "fp32") == []
    for load in LOADS:
        tensors = draw(tokens, experts, chosen, load)
        (made,) = run(model, dict(zip(NAMES, tensors, strict=True)))
        torch.testing.assert_close(torch.from_numpy(made), ops.experts(*tensors))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("tokens", "experts", "chosen"), SIZES)
def test_every_shape_is_static_in_every_body(dialect: str, tokens: int, experts: int, chosen: int) -> None:
    model = export_program(trace(draw(tokens, experts, chosen, "even")), DIALECTS[dialect], NOTHING)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            assert value.shape is not None, node.name
            assert value.shape.is_static(), node.name
            assert value.dtype is not None, node.name


def test_stacked_weights_are_read_in_place() -> None:
    """No node but the scan touches a stack: one expert's weights are all that a step sees."""
    model = export_program(trace(draw(200, 4, 4, "even")), DIALECTS["onnxruntime"], NOTHING)
    for value in model.graph.inputs:
        if value.name in ("gate_up", "down"):
            assert {node.op_type for node in value.consumers()} == {"Scan"}


def test_a_plain_graph_copies_the_weights_of_experts_with_rows_only() -> None:
    """A step of its loop takes an expert's weights inside the branch that multiplies by them."""
    model = export_program(trace(draw(200, 4, 4, "even")), DIALECTS["plain"], NOTHING)
    for value in model.graph.inputs:
        if value.name in ("gate_up", "down"):
            assert {(node.op_type, node.graph.name) for node in value.consumers()} <= {  # type: ignore[union-attr]
                ("Gather", "then"), ("Gather", "else"),
            }  # fmt: skip


@pytest.mark.parametrize("dialect", ["onnxruntime-cuda", "tensorrt", "plain-unrolled"])
def test_graphs_without_loops(dialect: str) -> None:
    """On a GPU each step would wait for the host, and some toolchains have none."""
    for sizes in SIZES:
        model = export_program(trace(draw(*sizes, "even")), DIALECTS[dialect], NOTHING)
        assert not {node.op_type for node in model.graph.all_nodes()} & {"Loop", "Scan", "If"}


@pytest.mark.parametrize("dialect", ["plain", "plain-unrolled"])
@pytest.mark.parametrize(("tokens", "experts", "chosen"), SIZES)
def test_openvino_computes_the_operator(dialect: str, tokens: int, experts: int, chosen: int, tmp_path: Path) -> None:
    save_model(export_program(trace(draw(tokens, experts, chosen, "even")), DIALECTS[dialect], NOTHING),
               tmp_path / "experts.onnx")  # fmt: skip
    for load in LOADS:
        tensors = draw(tokens, experts, chosen, load)
        feed = {name: tensor.numpy() for name, tensor in zip(NAMES, tensors, strict=True)}
        (made,) = run_in_openvino(tmp_path / "experts.onnx", [feed])
        torch.testing.assert_close(torch.from_numpy(made["out"]), ops.experts(*tensors))


class Experts(nn.Module):
    """Stacked weights under the names a model gives them."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 8, 2), (30, 4, 2), (200, 16, 3)])
def test_weights_that_lie_turned(dialect: str, tokens: int, experts: int, chosen: int, tmp_path: Path) -> None:
    """Files may hold each expert's matrices as ``[D,2F]`` and ``[F,D]``: the graph multiplies by them as they lie."""
    x, indices, weights, gate_up, down = draw(tokens, experts, chosen, "uneven")
    module, feed = Experts(gate_up, down), {"x": x, "indices": indices, "weights": weights}
    program = trace_function(
        "experts", lambda *feed: ops.experts(*feed, module.gate_up, module.down), feed, ("out",), {"mlp": module}
    )
    places, data = {}, b""
    for name, tensor in (("mlp.gate_up", gate_up), ("mlp.down", down)):
        turned = tensor.mT.contiguous()
        raw = turned.numpy().tobytes()
        places[name] = Placed(tuple(turned.shape), torch.float32, len(data), len(raw), turned=True)
        data += raw
    (tmp_path / "weights.safetensors").write_bytes(data)
    model = export_program(program, DIALECTS[dialect], WeightLayout(places, b"", {}))
    save_model(model, tmp_path / "experts.onnx")
    (made,) = run(tmp_path / "experts.onnx", feed)
    torch.testing.assert_close(torch.from_numpy(made), ops.experts(x, indices, weights, gate_up, down))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_routers_choose_what_transformers_chooses(name: str, dialect: str) -> None:
    block, _ = make_block(name)
    hidden = torch.randn(2, 33, WIDTH, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = block(hidden)
    # Weights as inputs: the graph is whole without a file.
    names = {parameter: f"w{i}" for i, (parameter, _) in enumerate(block.named_parameters())}
    weights = {names[n]: p.detach() for n, p in block.named_parameters()}
    use_experts(block)

    def call(hidden: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, given, strict=True)), (hidden,))  # type: ignore[no-any-return]

    program = drop_noops(trace_function("block", call, {"hidden": hidden, **weights}, ("out",)))
    model = export_program(program, DIALECTS[dialect], NOTHING)
    (made,) = run(model, {"hidden": hidden, **weights})
    torch.testing.assert_close(torch.from_numpy(made), expected)


@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(2, 16, 4), (40, 8, 2), (200, 16, 3)])
def test_engines_build(tokens: int, experts: int, chosen: int, tmp_path: Path) -> None:
    """Gathered weights, a place for every row, and blocks."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    pytest.importorskip("polygraphy", reason="needs the extra tensorrt-rtx")
    from secateur.exporters.tensorrt import build_engine

    halves = [t.half() if t.is_floating_point() else t for t in draw(tokens, experts, chosen, "even")]
    model = export_program(trace(tuple(halves)), DIALECTS["tensorrt"], NOTHING)
    assert lint_graph(model, "tensorrt-rtx", "fp16", 89) == []
    save_model(model, tmp_path / "experts.onnx")
    assert build_engine(tmp_path / "experts.onnx", tmp_path / "experts.engine").warnings == ()
