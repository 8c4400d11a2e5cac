"""Qwen families: the compiled programs against transformers' own model, with images and videos, recipe by recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.compiler.bundle import outline
from secateur.compiler.function import trace_function
from secateur.compiler.inputs import random_rows
from secateur.compiler.meta_model import build_meta_model
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import Geometry, load_recipe, prune
from secateur.compiler.program import Program
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.trace import Traced, read_source, trace_model
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import export_program
from secateur.exporters.weights import WeightLayout
from secateur.passes.drop_noops import drop_noops
from secateur.passes.drop_planes import drop_planes
from secateur.passes.fold_scatters import fold_scatters
from secateur.passes.sites import Thinned
from secateur.runtime.errors import UserError
from secateur.runtime.request import Request

from .layout_checks import check_found
from .tiny_qwen_more import make_config, write_config, write_model

OMNI = "qwen3_omni_moe_thinker"
TOLERANCE = 2e-5
GEOMETRIES = {
    "images": Geometry(batch=2, images=2, text_tokens=24, new_tokens=4),
    "video": Geometry(batch=1, frames=8, text_tokens=24, new_tokens=4, fps=1.0),
    "video with sound": Geometry(batch=2, frames=8, text_tokens=24, new_tokens=4, fps=2.0, audio_seconds=4),
    "images and sound": Geometry(batch=1, images=2, text_tokens=24, new_tokens=4, audio_seconds=2),
}
HEARD = ("video with sound", "images and sound")
RECIPES = ("none", "fastv", "divprune", "seats")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: write_model(tmp_path_factory.mktemp("qwen") / kind, kind))


@pytest.fixture(scope="module")
def trace_of(model_of: Callable[[str], Path]) -> Callable[[str, str], tuple[Traced, Any]]:
    recording = cache(lambda kind: load_recording_model(read_source(model_of(kind))))

    def make(kind: str, media: str) -> tuple[Traced, Any]:
        source = read_source(model_of(kind))
        square = source.config.vision_config.patch_size * 2
        geometry = replace(GEOMETRIES[media], image_size=(3 * square, 5 * square))
        return trace_model(source, geometry), recording(kind)

    return cache(make)


def compare(traced: Traced, model: Any, recipe: str, rows: int = 4) -> Parity:
    """Random rows through the programs, before they are exported, and through the oracle."""
    row = load_recipe(recipe)
    pruned = prune(traced, row, 0.5 if row.stages else None, expose=True)
    told = outline(pruned.job, pruned.programs)
    backend = EagerBackend(pruned.programs.programs, Weights(traced.source, traced.model))
    ours, parity = CompiledRun(told, Request(backend, told)), Parity()
    items = random_rows(told, rows, 2, seed=1)
    compare_runs(ours, OracleRun(Oracle(pruned.job, model)), items, traced.geometry.batch, parity)
    return parity


# Beside the matrix's sample, which has Qwen2-VL and Qwen3-VL with an image, Qwen3-VL-MoE and Qwen3-Omni with a video.
CASES = [
    *(("qwen2_vl", "video", recipe) for recipe in RECIPES),
    *(("qwen3_vl", "images", recipe) for recipe in RECIPES),
    *((OMNI, media, recipe) for media in HEARD for recipe in ("none", "fastv")),
]


@pytest.mark.parametrize(("kind", "media", "recipe"), CASES)
def test_programs_equal_the_oracle(
    trace_of: Callable[[str, str], tuple[Traced, Any]], kind: str, media: str, recipe: str
) -> None:
    parity = compare(*trace_of(kind, media), recipe)
    check_found(parity, 4)
    assert parity.worst[1] <= TOLERANCE
    assert parity.kind("logits").scale > 0.1, "a comparison of zeros proves nothing"


@pytest.mark.parametrize("recipe", ["none", "fastv"])
def test_features_of_inner_layers_are_noticed(
    trace_of: Callable[[str, str], tuple[Traced, Any]], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    traced, model = trace_of("qwen3_vl", "images")
    whole = Oracle.encode

    def without_the_last(self: Oracle, *given: Any) -> Any:
        features = whole(self, *given)
        given[1].planes[-1].zero_()
        return features

    monkeypatch.setattr(Oracle, "encode", without_the_last)
    parity = compare(traced, model, recipe, rows=1)
    assert parity.features <= TOLERANCE < parity.logits / 100


def test_planes_are_thinned_as_the_features_are() -> None:
    """Gathered by what a selector kept, mixed as a merge mixed."""
    rows = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[0, 3], [1, 2]])
    assert torch.equal(Thinned(rows, kept, {}).thin(rows)[1, 1], rows[1, 2])
    mix = torch.softmax(torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1)), -1)
    assert torch.allclose(Thinned(rows, kept, {}, mix).thin(rows), mix @ rows)


def test_decode_adds_nothing(trace_of: Callable[[str, str], tuple[Traced, Any]]) -> None:
    programs = prune(trace_of("qwen3_vl", "images")[0], load_recipe("none")).programs
    planes = [f"deepstack.{i}" for i in range(3)]
    assert [name for name in programs["vision"].outputs if name in planes] == planes
    assert {name.replace(".", "_") for name in planes} <= set(programs["prefill"].inputs)
    assert not [name for name in programs["decode"].inputs if name.startswith("deepstack")]


def test_lengths_read_off_a_plane_are_the_streams() -> None:
    """Tracing takes the length of the stream from any tensor that has it."""
    graph, rows = torch.fx.Graph(), torch.ones(1, 3, 2)
    hidden, plane = graph.placeholder("hidden"), graph.placeholder("deepstack_0")
    length = graph.call_function(torch.ops.aten.sym_size.int, (plane, 1))
    stream = graph.call_function(torch.ops.aten.add.Tensor, (hidden, plane))
    graph.output([graph.call_function(torch.ops.aten.reshape.default, (stream, [length, 2]))])
    program = drop_planes(Program("decoder", torch.fx.GraphModule(torch.nn.Module(), graph), ("out",)))
    assert program.inputs == ("hidden",)
    assert torch.equal(program.module(rows)[0], rows[0])


def test_grids_of_a_video_are_items_behind_their_times(model_of: Callable[[str], Path]) -> None:
    """Three grids of two frames at two a second, in Qwen3-VL; one item in Qwen2-VL."""
    for kind, items, timestamp in (("qwen3_vl", 3, "<{:.1f} seconds>"), ("qwen2_vl", 1, "")):
        source = read_source(model_of(kind))
        side = 4 * source.config.vision_config.patch_size
        media = source.at(Geometry(frames=6, image_size=(side, 2 * side))).media
        assert media is not None
        assert (len(media.items), media.timestamp) == (items, timestamp)
        assert sum(item.tokens for item in media.items) == len(media.offsets) == 24
        assert {axes[0] for axes in media.offsets} == ({0} if items == 3 else {0, 1, 2})


def test_sound_comes_between_the_grids_it_is_heard_with(model_of: Callable[[str], Path]) -> None:
    source = read_source(model_of(OMNI))
    media = source.at(Geometry(frames=4, image_size=(32, 64), fps=2.0, audio_seconds=2)).media
    assert media is not None
    # Grids of two tokens a second apart, thirteen tokens of sound a second; the last of those ends the item.
    assert media.runs == ((0, 2), (1, 13), (0, 2), (1, 13))
    assert (media.items[0].span, media.items[0].reach) == (26, 26)
    assert media.layout.frames == (0,) * 15 + (1,) * 15


def test_the_thinker_is_found_in_the_whole_of_omni(tmp_path: Path) -> None:
    """Its weights then have a prefix in the files."""
    write_model(tmp_path, OMNI, layers=3)
    file, name = tmp_path / "model.safetensors", "model.language_model.norm.weight"
    model = build_meta_model(read_source(tmp_path), "fp32")
    expected = Weights(read_source(tmp_path), model).read(name, model.get_parameter(name).shape)
    save_file({f"thinker.{key}": value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    whole = {"model_type": "qwen3_omni_moe", "thinker_config": make_config(OMNI, layers=3)}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    source = read_source(tmp_path)
    assert (source.family.name, source.config.model_type) == ("qwen3_omni", OMNI)
    assert torch.equal(Weights(source, model).read(name, expected.shape), expected)


@pytest.mark.parametrize(
    ("kind", "changes", "geometry", "said"),
    [
        ("qwen3_vl", {"vision": {"deepstack_visual_indexes": [0, 7]}}, {}, r"deepstack_visual_indexes are \[0, 7\]"),
        ("qwen3_vl", {"vision": {"patch_size": [16, 16]}}, {}, r"patch_size is \[16, 16\]"),
        ("qwen3_vl", {}, {"audio_seconds": 2}, "does not hear"),
        ("qwen2_vl", {"vision": {"embed_dim": 33}}, {}, "embed_dim 33 is no multiple of num_heads 2"),
        (OMNI, {}, {"audio_seconds": 3}, "do not fill the windows of 2 s"),
        (OMNI, {}, {"frames": 4, "fps": 3.0}, "grids of a video 8.66667 position ids apart"),
        (OMNI, {"audio_config": {"n_window": 20}}, {"audio_seconds": 2}, "n_window is 20"),
    ],
)
def test_what_is_not_supported_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], geometry: dict[str, Any], said: str
) -> None:
    path = write_config(tmp_path, kind, **changes)
    with pytest.raises(UserError, match=said):
        read_source(path).at(Geometry(**geometry))


def test_writes_into_a_slice_are_one_gather() -> None:
    """Interleaved axes, as transformers writes them in place."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def interleave(x: torch.Tensor) -> torch.Tensor:
        turned = x * 2.0
        first = turned[0]
        for axis in (1, 2):
            first[..., axis:6:3] = turned[axis, ..., axis:6:3]
        return torch.cat((first, first), -1)

    x = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    program = fold_scatters(drop_noops(trace_function("interleave", interleave, {"x": x}, ("out",))))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.select_scatter.default not in targets
    model = export_program(program, DIALECTS["onnxruntime"], WeightLayout({}, b"", {}))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {"x": x.numpy()})
    assert np.array_equal(found, interleave(x).numpy())
