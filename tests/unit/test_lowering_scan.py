"""Greedy selectors for TensorRT: every step written out, equal to the scan, and built beside attention."""

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

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

CHOOSE = {
    "coverage": lambda tokens, score, k: coverage(tokens, score, k).keep,
    "determinant": lambda tokens, score, k: determinant(tokens, score, k).keep,
    "max_min": lambda tokens, _score, k: max_min(tokens, k).keep,
}
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
def test_steps_written_out_choose_what_the_scan_chooses(name: str, k: int) -> None:
    draw = torch.Generator().manual_seed(k)
    feed = {"tokens": torch.randn(2, 41, 8, generator=draw), "score": torch.rand(2, 41, generator=draw)}
    looped, written = (export_stage(name, k, feed, dialect) for dialect in ("plain", "tensorrt"))
    count = Counter(node.op_type for node in written.graph.all_nodes())
    assert "Scan" not in count
    assert count["ArgMax"] in (k, k - 1), "one a step; where one token is the start, one fewer"
    assert (run(looped, feed) == run(written, feed)).all()
    assert np.array_equal(run(written, feed), CHOOSE[name](*feed.values(), k).numpy())


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
