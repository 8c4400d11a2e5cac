"""Self-tests of compiled bundles: a host without Secateur reproduces them, the eager model agrees, and a hundredth in a
logit is found. LLaVA, Qwen2.5-VL with two rows of two images, and Qwen2.5-Omni with a video and its sound."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.compiler.oracle import Oracle
from secateur.compiler.pipeline import Geometry, compile, plan_job, read_source
from secateur.compiler.verify import recover_job
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.processing import Processor
from secateur.runtime.schema_self_test import SELF_TEST, read_self_test
from secateur.runtime.self_test import check
from secateur.runtime.self_test_run import see

from . import tiny_qwen

ROOT = Path(__file__).parents[2]
MADE: dict[str, tuple[str | None, dict[str, Any]]] = {
    "llava": (
        "demo/model", {"recipe": "fastv", "keep": 0.25, "geometry": Geometry(text_tokens=24, new_tokens=16)}
    ),
    "qwen2_5_vl": (
        None,
        {"recipe": "divprune:keep=0.5+fastv:keep=0.5",
         "geometry": Geometry(images=2, batch=2, image_size=(56, 84), text_tokens=120, new_tokens=12)},
    ),
    "qwen2_5_omni": (
        "demo/omni/model",
        {"recipe": "seats", "mean_keep": (0.06, 0.35), "geometry": Geometry(
            image_size=(112, 112), frames=8, fps=2.0, audio_seconds=4, text_tokens=80, new_tokens=12)},
    ),
}  # fmt: skip
HOST = """
import runpy, sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("secateur", "torch", "transformers", "onnx"):
            raise ImportError(f"a host has no {name}")

sys.meta_path.insert(0, Guard())
sys.argv = ["host", sys.argv[1]]
runpy.run_module("tests.host", run_name="__main__")
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``bundles(name)`` -> (bundle, model directory). Do not change them."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            model, how = MADE[name]
            source = ROOT / model if model else tiny_qwen.write_model(root / "model")
            made[name] = Path(str(compile(source, root / "bundle", **how))), source
        return made[name]

    return make


@pytest.mark.parametrize("name", MADE)
def test_a_host_without_secateur_reproduces_it(bundles: Callable[[str], tuple[Path, Path]], name: str) -> None:
    bundle, _ = bundles(name)
    done = subprocess.run(
        [sys.executable, "-c", HOST, str(bundle)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    resized, exact = (json.loads(line) for line in done.stdout.splitlines())
    assert (resized["case"], exact["case"]) == ("resized", "exact")
    for found in (resized, exact):
        assert (found["ids"], found["chat"], found["pixels"]) == (True, True, True)
        assert found["values"] <= 1
        assert ("sound" in found) == (name == "qwen2_5_omni")
    assert (exact["survivors"], exact["tokens"]) == (True, True)
    assert max(exact["features"], exact["logits"]) <= 1
    assert check(bundle, read_manifest(bundle)).passed


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_eager_model_agrees(bundles: Callable[[str], tuple[Path, Path]], name: str) -> None:
    """The numbers are the bundle's own: here they are held against Hugging Face's model with the stages under hooks."""
    bundle, model = bundles(name)
    manifest = read_manifest(bundle)
    test = read_self_test(bundle, manifest)
    assert test is not None
    case = next(case for case in test.cases if case.numbers is not None)
    assert case.numbers is not None
    job = recover_job(manifest, read_source(model, MADE[name][1]["geometry"]), plan_job, MADE[name][1]["recipe"])
    oracle, seen = Oracle(job), see(Processor(bundle, manifest), case.rows, bundle)
    pixels = np.split(seen.pixel_values, len(case.rows))
    for number, row in enumerate(case.rows):
        tokens = case.numbers.tokens[number]
        with torch.no_grad():
            run = oracle.run(row.ids, torch.from_numpy(pixels[number]), tokens[:-1])
        assert [int(logits.argmax()) for logits in run.logits] == tokens
        vocab = len(run.logits[0])
        for stored, logits in zip(case.numbers.logits, run.logits, strict=True):
            pairs = [(at - number * vocab, value) for at, value in zip(stored.at, stored.values, strict=True)]
            own = [(at, value) for at, value in pairs if 0 <= at < vocab]
            away = max(abs(float(logits[at]) - value) for at, value in own)
            assert len(own) >= 8
            assert away <= stored.tolerance


def test_a_hundredth_in_a_logit_is_found(bundles: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    from secateur.runtime.manifest import file_entry, write_manifest

    out = Path(shutil.copytree(bundles("llava")[0], tmp_path / "bundle"))
    content = json.loads((out / SELF_TEST).read_text())
    logits = next(case for case in content["cases"] if "numbers" in case)["numbers"]["logits"]
    logits[5]["values"][2] += 0.01
    (out / SELF_TEST).write_text(json.dumps(content))
    manifest = read_manifest(out)
    files = manifest.files | {SELF_TEST: file_entry(out / SELF_TEST)}
    write_manifest(out, manifest.model_copy(update={"files": files}))
    found = check(out, read_manifest(out))
    assert found.first is not None
    assert found.first.name == "logits"
    assert abs(found.first.largest - 0.01) < 1e-4
    assert "step 5: up to 0.01 away" in str(found.first)


@pytest.mark.parametrize("broken", ["its package has another name", "it cannot run the programs"])
def test_a_bundle_is_written_whatever_the_library_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """The package for GPUs is not called onnxruntime; and a self-test that fails costs its numbers, no bundle."""
    import importlib.metadata

    import onnxruntime

    from secateur.compiler import self_test

    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    def run_programs(*_: Any) -> None:
        raise RuntimeError("out of memory in Gemm\nat line 3")

    by_name = broken == "its package has another name"
    if by_name:
        monkeypatch.setattr(importlib.metadata, "version", version)
    else:
        monkeypatch.setattr(self_test, "run_programs", run_programs)
    geometry = Geometry(text_tokens=24, new_tokens=4)
    out = compile(ROOT / "demo/model", tmp_path / "out", recipe="none", geometry=geometry, force=True)
    stored = read_self_test(out, read_manifest(out))
    assert stored is not None
    assert any(case.numbers is not None for case in stored.cases) == by_name
    assert stored.made_with.get("onnxruntime") == (onnxruntime.__version__ if by_name else None)
    assert ("no survivors, tokens and logits: out of memory in Gemm" in caplog.text) != by_name


def test_what_cannot_be_made_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--self-test full: programs of fp16 for onnxruntime-cuda do not run"):
        compile(ROOT / "demo/model", tmp_path / "out", target="onnxruntime-cuda", self_test="full")
    with pytest.raises(UserError, match="--self-test full: programs of fp16 for plain do not run"):
        compile(ROOT / "demo/model", tmp_path / "out", target="plain", dtype="auto", self_test="full")
    assert not [*tmp_path.iterdir()]
