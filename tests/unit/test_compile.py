"""Compiling: bundles that run, are the same each time, and say on the command line what they are."""

from __future__ import annotations

import filecmp
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.pipeline import PASSES, Geometry
from secateur.runtime.manifest import check_files, read_manifest
from secateur.runtime.session import Session
from secateur.tools import cli

from .tiny_model import DECODERS, EOS, IMAGE

GEOMETRY = Geometry(text_tokens=24, new_tokens=8)
SIZES = ("--text-tokens", "24", "--new-tokens", "8")


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch, traced: Callable[..., Any]) -> None:
    """Compile from the session's traces; they are of the same geometry."""

    def trace(source: Any, geometry: Geometry, dtype: str) -> Any:
        found = traced(source.text.model_type, dtype, geometry.batch, geometry.images)
        assert (source.path, geometry) == (found.source.path, found.geometry)
        return found

    monkeypatch.setattr(pipeline, "trace_model", trace)


@pytest.fixture(scope="module")
def bundle(
    model_dir: Callable[..., Path], traced: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The Llama model with FastV; do not change it."""
    out = tmp_path_factory.mktemp("compiled") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "trace_model", lambda source, geometry, dtype: traced())
        assert pipeline.compile(model_dir(), out, recipe="fastv", geometry=GEOMETRY) == out
    return out


def secateur(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


# -- what a bundle is -------------------------------------------------------------------------------------


def test_a_bundle_holds_what_its_manifest_says(bundle: Path, model_dir: Callable[..., Path]) -> None:
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, "full")
    assert {*list_files(bundle)} == {*manifest.files, "manifest.json"}
    assert bundle.stat().st_mode & 0o777 == 0o755
    text = (bundle / "manifest.json").read_text()
    assert str(model_dir().parent) not in text
    assert str(bundle.parent) not in text
    m = manifest.model
    assert (m.source, m.architecture, m.layers, m.image_token, m.image_token_id, m.eos_token_ids) == (
        "llama", "LlavaForConditionalGeneration", 4, "<image>", IMAGE, [EOS],
    )  # fmt: skip
    assert (manifest.target, manifest.dialect, manifest.dtype, manifest.opset) == ("onnxruntime",) * 2 + ("fp32", 23)
    assert [(s.name, s.length, s.capacity, s.removed) for s in manifest.segments] == [
        ("s0", 40, 48, 0), ("s1", 32, 40, 8),
    ]  # fmt: skip
    prefill = manifest.programs["prefill"]
    assert prefill.flops < prefill.unpruned_flops
    assert manifest.programs["vision"].flops == manifest.programs["vision"].unpruned_flops


def test_ports_of_the_manifest_are_those_of_the_graphs(bundle: Path) -> None:
    import onnx

    for name, program in read_manifest(bundle).programs.items():
        graph = onnx.load(bundle / f"{name}.onnx", load_external_data=False).graph
        for ports, values in ((program.inputs, graph.input), (program.outputs, graph.output)):
            shapes = [(v.name, [d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]
            assert [(p.name, p.shape) for p in ports] == shapes


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.usefixtures("traced_once")
def test_bundles_of_both_dialects_answer_alike(model_dir: Callable[..., Path], tmp_path: Path, decoder: str) -> None:
    answers = []
    for target in ("onnxruntime", "plain"):
        out = tmp_path / target
        pipeline.compile(model_dir(decoder), out, recipe="pyramiddrop", keep=0.25, geometry=GEOMETRY, target=target)
        with Session(out, threads=1) as session:
            answers.append(session.generate("what?", picture(), max_new_tokens=8))
    assert answers[0].tokens == answers[1].tokens
    assert list(answers[0].metrics.visual_tokens.values()) == [16, 10, 6, 4]


@pytest.mark.usefixtures("traced_once")
def test_rows_of_a_batch_answer_as_they_do_alone(model_dir: Callable[..., Path], tmp_path: Path, bundle: Path) -> None:
    """Two rows of different length in one bundle, against the same rows one by one in another."""
    pair = Geometry(batch=2, text_tokens=24, new_tokens=8)
    pipeline.compile(model_dir(), tmp_path / "pair", recipe="fastv", geometry=pair)
    prompts, images = ["a?", "more?"], [picture(1), picture(2)]
    with Session(tmp_path / "pair", threads=1) as session:
        together = [g.tokens for g in session.generate(prompts, [[i] for i in images], max_new_tokens=8)]
    with Session(bundle, threads=1) as session:
        alone = [session.generate(p, i, max_new_tokens=8).tokens for p, i in zip(prompts, images, strict=True)]
    assert together == alone


# -- the same each time -----------------------------------------------------------------------------------

TWICE = """
import sys, time
from secateur.compiler import build_bundle, pipeline
from secateur.tools import cli

def compile_to(out):
    try:
        cli.main([*sys.argv[2:], "-o", out])
    except SystemExit as end:
        return end.code

folder = sys.argv[1]
assert compile_to(folder + "/whole") == 0
traced, real = [], build_bundle.write_weights

def wait_in_the_middle(layout, checkpoint, path, on_bytes):
    def stop(done, total):
        if done > total / 2:
            print("half written", flush=True)
            time.sleep(60)
    return real(layout, checkpoint, path, stop)

build_bundle.write_weights = wait_in_the_middle
sys.exit(compile_to(folder + "/interrupted"))
"""


def test_another_process_writes_the_same_bytes_and_an_interrupt_leaves_nothing(
    bundle: Path, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """One process to save time: it compiles with another hash seed, then again, and is interrupted (Ctrl-C)."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = ["compile", model_dir(), "--recipe", "fastv", *SIZES]
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE, str(tmp_path), *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert process.stdout is not None
    line = ""
    while line != "half written\n" and process.poll() is None:
        line = process.stdout.readline()
    during = sorted(p.name for p in tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.endswith("error: interrupted\n")
    assert "Traceback" not in err
    assert [re.fullmatch(r"\.interrupted\..*\.partial", during[0]) is not None, *during[1:]] == [True, "whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
    assert same_directory(tmp_path / "whole", bundle)


def list_files(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def same_directory(one: Path, other: Path) -> bool:
    names = list_files(one)
    assert names == list_files(other)
    differing = [n for n in names if not filecmp.cmp(one / n, other / n, shallow=False)]
    assert differing == []
    return True


@pytest.mark.usefixtures("traced_once")
def test_compiling_again_gives_the_same_bytes(bundle: Path, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    pipeline.compile(model_dir(), tmp_path / "again", recipe="fastv", keep=0.5, geometry=GEOMETRY)
    assert same_directory(tmp_path / "again", bundle)


# -- the verb ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("traced_once")
def test_the_summary(capsys: pytest.CaptureFixture[str], model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model, out = model_dir(), tmp_path / "bundle"
    capsys.readouterr()  # writing a model shows a bar
    code, text, err = secateur(capsys, "compile", model, "-o", out, "--recipe", "fastv", *SIZES)
    assert code == 0
    lines = text.splitlines()
    assert [line.split()[:6] for line in lines[2:4]] == [
        ["s0", "0-0", "40", "16", "40", "48"],
        ["s1", "1-3", "32", "8", "32", "40"],
    ]
    assert [line.split()[0] for line in lines[7:10]] == ["vision", "prefill", "decode"]
    assert re.fullmatch(rf"{re.escape(str(out))}: fastv, keep 0.5, onnxruntime, fp32, \d+\.\d [KM]iB", lines[-3])
    assert lines[-2] == "A row holds 1 image(s) of 32x32."
    assert lines[-1] == f'Next: secateur run {out} --image photo.png --prompt "What is in the picture?"'
    said = err.splitlines()
    phases = [line.split()[0] for line in said if re.fullmatch(r"\w+ +\d+\.\d s", line)]
    assert phases == ["trace", "prune", "export", "weights"]
    # The forecast stands before what takes long.
    first, last = (next(i for i, line in enumerate(said) if line.startswith(w)) for w in ("Forecast for", "weights  "))
    assert said[first - 1].startswith("export")
    assert [line.split()[0] for line in said[first + 2 : last]] == [
        "graphs", "weights", "caches", "activations", "inputs", "device", "memory", "disk"
    ]  # fmt: skip


@pytest.mark.usefixtures("traced_once")
def test_the_summary_as_json(
    capsys: pytest.CaptureFixture[str], model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "a bundle"
    sizes = ("--batch", "2", *SIZES)
    code, text, err = secateur(capsys, "-q", "compile", model_dir(), "-o", out, "--json", *sizes)
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert found["bundle"] == str(out)
    assert found["bytes"] > 600_000
    assert found["segments"] == [{"layers": [0, 3], "visual": 16, "text": 24, "length": 40}]
    assert list(found["flops"]) == ["vision", "prefill", "decode"]
    assert all(f["before"] == f["after"] > 0 for f in found["flops"].values())
    question = '--prompt "What is in the picture?"'
    assert found["next"] == f"secateur run '{out}' --image photo1.png --image photo2.png {question} {question}"


@pytest.mark.usefixtures("traced_once")
def test_stopping_prints_the_programs_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stop = ("--stop-after", "insert_decoder_stages")
    code, text, _ = secateur(capsys, "compile", model_dir(), "--recipe", "fastv", *stop, *SIZES)
    assert code == 0
    assert text.startswith("recipe fastv keep=0.5\n  stage0 decoder.layer[1] ")
    programs = [line.split()[1] for line in text.splitlines() if line.startswith("program ")]
    assert programs == ["vision", "embedding", "head", "prefill_decoder", "decode_decoder"]
    code, as_json, _ = secateur(capsys, "compile", model_dir(), "--recipe", "fastv", "--json", *stop, *SIZES)
    assert json.loads(as_json) == {"stopped_after": "insert_decoder_stages", "text": text.rstrip("\n")}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced_once")
def test_dumps_are_numbered_per_pass(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    pipeline.compile(
        model_dir(), tmp_path / "out", recipe="divprune", geometry=GEOMETRY, dump_dir=tmp_path / "dumps" / "deep"
    )
    dumps = sorted((tmp_path / "dumps" / "deep").iterdir())
    names = ["trace", *(p.name for p in PASSES), "export"]
    assert [p.name for p in dumps] == [f"{i:02}_{name}.txt" for i, name in enumerate(names)]
    text = [p.read_text() for p in dumps]
    assert all(t.strip() for t in text)
    assert text[0].count("program ") == 4
    assert "Scan x1" in text[-1]


@pytest.mark.usefixtures("traced_once")
def test_progress_is_told_per_phase_and_per_tensor(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    pipeline.compile(model_dir(), tmp_path / "out", geometry=GEOMETRY, progress=lambda *what: told.append(what))
    assert list(dict.fromkeys(what for what, _, _ in told)) == ["trace", "prune", "export", "weights", "self-test"]
    written = [(done, total) for what, done, total in told if what == "weights"][1:]
    size = (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert written[-1] == (size, size)
    assert [done for done, _ in written] == sorted(done for done, _ in written)


def test_a_bar_shows_the_step_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal; the bars of parts come and go with them, and nothing stays but what was logged."""
    import io

    from rich.console import Console

    from secateur.tools import progress
    from secateur.tools.console import set_up_logging

    set_up_logging()  # as the command line does; whoever logs less is shown no bars
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress, "notes", terminal)
    with progress.show_progress() as tell:
        for what, done, total in (
            ("trace", 0, 0), ("weights", 0, 0), ("weights", 50, 100), ("engine prefill", 0, 0),
            ("engine prefill: Building", 0, 4), ("engine prefill: Tactics", 0, 2), ("engine prefill: Tactics", 2, 2),
        ):  # fmt: skip
            tell(what, done, total)
    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    assert "engine prefill: Building" in shown
    assert "Tactics" not in shown.rpartition("Building")[2]
