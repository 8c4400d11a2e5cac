"""Bundles for ``plain`` are for other toolchains: OpenVINO and the least and the newest ONNX Runtime give what the
installed ONNX Runtime gives, program by program from equal inputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.compiler.geometry import Geometry
from secateur.compiler.pipeline import build, check_target, export, name_target, prune, read_source, trace_model
from secateur.exporters.dialects import DIALECTS
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import LEAST_ONNXRUNTIME

from . import tiny_qwen_more
from .other_toolchains import (
    ROOT,
    Call,
    differences,
    other_onnxruntimes,
    record,
    run_in_onnxruntime,
    run_in_openvino,
)
from .reference_runs import run_in_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@dataclass(frozen=True)
class Sample:
    recipe: str
    layout: str = "llava"
    loops: str | None = None

    def __str__(self) -> str:
        return "-".join(part for part in (self.layout, self.recipe, self.loops) if part)


SAMPLES = (
    Sample("none"), Sample("fastv"), Sample("visionzip"), Sample("divprune"), Sample("divprune", loops="unroll"),
    Sample("cdpruner"), Sample("divprune", "qwen3_vl_moe"),
)  # fmt: skip
"""No stage, one in the decoder, one that merges in the tower, one that chooses token by token, likewise in the decoder,
and a decoder of experts whose position ids have axes."""


FEW = ("none", "divprune")
"""Recipes of the samples that the reference evaluator runs: it computes in Python."""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny_qwen_more.write_model(tmp_path_factory.mktemp("qwen") / "model", "qwen3_vl_moe", layers=3)
    side = 4 * 32  # four visual tokens, of two by two patches of 16 pixels each
    return trace_model(read_source(model), Geometry(text_tokens=24, new_tokens=4, image_size=(side, side)), "fp32")


@pytest.fixture(scope="module")
def recorded(
    pruned: Callable[..., Any], qwen: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sample], list[Call]]:
    """What the installed ONNX Runtime was given and gave; each sample is compiled once."""
    made: dict[Sample, list[Call]] = {}

    def make(sample: Sample) -> list[Call]:
        if sample not in made:
            goal = check_target("plain", "fp32", None, loops=sample.loops)
            keep = 0.5 if RECIPES[sample.recipe].stages else None
            one = pruned(sample.recipe, keep) if sample.layout == "llava" else prune(qwen, RECIPES[sample.recipe], keep)
            out = tmp_path_factory.mktemp("plain") / str(sample)
            made[sample] = record(build(one, export(one, goal.dialect), goal, out))
            assert [call.graph.stem for call in made[sample]] == ["vision", "prefill", "decode", "decode"]
        return made[sample]

    return make


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_openvino(sample: Sample, recorded: Callable[[Sample], list[Call]]) -> None:
    calls = recorded(sample)
    for graph in dict.fromkeys(call.graph for call in calls):
        mine = [call for call in calls if call.graph == graph]
        found = run_in_openvino(graph, [call.inputs for call in mine])
        assert [line for one, made in zip(mine, found, strict=True) for line in differences(one, made)] == []


@pytest.mark.parametrize("version", other_onnxruntimes())
def test_other_releases_of_onnx_runtime(version: str, recorded: Callable[[Sample], list[Call]], tmp_path: Path) -> None:
    calls = [call for sample in SAMPLES for call in recorded(sample)]
    found = run_in_onnxruntime(version, calls, tmp_path / "work")
    assert [line for one, made in zip(calls, found, strict=True) for line in differences(one, made)] == []


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.recipe in FEW], ids=str)
def test_reference_evaluator(sample: Sample, recorded: Callable[[Sample], list[Call]]) -> None:
    for call in recorded(sample)[:3]:
        assert differences(call, run_in_reference(call.graph, call.inputs)) == []


def test_the_least_release_is_the_one_that_users_may_have() -> None:
    bounds = re.findall(r'^cpu = \["onnxruntime>=([\d.]+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    said = [*bounds, LEAST_ONNXRUNTIME[DIALECTS["plain"].opset]]
    assert [".".join(version.split(".")[:2]) for version in said] == [other_onnxruntimes()[0]] * 2
    pinned = re.findall(r"^onnxruntime==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert tuple(map(int, other_onnxruntimes()[-1].split("."))) > tuple(map(int, pinned.split(".")))


def test_the_page_says_how(recorded: Callable[[Sample], list[Call]]) -> None:
    """The snippet of docs/other-toolchains.md, with this bundle's place in it."""
    calls = recorded(Sample("divprune"))
    page = (ROOT / "docs" / "other-toolchains.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(snippet.replace('"out/plain"', repr(str(calls[0].graph.parent))), found)
    for call in calls:
        assert differences(call, found["run"](call.graph.stem, call.inputs)) == []


@pytest.mark.parametrize(
    ("target", "loops", "says"),
    [
        ("plain", "roll", "--loops: no way 'roll' of writing loops (available: keep, unroll)"),
        ("onnxruntime", "unroll", "--loops: target onnxruntime has loops, which ONNX Runtime runs as they are"),
        ("onnxruntime-cuda", "keep", "--loops: target onnxruntime-cuda has a loop where a selector chooses"),
        ("tensorrt-rtx", "keep", "--loops: target tensorrt-rtx always unrolls: TensorRT fails or crashes over"),
        ("tensorrt", "unroll", "--loops: target tensorrt always unrolls"),
    ],
)
def test_loops_are_a_choice_of_plain_alone(target: str, loops: str, says: str) -> None:
    for check in (lambda: check_target(target, None, None, loops=loops), lambda: name_target(target, None, loops)):
        with pytest.raises(UserError) as error:
            check()
        assert str(error.value).startswith(says)


def test_a_difference_is_seen(recorded: Callable[[Sample], list[Call]]) -> None:
    """Of the kept tokens, of one number, of what is infinite and of a missing output."""
    call = recorded(Sample("divprune"))[0]
    kept = next(name for name in call.outputs if name.startswith("kept."))
    assert differences(call, call.outputs) == []
    other = np.roll(call.outputs[kept], 1, axis=-1)
    assert differences(call, call.outputs | {kept: other}) == [f"vision.{kept}: {other.size} of {other.size} differ"]
    near = call.outputs["features"].copy()
    near.flat[0] += 2e-3 * np.abs(near).max()
    assert "vision.features: differs by" in differences(call, call.outputs | {"features": near})[0]
    near.flat[0] = np.inf
    assert differences(call, call.outputs | {"features": near}) == ["vision.features: other values are infinite"]
    with pytest.raises(AssertionError):
        differences(call, {kept: other})
