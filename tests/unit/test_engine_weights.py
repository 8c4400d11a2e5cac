"""Weights that lie outside their engines: which they are, what the manifest says of them, and what stays as it was."""

from __future__ import annotations

import filecmp
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from secateur.compiler.geometry import Geometry
from secateur.compiler.pipeline import EngineOptions, build, check_target, export, prune
from secateur.compiler.trace import read_source, trace_model
from secateur.exporters.engine_weights import list_shared, mark_stripped, take_weights_out, turn_into_inputs
from secateur.exporters.lint import lint_graph
from secateur.exporters.tensorrt_library import listening, load_library
from secateur.exporters.tensorrt_network import parse, parsed_layer_types
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import SecateurError
from secateur.runtime.manifest import check_files, read_manifest
from secateur.tools import cli

from .tiny_model import write_model

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

WIDE = {"hidden_size": 256, "intermediate_size": 384}
"""A width at which every matrix of the decoder is large enough to lie outside."""


def save_graph(directory: Path) -> Path:
    """A graph over one weights file: a convolution's kernel, a bias, a matrix, and a table of indices."""
    directory.mkdir(exist_ok=True)
    made = {
        "kernel": np.zeros((256, 3, 8, 8), np.float16),
        "bias": np.zeros(256, np.float16),
        "matrix": np.ones((256, 256), np.float16),
        "ids": np.zeros(16384, np.int64),
    }
    tensors, start = [], 0
    with (directory / "weights.safetensors").open("wb") as file:
        for name, array in made.items():
            file.write(array.tobytes())
            tensors.append(
                ir.ExternalTensor(
                    "weights.safetensors", start, array.nbytes, ir.DataType.from_numpy(array.dtype), name=name,
                    shape=ir.Shape(array.shape), base_dir=directory,
                )
            )  # fmt: skip
            start += array.nbytes
    model = ir.from_onnx_text(
        """<ir_version: 11, opset_import: ["" : 23]> g (float16[1,3,8,8] x) => (float16[1,256] y, int64[16384] z)
        { c = Conv <kernel_shape=[8,8]> (x, kernel) f = Flatten (c)
          y = Gemm <transB=1> (f, matrix, bias) z = Identity (ids) }""",
        initializers=tensors,
    )
    ir.save(model, directory / "vision.onnx")
    return directory / "vision.onnx"


def test_only_large_matrices_outside_the_graph_are_taken_out(tmp_path: Path) -> None:
    assert list_shared(ir.load(save_graph(tmp_path)).graph) == ["matrix"]


def test_the_variant_is_there_for_the_time_of_a_build_and_nothing_is_written_beside_the_graph(tmp_path: Path) -> None:
    graph = save_graph(tmp_path)
    before = graph.read_bytes()
    with take_weights_out(graph, "inputs") as (variant, names):
        assert names == ("matrix",)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["vision.onnx", "weights.safetensors"]
        made = ir.load(variant).graph
        assert not any(isinstance(v.const_value, ir.ExternalTensor) for v in made.initializers.values())
        assert [value.name for value in made.inputs] == ["x", "matrix"]
        assert set(made.initializers) == {"kernel", "bias", "ids"}
        gemm = next(node for node in made if node.op_type == "Gemm")
        assert gemm.attributes.get_int("transB") == 1  # turned by the operator, as it lies in the file
    with pytest.raises(KeyError), take_weights_out(graph, "inputs"):
        raise KeyError
    assert not variant.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vision.onnx", "weights.safetensors"]
    assert graph.read_bytes() == before
    for way, outside in (("plan", ()), ("stripped", ("matrix",))):
        with take_weights_out(graph, way) as found:
            assert found == (graph, outside)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model whose embeddings are tied, by reference to its checkpoint, built both ways."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    pytest.importorskip("polygraphy", reason="needs the extra tensorrt-rtx")
    root = tmp_path_factory.mktemp("engines")
    source = write_model(root / "model", decoder="qwen2", layers=2, dtype=torch.float16, text=WIDE)
    pruned = prune(trace_model(read_source(source), Geometry(text_tokens=12, new_tokens=8), "fp16"),
                   RECIPES["fastv"])  # fmt: skip
    exported = export(pruned, "tensorrt", "reference")
    told: list[str] = []
    for way in ("inputs", "plan"):
        goal = check_target("tensorrt-rtx", "fp16", (89, 120), engines=EngineOptions(way, 1 << 30, 3))
        build(pruned, exported, goal, root / way, progress=lambda what, done, total: told.append(what))
    return {"root": root, "exported": exported, "told": told}


def test_all_but_engines_and_manifest_are_equal_byte_by_byte(made: dict[str, Any]) -> None:
    inputs, plan = made["root"] / "inputs", made["root"] / "plan"
    manifest = read_manifest(inputs)
    check_files(inputs, manifest, "full")
    assert {p.relative_to(inputs).as_posix() for p in inputs.rglob("*") if p.is_file()} == {
        *manifest.files, "manifest.json"
    }  # fmt: skip
    others = [file for file in manifest.files if not file.endswith(".engine")]
    assert filecmp.cmpfiles(inputs, plan, others, shallow=False) == (others, [], [])
    whole = read_manifest(plan).files["decode.engine"].bytes
    outside = sum(manifest.tensors[name].bytes for name in manifest.programs["decode"].weights)
    assert whole - manifest.files["decode.engine"].bytes > 0.8 * outside


def test_the_manifest_says_what_the_engines_take(made: dict[str, Any]) -> None:
    manifest = read_manifest(made["root"] / "inputs")
    engines = manifest.engines
    assert engines is not None
    assert (engines.weights, engines.workspace, engines.opt_level) == ("inputs", 1 << 30, 3)
    assert (manifest.sm, engines.architectures) == (89, [89, 120])
    prefill, decode = (manifest.programs[name].weights for name in ("prefill", "decode"))
    assert prefill == decode  # one allocation serves both
    assert not set(prefill) & set(manifest.programs["vision"].weights)
    assert len([name for name in prefill if ".layers." in name]) == 2 * 7
    # Tied: the table of embeddings is the head as well, once, by the name it is stored under.
    assert [name for name in prefill if ".layers." not in name] == ["model.language_model.embed_tokens.weight"]
    for name, tensor in manifest.tensors.items():
        place = made["exported"].layout.tensors[name]
        assert (tensor.file, tensor.offset, tensor.bytes) == (place.file, place.offset, place.length)
        assert (tensor.dtype, tuple(tensor.shape)) == ("fp16", place.shape)
        assert tensor.file == "weights/model.safetensors"
    assert read_manifest(made["root"] / "plan").tensors == {}


def test_inputs_pass_the_linter_and_are_parsed_into_the_same_layers(made: dict[str, Any]) -> None:
    for program in ("prefill", "decode"):
        graph = made["root"] / "plan" / f"{program}.onnx"
        counts = [parsed_layer_types(graph, weights=way) for way in ("plan", "inputs")]
        assert set((counts[0] - counts[1]) + (counts[1] - counts[0])) == {"CONSTANT"}
        model = ir.load(graph)
        turn_into_inputs(model, list_shared(model.graph))
        assert lint_graph(model, "tensorrt-rtx", "fp16", 89) == []


def test_the_parser_keeps_the_names_a_refit_is_asked_by(made: dict[str, Any]) -> None:
    graph = made["root"] / "plan" / "prefill.onnx"
    with listening() as speech:
        _, network, _ = parse(load_library("tensorrt-rtx"), graph, speech, graph)
        mark_stripped(network, tuple(list_shared(ir.load(graph).graph)), "prefill.onnx")
        with pytest.raises(SecateurError, match=r"prefill\.onnx: the parsed network has no weight nonsense; take"):
            mark_stripped(network, ("nonsense",), "prefill.onnx")


def test_progress_names_the_engine_and_the_builders_phases(made: dict[str, Any]) -> None:
    assert {"engine vision", "engine prefill", "engine decode", "engine decode: Building engine"} <= {*made["told"]}


def test_inspect_shows_the_layers(made: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    bundle = made["root"] / "inputs"
    status, out = secateur(capsys, "inspect", bundle, "--layers", "--program", "decode", "--json")
    (decode,) = json.loads(out)["programs"]
    assert status == 0
    assert Counter(layer["type"] for layer in decode["layers"]) == decode["types"]
    assert decode["types"]["KV_CACHE_UPDATE"] == 4
    status, out = secateur(capsys, "inspect", bundle, "--layers")
    assert [f"{name}.onnx" in out for name in ("vision", "prefill", "decode")] == [True] * 3
    status, out = secateur(capsys, "inspect", bundle)
    assert "weights are inputs, built for SM 89, 120, optimization level 3" in " ".join(out.split())


def secateur(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(each) for each in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().out
