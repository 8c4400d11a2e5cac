"""Qwen2.5-VL and Qwen2.5-Omni from a checkpoint to a bundle: towers that take all their rows at once."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.compiler import pipeline
from secateur.compiler.bundle import Target, outline
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Parity, compare_runs, expected_kinds
from secateur.compiler.pipeline import RECIPES, Geometry, export, prune, read_source, trace_model
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.exporters.checkpoint import Checkpoint
from secateur.exporters.lint import lint_graph
from secateur.runtime.errors import UserError
from secateur.runtime.request import Request
from secateur.runtime.session import Session

from . import tiny_qwen
from .layout_checks import check_found

TEXT = {"text_tokens": 40, "new_tokens": 4}
MEDIA = {
    # Windows of three sizes: 6x10 patches in windows of 4x4.
    "images": Geometry(batch=2, images=2, image_size=(84, 140), **TEXT),
    "video": Geometry(frames=8, image_size=(84, 56), **TEXT),
    "video with sound": Geometry(batch=2, frames=8, image_size=(56, 56), audio_seconds=4, **TEXT),
}
WHOLE_WINDOWS = Geometry(images=2, image_size=(112, 112), **TEXT)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``source(kind)`` -> a whole model directory; do not change it."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_qwen.write_model(tmp_path_factory.mktemp(kind) / "model", kind=kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def traced(source: Callable[[str], Path]) -> Callable[..., Any]:
    """``traced(kind, geometry, dtype="fp32")``, each once."""
    made: dict[Any, Any] = {}

    def make(kind: str, geometry: Geometry, dtype: str = "fp32") -> Any:
        key = kind, geometry, dtype
        if key not in made:
            made[key] = trace_model(read_source(source(kind)), geometry, dtype)
        return made[key]

    return make


@pytest.mark.parametrize(
    ("kind", "media", "recipe"),
    [
        ("qwen2_5_vl", "images", "fastv"),
        ("qwen2_5_vl", "video", "divprune"),
        ("qwen2_5_omni_thinker", "video with sound", "seats"),
    ],
)
def test_programs_and_bundle_equal_the_oracle(
    traced: Callable[..., Any], tmp_path: Path, kind: str, media: str, recipe: str
) -> None:
    trace = traced(kind, MEDIA[media])
    pruned = prune(trace, RECIPES[recipe], 0.5, expose=True)
    oracle = Oracle(pruned.job, load_recording_model(trace.source))
    reference = OracleRun(oracle, remember=True)
    told = outline(pruned.job, pruned.programs)
    rows = random_rows(told, 2, 2, seed=1)
    pipeline.build(pruned, export(pruned, "onnxruntime"), Target("onnxruntime", "fp32", None), tmp_path / "bundle")
    eager = Request(EagerBackend(pruned.programs.programs, Weights(trace.source, trace.model)), told)
    with Session(tmp_path / "bundle", threads=1) as session:
        for ours in (CompiledRun(told, eager), CompiledRun(session.manifest, session.request())):
            found = Parity(expects=expected_kinds(RECIPES[recipe]))
            compare_runs(reference, ours, rows, MEDIA[media].batch, found, referee=oracle)
            check_found(found, 2)


def test_a_tower_of_whole_windows_moves_nothing_in_memory(traced: Callable[..., Any]) -> None:
    pruned = prune(traced("qwen2_5_vl", WHOLE_WINDOWS), RECIPES["none"])
    graph = export(pruned, "onnxruntime").models["vision"].graph
    count = collections.Counter(node.op_type for node in graph)
    depth = tiny_qwen.make_config()["vision_config"]["depth"]
    assert count["MultiHeadAttention"] == depth
    assert count["RotaryEmbedding"] == 2 * depth
    assert not {"Transpose", "Conv", "Cos", "Sin", "Neg", "Concat"} & count.keys()
    assert count["Gather"] == 2  # into windows and back


def test_positions_are_an_input_only_where_they_are_read(traced: Callable[..., Any]) -> None:
    """A stage before the first layer that numbers all rows anew leaves nobody who asks for the ids of three axes."""
    for recipe, asked in (("dycoke", False), ("fastv", True)):
        prefill = prune(traced("qwen2_5_vl", MEDIA["video"]), RECIPES[recipe], 0.5).programs["prefill"]
        assert ("positions" in prefill.inputs) == asked
        assert all(node.users for node in prefill.graph.nodes if node.op == "placeholder")


def test_windows_of_several_sizes_are_one_attention_for_each_size(traced: Callable[..., Any]) -> None:
    pruned = prune(traced("qwen2_5_vl", MEDIA["images"]), RECIPES["none"])
    graph = export(pruned, "onnxruntime").models["vision"].graph
    count = collections.Counter(node.op_type for node in graph)
    config = tiny_qwen.make_config()["vision_config"]
    whole = len(config["fullatt_block_indexes"])
    assert count["MultiHeadAttention"] == whole + 3 * (config["depth"] - whole)
    assert "Transpose" not in count


def test_tables_of_a_tower_do_not_depend_on_half_precision(traced: Callable[..., Any]) -> None:
    for kind, media in (("qwen2_5_vl", "images"), ("qwen2_5_omni_thinker", "video with sound")):
        pruned = prune(traced(kind, MEDIA[media], "fp16"), RECIPES["none"])
        targets = {str(node.target) for node in pruned.programs["vision"].graph.nodes}
        assert not {"aten.cos.default", "aten.arange.default", "aten.lt.Tensor", "aten.argsort.default"} & targets
        for graph in export(pruned, "tensorrt").models.values():
            assert lint_graph(graph, "tensorrt-rtx", "fp16", 89) == []


# -- checkpoints --------------------------------------------------------------------------------------------


def shapes(traced: Any) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for program in traced.programs.programs.values():
        found |= {name: tuple(tensor.shape) for name, tensor in program.weights().items()}
    return found


def test_the_thinker_is_found_inside_the_whole_of_omni(
    source: Callable[[str], Path], traced: Callable[..., Any]
) -> None:
    part = Checkpoint(source("qwen2_5_omni_thinker"), traced("qwen2_5_omni_thinker", MEDIA["video"]).model)
    trace = traced("qwen2_5_omni", MEDIA["video"])
    whole = Checkpoint(source("qwen2_5_omni"), trace.model)
    wanted = shapes(trace)
    whole.require(wanted)
    assert all(torch.equal(whole.read(n, shape), part.read(n, shape)) for n, shape in wanted.items())
    assert whole.names["lm_head.weight"] == "thinker.lm_head.weight"
    assert any(key.startswith("talker.") for key in whole.files)
    assert whole.unexpected() == []


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_5_omni"])
def test_shards_with_the_names_of_the_hub(
    source: Callable[[str], Path], traced: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    """As ``save_pretrained`` splits them; the bundle links them."""
    trace = traced(kind, MEDIA["video"])
    for file in source(kind).iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = sorted(load_file(source(kind) / "model.safetensors").items())
    places = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(part), tmp_path / name, {"format": "pt"})
        places |= {key: name for key, _ in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    single, sharded = Checkpoint(source(kind), trace.model), Checkpoint(tmp_path, trace.model)
    wanted = shapes(trace)
    sharded.require(wanted)
    assert len({stored.file for stored in sharded.files.values()}) == 2
    assert all(torch.equal(sharded.read(n, shape), single.read(n, shape)) for n, shape in wanted.items())


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("thinker.visual.merger.mlp.0.weight", None, "checkpoint lacks 1 tensor: model.visual.merger.mlp.0.weight"),
        ("thinker.visual.patch_embed.proj.weight", torch.ones(32, 3, 2, 14, 7),
         "thinker.visual.patch_embed.proj.weight [32,3,2,14,7] instead of [32,3,2,14,14]"),
        ("thinker.audio_tower.conv1.weight", torch.ones(32, 8, 3),
         "thinker.audio_tower.conv1.weight [32,8,3] instead of [32,16,3]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named_as_their_files_do(
    source: Callable[[str], Path], traced: Callable[..., Any], tmp_path: Path, key: str, change: Any, said: str
) -> None:
    trace = traced("qwen2_5_omni", MEDIA["video with sound"])
    tensors = load_file(source("qwen2_5_omni") / "model.safetensors")
    del tensors[key]
    save_file(tensors | ({} if change is None else {key: change}), tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path, trace.model).require(shapes(trace))
    assert said in str(caught.value)


def test_a_tensor_too_many_is_reported(
    source: Callable[[str], Path], traced: Callable[..., Any], tmp_path: Path
) -> None:
    tensors = load_file(source("qwen2_5_vl") / "model.safetensors") | {"visual.blocks.0.attn.extra": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, traced("qwen2_5_vl", MEDIA["video"]).model)
    assert checkpoint.unexpected() == ["visual.blocks.0.attn.extra"]
