"""Engines from small graphs, built by TensorRT-RTX without a GPU; skipped where the library is missing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from secateur.compiler import ops
from secateur.compiler.function import trace_function
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import export_program, save_model
from secateur.exporters.tensorrt import EngineOptions, build_engine, parsed_layer_types, parsed_layers
from secateur.exporters.weights import WeightLayout
from secateur.runtime.backends.engine_file import RtxHeader, check_engine_file, read_rtx_header
from secateur.runtime.errors import SecateurError, UserError

pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
pytest.importorskip("polygraphy", reason="needs the extra tensorrt-rtx")

DECODE = """<ir_version: 11, opset_import: ["" : 24]>
g (float16[2,4,1,64] q, float16[2,2,1,64] k, float16[2,2,1,64] v, float16[2,1,32] cos, float16[2,1,32] sin,
   float16[2,2,8,64] past_key, float16[2,2,8,64] past_value, int64[2] slot, bool[2,1,1,8] mask, float16[64] w)
=> (float16[2,4,1,64] y, float16[2,2,8,64] present_key, float16[2,2,8,64] present_value)
{
  [norm] n = RMSNormalization <stash_type=1> (q, w)
  [rope_q] rq = RotaryEmbedding (n, cos, sin)
  [rope_k] rk = RotaryEmbedding (k, cos, sin)
  [write_k] present_key = TensorScatter (past_key, rk, slot)
  [write_v] present_value = TensorScatter (past_value, v, slot)
  [attend] y = Attention <scale=0.125> (rq, present_key, present_value, mask)
}"""


def save(directory: Path, text: str) -> Path:
    path = directory / "decode.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_the_dialect_becomes_fused_layers(tmp_path: Path) -> None:
    graph = save(tmp_path, DECODE)
    fused = {"ATTENTION_INPUT": 1, "KV_CACHE_UPDATE": 2, "RMS_NORMALIZATION": 1, "ROTARY_EMBEDDING": 2}
    types = parsed_layer_types(graph)
    assert {name: types[name] for name in fused} == fused
    by_node = {layer.node: layer.type for layer in parsed_layers(graph)}
    assert by_node["rope_k"] == "ROTARY_EMBEDDING"
    assert by_node["norm"] == "RMS_NORMALIZATION"


def test_an_engine_is_built_with_progress(tmp_path: Path) -> None:
    graph = save(tmp_path, DECODE)
    told: list[tuple[str, int, int]] = []
    info = build_engine(graph, tmp_path / "one.engine", progress=lambda *step: told.append(step))
    size = (tmp_path / "one.engine").stat().st_size
    assert (info.flavour, info.sms, info.bytes) == ("tensorrt-rtx", (89,), size)
    assert dict(info.layer_types)["KV_CACHE_UPDATE"] == 2
    assert info.warnings == ()
    assert str(info).startswith("one.engine: tensorrt-rtx ")
    assert told[0][0] == told[-1][0] == "Building engine"
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.onnx", "one.engine"]


@pytest.mark.parametrize(("capacity", "rows"), [(24512, 1), (24513, 2)])
def test_a_step_over_a_very_long_cache_is_sent_twice(capacity: int, rows: int, tmp_path: Path) -> None:
    """And is built then; once, the library has no kernel for it."""

    def step(*given: torch.Tensor) -> Any:
        return ops.cached_attention(*given, False, 0.125)

    sizes = {"q": 1, "k": 1, "v": 1, "past_key.0": capacity, "past_value.0": capacity}
    feed = {name: torch.zeros(1, 4, size, 64).half() for name, size in sizes.items()} | {"start": torch.zeros(1).long()}
    traced = trace_function("decode", step, feed, ("y", "present_key.0", "present_value.0"))
    model = export_program(traced, DIALECTS["tensorrt"], WeightLayout({}, b"", {}))
    attends = next(node for node in model.graph if node.op_type == "Attention")
    assert attends.inputs[0].shape[2] == rows  # type: ignore[union-attr,index]
    save_model(model, tmp_path / "decode.onnx")
    assert build_engine(tmp_path / "decode.onnx", tmp_path / "decode.engine").bytes


@pytest.mark.parametrize(("asked", "sms", "shown"), [(75, (75,), "SM75"), ((120, 86), (86, 120), "SM86, SM120")])
def test_other_architectures(tmp_path: Path, asked: int | tuple[int, ...], sms: tuple[int, ...], shown: str) -> None:
    """Also that the header, whose layout is not documented, is where the runtime looks for it."""
    path = tmp_path / "decode.engine"
    info = build_engine(save(tmp_path, DECODE), path, sm=asked)
    assert info.sms == sms
    assert f", {shown}, " in str(info)
    version = tuple(int(part) for part in info.version.split("."))
    assert read_rtx_header(path) == RtxHeader(info.bytes, version, sms)  # type: ignore[arg-type]  # four numbers
    for sm in sms:
        check_engine_file(path, "here", "tensorrt-rtx", info.version, sm)


def test_workspace_and_level_reach_the_builder(tmp_path: Path) -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]> g (float16[1,3,32,32] x, float16[32,3,8,8] w)
    => (float16[1,32,4,4] y) { y = Conv <kernel_shape=[8,8], strides=[8,8]> (x, w) }"""
    graph = save(tmp_path, text)
    assert build_engine(graph, tmp_path / "one.engine", options=EngineOptions(workspace=1 << 26, opt_level=0)).bytes
    with pytest.raises(SecateurError, match=r"workspace size if applicable.*; give more --workspace"):
        build_engine(graph, tmp_path / "two.engine", options=EngineOptions(workspace=1))


def test_weights_are_read_from_the_file_beside_the_graph(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    (tmp_path / "weights.safetensors").write_bytes(b"\0" * 1007 + weight.tobytes())
    external = ir.ExternalTensor(
        "weights.safetensors", 1007, weight.nbytes, ir.DataType.FLOAT16, name="w", shape=ir.Shape(weight.shape),
        base_dir=tmp_path,
    )  # fmt: skip
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float16[4,64] x) => (float16[4,64] y)'
        " { y = Gemm <transB=1>(x, w) }",
        initializers=[external],
    )
    graph = tmp_path / "vision.onnx"
    ir.save(model, graph)
    assert build_engine(graph, tmp_path / "vision.engine").weights == ()  # too small to be an input
    assert weight.tobytes() in (tmp_path / "vision.engine").read_bytes()
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(SecateurError, match=r"does not take the graph: Failed to open file: .*weights\.safetensors"):
        build_engine(graph, tmp_path / "again.engine")


def test_graphs_the_parser_rejects(tmp_path: Path) -> None:
    graph = save(tmp_path, DECODE.replace("scale=0.125", "scale=0.125, softcap=30.0"))
    with pytest.raises(SecateurError) as caught:
        build_engine(graph, tmp_path / "decode.engine")
    assert str(caught.value) == (
        f"{graph}: attend (Attention): tensorrt-rtx does not take the graph: "
        "Setting softcap is not supported in TensorRT Attention."
    )


def test_graphs_the_parser_finds_inconsistent(tmp_path: Path) -> None:
    graph = save(tmp_path, DECODE.replace("float16[2,1,32] cos", "float16[2,3,32] cos"))
    with pytest.raises(SecateurError, match=r"rope_q \(RotaryEmbedding\): .*cosCache has sequence length 3") as caught:
        build_engine(graph, tmp_path / "decode.engine")
    assert "\n" not in str(caught.value)
    assert "/_src" not in str(caught.value)


def test_graphs_the_builder_rejects(tmp_path: Path) -> None:
    graph = save(
        tmp_path,
        """<ir_version: 11, opset_import: ["" : 23]> g (float[1,5000] x) => (float[1,3841] v, int64[1,3841] i)
        { k = Constant <value_ints=[3841]> () [rank] v, i = TopK (x, k) }""",
    )
    with pytest.raises(SecateurError, match=r"tensorrt-rtx builds no engine: .*K exceeds the maximum value allowed"):
        build_engine(graph, tmp_path / "decode.engine")
    assert not (tmp_path / "decode.engine").exists()


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    (tmp_path / "decode.onnx").write_bytes(b"not a graph")
    with pytest.raises(SecateurError, match=r"decode\.onnx: tensorrt-rtx does not take the graph: Failed to parse"):
        build_engine(tmp_path / "decode.onnx", tmp_path / "decode.engine")
    with pytest.raises(UserError, match=r"nothing\.onnx: no such file"):
        build_engine(tmp_path / "nothing.onnx", tmp_path / "decode.engine")


def test_a_failing_callback_stops_the_build(tmp_path: Path) -> None:
    def progress(phase: str, step: int, steps: int) -> None:
        raise RuntimeError("the terminal went away")

    with pytest.raises(RuntimeError, match="the terminal went away"):
        build_engine(save(tmp_path, DECODE), tmp_path / "decode.engine", progress=progress)
    assert not (tmp_path / "decode.engine").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_build(tmp_path: Path, number: signal.Signals) -> None:
    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    def progress(phase: str, step: int, steps: int) -> None:
        os.kill(os.getpid(), number)

    before = signal.signal(number, end)
    try:
        with pytest.raises(KeyboardInterrupt, match=number.name):
            build_engine(save(tmp_path, DECODE), tmp_path / "decode.engine", progress=progress)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
    assert not (tmp_path / "decode.engine").exists()
