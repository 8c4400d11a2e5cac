"""Greedy selectors in every dialect: as a loop or with steps written out, equal to the scan, and built beside attention
by TensorRT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from secateur.compiler.forecast import engine_bytes
from secateur.compiler.function import trace_function
from secateur.compiler.geometry import Geometry
from secateur.compiler.pipeline import export, prune, read_source, trace_model
from secateur.exporters.checkpoint import Checkpoint
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.lint import lint_graph
from secateur.exporters.onnx import export_program, save_model
from secateur.exporters.tensorrt import EngineOptions, build_engine
from secateur.exporters.weights import WEIGHTS_FILE, WeightLayout, write_weights
from secateur.passes.drop_noops import drop_noops
from secateur.passes.methods.select import max_min
from secateur.passes.methods.select_greedy import coverage, determinant
from secateur.passes.recipes import RECIPES

from . import tiny_model
from .other_toolchains import run_in_openvino

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

CHOOSE = {
    "coverage": lambda tokens, score, k: coverage(tokens, score, k).keep,
    "determinant": lambda tokens, score, k: determinant(tokens, score, k).keep,
    "max_min": lambda tokens, _score, k: max_min(tokens, k).keep,
}
FORMS = {
    "onnxruntime": {"Scan": 1}, "onnxruntime-cuda": {"Scan": 1}, "plain": {"Loop": 1}, "plain-unrolled": {},
    "tensorrt": {},
}  # fmt: skip
"""Control flow of every dialect."""
NOTHING = WeightLayout({}, b"", {})


def export_stage(name: str, k: int, feed: dict[str, torch.Tensor], dialect: str) -> ir.Model:
    traced = trace_function(name, lambda tokens, score: (CHOOSE[name](tokens, score, k),), feed, ("keep",))
    return export_program(drop_noops(traced), DIALECTS[dialect], NOTHING)


def run(model: ir.Model, feed: dict[str, torch.Tensor]) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {port.name for port in session.get_inputs()}
    (keep,) = session.run(None, {name: value.numpy() for name, value in feed.items() if name in wanted})
    return np.asarray(keep)


@pytest.mark.parametrize("k", [2, 17, 40])
@pytest.mark.parametrize("name", CHOOSE)
def test_every_dialect_chooses_what_the_scan_chooses(name: str, k: int) -> None:
    draw = torch.Generator().manual_seed(k)
    feed = {"tokens": torch.randn(2, 41, 8, generator=draw), "score": torch.rand(2, 41, generator=draw)}
    expected = CHOOSE[name](*feed.values(), k).numpy()
    for dialect, how in FORMS.items():
        made = export_stage(name, k, feed, dialect)
        count = Counter(node.op_type for node in made.graph.all_nodes())
        assert {op: count[op] for op in ("Scan", "Loop") if count[op]} == how, dialect
        if not how:
            assert count["ArgMax"] in (k, k - 1), "one a step; where one token is the start, one fewer"
        assert np.array_equal(run(made, feed), expected), dialect


@pytest.mark.parametrize("name", CHOOSE)
def test_openvino_chooses_what_the_scan_chooses(name: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    feed = {"tokens": torch.randn(2, 41, 8, generator=draw), "score": torch.rand(2, 41, generator=draw)}
    for dialect in ("plain", "plain-unrolled"):
        save_model(export_stage(name, 17, feed, dialect), tmp_path / "stage.onnx")
        (made,) = run_in_openvino(tmp_path / "stage.onnx", [{n: v.numpy() for n, v in feed.items()}])
        assert np.array_equal(made["keep"], CHOOSE[name](*feed.values(), 17).numpy()), dialect


def test_rows_of_the_scan_are_taken_in_the_loop_only_where_they_are_read(tmp_path: Path) -> None:
    """Most selectors count steps only."""
    feed = {"tokens": torch.randn(2, 41, 8), "score": torch.rand(2, 41)}
    for name, read in {"max_min": 0, "determinant": 1}.items():
        (loop,) = [n for n in export_stage(name, 17, feed, "plain").graph if n.op_type == "Loop"]
        body = loop.attributes["body"].as_graph()
        assert sum(body.inputs[0] in node.inputs for node in body) == read, name


@pytest.mark.parametrize("recipe", ["scope", "divprune"])
def test_more_steps_than_tensorrt_unrolls_are_built_beside_attention(recipe: str, tmp_path: Path) -> None:
    """As a loop, the first fails in a check of the library and the second ends the process: weights of a tower this
    wide are inputs."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "image_size": 64}
    vision = tiny_model.make_config()["vision_config"] | sizes
    source = read_source(tiny_model.write_model(tmp_path / "model", layers=1, vision_config=vision))
    traced = trace_model(source, Geometry(text_tokens=16, new_tokens=4), "fp16")
    exported = export(prune(traced, RECIPES[recipe], 0.5), "tensorrt")
    write_weights(exported.layout, Checkpoint(source.path, traced.model), tmp_path / WEIGHTS_FILE)
    save_model(exported.models["vision"], tmp_path / "vision.onnx")
    assert lint_graph(exported.models["vision"], "tensorrt-rtx", "fp16") == []
    built = build_engine(tmp_path / "vision.onnx", tmp_path / "vision.engine", options=EngineOptions(weights="inputs"))
    assert built.warnings == ()
    assert engine_bytes("vision", exported.models["vision"].graph, "inputs") == pytest.approx(built.bytes, rel=0.2)
