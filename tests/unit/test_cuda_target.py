"""--target onnxruntime-cuda: what a bundle for ONNX Runtime's CUDA provider holds. Running one needs a GPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from secateur.compiler import pipeline
from secateur.compiler.geometry import Geometry
from secateur.exporters.lint_files import lint_path
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.session import Session
from secateur.tools.bench import gpu

from . import tiny_model

SMALL = Geometry(text_tokens=24, new_tokens=4)
SMALLER = {
    "num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for weights to be shared: those below 64 KiB are not."""
    root = tmp_path_factory.mktemp("cuda")
    text = {"hidden_size": 256, "intermediate_size": 512}
    model = tiny_model.write_model(root / "model", layers=2, text=text)
    pipeline.compile(
        model, root / "out", recipe="fastv", keep=0.5, geometry=SMALL, target="onnxruntime-cuda", dtype="bf16"
    )
    return root / "out"


def test_the_manifest_names_provider_type_and_shared_weights(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.provider, manifest.dtype) == ("CUDAExecutionProvider", "bf16")
    prefill, decode = (set(manifest.programs[name].weights) for name in ("prefill", "decode"))
    assert "model.language_model.layers.1.mlp.up_proj.weight" in prefill & decode
    assert manifest.tensors.keys() >= prefill | decode
    assert manifest.engines is None
    graph = ir.load(bundle / "prefill.onnx").graph
    for name in prefill:
        stored = graph.initializers[name].const_value
        assert isinstance(stored, ir.ExternalTensor)
        told = manifest.tensors[name]
        assert (stored.location, stored.offset, stored.nbytes) == (told.file, told.offset, told.bytes)


def test_its_graphs_are_those_of_the_cpu_in_half_precision(bundle: Path) -> None:
    traced = pipeline.trace_model(pipeline.read_source(bundle.parent / "model"), SMALL, "fp32")
    plain = pipeline.export(pipeline.prune(traced, pipeline.RECIPES["fastv"], 0.5), "onnxruntime").models
    for name in ("prefill", "decode"):
        found, cpu = (Counter(n.op_type for n in g.all_nodes()) for g in (ir.load(bundle / f"{name}.onnx").graph,
                                                                        plain[name].graph))  # fmt: skip
        assert found["GroupQueryAttention"] == 2
        assert found - cpu <= Counter({"Cast": found["Cast"]}), "but for casts around norms and scores"
        assert not cpu - found
    assert [found for one in lint_path(bundle) for found in one.findings] == []


def test_without_a_gpu_it_says_so(bundle: Path) -> None:
    from secateur.runtime.backends.preflight import has_driver

    if has_driver():
        pytest.skip("a GPU driver is here")
    text = r"the onnxruntime-cuda graphs cannot run here: missing an NVIDIA GPU with its driver"
    with pytest.raises(UserError, match=rf"^backend onnxruntime-cuda: {text}"):
        Session(bundle)


def test_the_benchmark_runs_whole_and_pruned_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, with few layers: what it says of a GPU needs one."""
    monkeypatch.setitem(gpu.DECODERS, "small", SMALLER)
    monkeypatch.setitem(gpu.TOWERS, "small", {"num_hidden_layers": 2, "hidden_size": 64})
    monkeypatch.setattr(gpu, "IMAGES", 1)
    gpu.main(
        ["--target", "onnxruntime", "--layout", "small", "--batches", "1", "--turns", "1", "--warmup", "0", "--work",
         str(tmp_path), "--json", str(tmp_path / "out.json"), "--peak-tflops", "1"]
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "out.json").read_text())["batches"]
    assert row["share"] == pytest.approx(row["speed_up"] / row["cut"])
    assert row["cut"] > 1
    assert row["transformers"]["seconds"] > 0
    said = capsys.readouterr().out
    assert "whole" in said
    assert "fewer FLOPs" in " ".join(said.replace("│", " ").split())
