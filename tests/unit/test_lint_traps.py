"""What the linter says of backends is what they do: each trap given to the library itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from secateur.exporters.lint import lint_graph
from secateur.exporters.lint_rules import GRAPH_RULES, NODE_RULES, TENSORRT
from secateur.exporters.lint_sizes import SIZED_BY_INPUTS, SIZED_BY_VALUES
from secateur.exporters.onnx import save_model
from secateur.exporters.tensorrt import build_engine
from secateur.runtime.errors import SecateurError

from .lint_traps import ATTENTION_SHAPES, BROKEN, attend, graph

RULES = {rule.name: rule for rule in (*GRAPH_RULES, *NODE_RULES)}
CRASHES = {"attention_keys_are_not_its_queries", "scan_has_an_input"}
"""Given to the parser or the builder, they end the process."""

REFUSAL = r"does not take the graph|builds no engine"

LEFT_OPEN = {
    "Compress": ("float[8] x, bool[8] s", "float[n] y", "y = Compress <axis=0> (x, s)"),
    "NonZero": ("float[2,8] x", "int64[2,n] y", "y = NonZero (x)"),
    "Unique": ("float[8] x", "float[n] y", "y = Unique (x)"),
    "ConstantOfShape": ("int64[1] s", "float[n] y", "y = ConstantOfShape (s)"),
    "Expand": ("float[2,1] x, int64[2] s", "float[2,n] y", "y = Expand (x, s)"),
    "OneHot": ("int64[2] x, int64 s, float[2] v", "float[2,n] y", "y = OneHot (x, s, v)"),
    "Pad": ("float[2] x, int64[2] s", "float[n] y", "y = Pad (x, s)"),
    "Range": ("int64 a, int64 s, int64 d", "int64[n] y", "y = Range (a, s, d)"),
    "Reshape": ("float[2,8] x, int64[2] s", "float[n,m] y", "y = Reshape (x, s)"),
    "Slice": ("float[2,8] x, int64[1] s, int64[1] e", "float[n,8] y", "y = Slice (x, s, e)"),
    "Tile": ("float[2] x, int64[1] s", "float[n] y", "y = Tile (x, s)"),
    "TopK": ("float[2,8] x, int64[1] s", "float[2,n] y, int64[2,n] i", "y, i = TopK (x, s)"),
}


@pytest.mark.parametrize("rule", sorted(set(BROKEN) - CRASHES))
def test_tensorrt_refuses_what_the_linter_says_it_refuses(rule: str, tmp_path: Path) -> None:
    """And takes, without refusing, what is said to be computed wrongly, slowly or at a risk."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    assert set(TENSORRT) <= set(RULES[rule].targets)
    save_model(graph(*BROKEN[rule]), tmp_path / "trap.onnx")
    if RULES[rule].effect == "refused":
        with pytest.raises(SecateurError, match=REFUSAL):
            build_engine(tmp_path / "trap.onnx", tmp_path / "trap.engine")
    else:
        build_engine(tmp_path / "trap.onnx", tmp_path / "trap.engine")


@pytest.mark.parametrize("rule", sorted(CRASHES))
def test_tensorrt_crashes_over_what_the_linter_says_it_does(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    save_model(graph(*BROKEN[rule]), tmp_path / "trap.onnx")
    script = "import sys; from secateur.exporters.tensorrt import build_engine; build_engine(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(tmp_path / "trap.onnx"), str(tmp_path / "trap.engine")]
    assert subprocess.run(command, capture_output=True).returncode < 0, "ended by a signal"


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_tensorrt_has_the_kernels_the_linter_says_it_has(shape: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    save_model(attend(shape), tmp_path / "shape.onnx")
    if ATTENTION_SHAPES[shape]:
        build_engine(tmp_path / "shape.onnx", tmp_path / "shape.engine")
    else:
        with pytest.raises(SecateurError, match="builds no engine"):
            build_engine(tmp_path / "shape.onnx", tmp_path / "shape.engine")


@pytest.mark.parametrize("op", LEFT_OPEN)
def test_sizes_that_only_a_run_decides(op: str, tmp_path: Path) -> None:
    assert op in (*SIZED_BY_VALUES, *SIZED_BY_INPUTS)
    model = graph(*LEFT_OPEN[op])
    assert [found.rule for found in lint_graph(model, "tensorrt-rtx", "fp16")] == ["sizes_are_fixed"]
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    save_model(model, tmp_path / "trap.onnx")
    with pytest.raises(SecateurError, match=REFUSAL):
        build_engine(tmp_path / "trap.onnx", tmp_path / "trap.engine")


def test_sizes_that_follow_from_sizes_are_fixed(tmp_path: Path) -> None:
    body = (
        "size = Shape (x) turn = Constant <value_ints=[1, 0]> () turned = Gather (size, turn) y = Reshape (x, turned)"
    )
    model = graph("float[2,8] x", "float[8,2] y", body)
    assert lint_graph(model, "tensorrt-rtx", "fp16") == []
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    save_model(model, tmp_path / "sized.onnx")
    assert build_engine(tmp_path / "sized.onnx", tmp_path / "sized.engine").warnings == ()


def test_tensorrt_keeps_ports_of_int64(tmp_path: Path) -> None:
    """Why there is no rule against them."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    body = "index = ArgMax <axis=1> (x) y = Add (index, ids)"
    model = graph("float[2,8] x, int64[2,1] ids", "int64[2,1] y", body)
    assert lint_graph(model, "tensorrt-rtx", "fp16") == []
    save_model(model, tmp_path / "ids.onnx")
    assert build_engine(tmp_path / "ids.onnx", tmp_path / "ids.engine").warnings == ()


def test_the_list_of_what_the_parser_does_not_know_is_the_parsers() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    from secateur.exporters.lint_operators import UNPARSED

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    parser = trt.OnnxParser(builder.create_network(), trt.Logger(trt.Logger.ERROR))
    from onnx import defs

    operators = {schema.name for schema in defs.get_all_schemas() if schema.domain == ""}
    unknown = {name for name in operators if not parser.supports_operator(name)}
    assert unknown - set(SIZED_BY_VALUES) == set(UNPARSED)


WEIGHTS = np.arange(64, dtype=np.float32).reshape(8, 8)


def point(directory: Path, location: str) -> Path:
    """A graph whose weights lie at ``location``."""
    tensor = ir.ExternalTensor(location, 0, WEIGHTS.nbytes, ir.DataType.FLOAT, name="w", shape=ir.Shape([8, 8]))
    x = ir.Value(name="x", shape=ir.Shape([2, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", shape=ir.Shape([8, 8]), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    node = ir.Node("", "Gemm", [x, w])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", ir.Shape([2, 8]), x.type
    made = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], name="g", opset_imports={"": 23})
    save_model(ir.Model(made, ir_version=10), directory / "g.onnx")
    return directory / "g.onnx"


@pytest.mark.parametrize(
    ("location", "what"),
    [
        ("whole.bin", ""),
        ("hard.bin", ""),
        ("within.bin", ""),
        ("leaving.bin", "weights leaving.bin are a symbolic link that leaves the graph's directory"),
        ("../whole.bin", "weights lie at ../whole.bin, outside the graph's directory"),
        ("nowhere.bin", "weights nowhere.bin are not there"),
        ("short.bin", "weights short.bin end at byte 3 of 256"),
    ],
)
def test_weights_beside_the_graph(location: str, what: str, tmp_path: Path) -> None:
    from secateur.exporters.lint_files import lint_path

    (tmp_path / "whole.bin").write_bytes(WEIGHTS.tobytes())
    home = tmp_path / "model"
    home.mkdir()
    (home / "whole.bin").write_bytes(WEIGHTS.tobytes())
    (home / "short.bin").write_bytes(b"abc")
    os.link(tmp_path / "whole.bin", home / "hard.bin")
    (home / "within.bin").symlink_to("whole.bin")
    (home / "leaving.bin").symlink_to(tmp_path / "whole.bin")
    path = point(home, location)
    (linted,) = lint_path(path, "onnxruntime")
    assert [found.what for found in linted.findings] == ([what] if what else [])
    # TensorRT follows links, the one backend that does.
    (engine,) = lint_path(path, "tensorrt-rtx")
    assert [found.what for found in engine.findings] == ([what] if what and "link" not in what else [])
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if what:
        with pytest.raises(runtime.capi.onnxruntime_pybind11_state.Fail):
            runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    else:
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_onnxruntime_refuses_what_the_linter_says_it_refuses() -> None:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    floats = "float[1,4,8,64] q, float[1,2,8,64] k, float[1,2,8,64] v, float[1,2,8,64] a, float[1,2,8,64] b, int64[1] n"
    both = graph(floats, "float[1,4,8,64] y, float[1,2,16,64] pk, float[1,2,16,64] pv",
                 "y, pk, pv = Attention (q, k, v, , a, b, n)")  # fmt: skip
    assert "nonpad_excludes_past" in [found.rule for found in lint_graph(both, "onnxruntime", "fp32")]
    half = graph("bfloat16[2,8] x, bfloat16[8,8] w", "bfloat16[2,8] y", "y = Gemm (x, w)")
    assert [found.rule for found in lint_graph(half, "onnxruntime", "bf16")] == ["bf16_needs_kernels"]
    for model in (both, half):
        text = ir.to_proto(model).SerializeToString()
        with pytest.raises(Exception, match=r"nonpad_kv_seqlen|NOT_IMPLEMENTED"):
            runtime.InferenceSession(text, options, providers=["CPUExecutionProvider"]).run(None, feed(model))


def feed(model: ir.Model) -> dict[str, np.ndarray]:
    return {v.name: np.ones(v.shape.numpy(), v.dtype.numpy()) for v in model.graph.inputs}  # type: ignore[union-attr]
