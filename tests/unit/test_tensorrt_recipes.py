"""Recipes' programs through TensorRT-RTX without a GPU: fused alike in all layers, and buildable.

One row of each kind, and a seeded few of `make test-matrix`'s engines, which builds those of all rows.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.matrix.cells import OTHERS, Cell, sample_engines
from tests.matrix.layouts import LAYOUTS
from tests.matrix.work import Workshop, run_cell

from secateur.compiler.geometry import Geometry
from secateur.compiler.pipeline import export, prune
from secateur.compiler.trace import Traced, read_source, trace_model
from secateur.exporters.checkpoint import Checkpoint
from secateur.exporters.lint import lint_graph
from secateur.exporters.onnx import save_model
from secateur.exporters.tensorrt import build_engine, parsed_layers
from secateur.exporters.weights import WEIGHTS_FILE, write_weights
from secateur.passes.recipes import RECIPES

from .tiny_model import write_model

pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
pytest.importorskip("polygraphy", reason="needs the extra tensorrt-rtx")
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

LAYERS = 4
FUSED = ("ATTENTION_INPUT", "ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "RMS_NORMALIZATION", "ROTARY_EMBEDDING")
ROWS = ("none", "random", "fastv", "pyramiddrop", "fastervlm", "divprune", "visionzip", "seats")
SAMPLE = sample_engines([row for name, row in RECIPES.items() if name not in ROWS], LAYOUTS, seed=2026)
_built: set[str] = set()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    directory = write_model(tmp_path_factory.mktemp("model"), layers=LAYERS, dtype=torch.float16)
    return trace_model(read_source(directory), Geometry(batch=2, images=1, text_tokens=12, new_tokens=8), "fp16")


@pytest.mark.parametrize("name", ROWS)
def test_recipe_builds_and_fuses_every_layer(name: str, traced: Traced, tmp_path: Path) -> None:
    row = RECIPES[name]
    # Of sixteen tokens the smallest published ratios would leave none.
    keep = max(row.default_keep, 1 / 16) if row.stages else None
    exported = export(prune(traced, row, keep), "tensorrt")
    write_weights(exported.layout, Checkpoint(traced.source.path, traced.model), tmp_path / WEIGHTS_FILE)
    for program, model in exported.models.items():
        assert lint_graph(model, "tensorrt-rtx", "fp16", 89) == []
        graph = tmp_path / f"{program}.onnx"
        save_model(model, graph)
        check_fused_layers(graph, program)
        digest = hashlib.sha256(graph.read_bytes()).hexdigest()
        if digest not in _built:  # recipes share programs that they leave alone
            assert build_engine(graph, tmp_path / f"{program}.engine").warnings == ()
            _built.add(digest)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_engines_of_a_sample_build(cell: Cell, shop: Workshop) -> None:
    outcome = run_cell(cell, shop)
    assert outcome["passed"], outcome


def test_the_sample_has_layouts_of_both_kinds_and_both_half_precisions() -> None:
    """The whole matrix has an engine of every row on every layout; here, some of the layouts with few rows."""
    drawn = {cell.layout for cell in SAMPLE}
    assert {name for name, layout in LAYOUTS.items() if not layout.rows} <= drawn <= set(LAYOUTS)
    assert sum(bool(LAYOUTS[name].rows) for name in drawn) == OTHERS
    assert {cell.dtype for cell in SAMPLE} == {"fp16", "bf16"}


def check_fused_layers(graph: Path, program: str) -> None:
    """Each decoder layer: one attention, two cache updates, and two norms and rotary for q and k, or more where a
    stage applies the layer's projections for its score."""
    layers = parsed_layers(graph)
    if program == "vision":
        assert Counter(layer.type for layer in layers)["NORMALIZATION"] > 0
        assert "RMS_NORMALIZATION" not in {layer.type for layer in layers}
        return
    found: dict[int, Counter[str]] = {index: Counter() for index in range(LAYERS)}
    for layer in layers:
        match = re.search(r"\.layers\.(\d+)[./]", layer.node or layer.name)
        if match and layer.type in FUSED:
            found[int(match[1])][layer.type] += 1
    for index, counts in found.items():
        assert counts["ATTENTION_INPUT"] == counts["ATTENTION_OUTPUT"] == 1, f"{program} layer {index}"
        assert counts["KV_CACHE_UPDATE"] == 2, f"{program} layer {index}"
        assert min(counts["RMS_NORMALIZATION"], counts["ROTARY_EMBEDDING"]) >= 2, f"{program} layer {index}"
