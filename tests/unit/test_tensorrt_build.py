"""Engines from small graphs, built by TensorRT-RTX without a GPU; skipped where the library is missing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from secateur.exporters.tensorrt import build_engine, parsed_layer_types, parsed_layers
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
    assert (info.flavour, info.sm, info.bytes) == ("tensorrt-rtx", 89, size)
    assert dict(info.layer_types)["KV_CACHE_UPDATE"] == 2
    assert info.warnings == ()
    assert str(info).startswith("one.engine: tensorrt-rtx ")
    assert told[0][0] == told[-1][0] == "Building engine"
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.onnx", "one.engine"]


@pytest.mark.parametrize("sm", [75, 120])
def test_other_architectures(tmp_path: Path, sm: int) -> None:
    """Also that the header, whose layout is not documented, is where the runtime looks for it."""
    path = tmp_path / "decode.engine"
    info = build_engine(save(tmp_path, DECODE), path, sm=sm)
    assert info.sm == sm
    version = tuple(int(part) for part in info.version.split("."))
    assert read_rtx_header(path) == RtxHeader(info.bytes, version, (sm,))  # type: ignore[arg-type]  # four numbers
    check_engine_file(path, "here", "tensorrt-rtx", info.version, sm)


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
    build_engine(graph, tmp_path / "vision.engine")
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


def test_an_interrupt_stops_the_build(tmp_path: Path) -> None:
    def progress(phase: str, step: int, steps: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(save(tmp_path, DECODE), tmp_path / "decode.engine", progress=progress)
    assert not (tmp_path / "decode.engine").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
