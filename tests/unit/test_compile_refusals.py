"""What compile refuses, in one line with exit code 2, and that no half-written bundle is ever left."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.compiler import build_bundle, output, pipeline
from secateur.compiler.output import whole_directory
from secateur.compiler.pipeline import Geometry
from secateur.exporters import weights
from secateur.runtime.errors import UserError
from secateur.tools import cli

from .tiny_model import write_config

GEOMETRY = Geometry(text_tokens=24, new_tokens=8)
NAMES = ", ".join(sorted(pipeline.RECIPES))
PASS_NAMES = ", ".join(p.name for p in pipeline.PASSES)
KEEP = "1 keeps every visual token, 0.25 a quarter of them"


@pytest.fixture(autouse=True)
def never_traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is noticed before the model is traced; tests that go on say so by naming `traced`."""
    if "traced" not in request.fixturenames:
        monkeypatch.setattr(pipeline, "trace_model", lambda *_: pytest.fail("the model was traced"))


def secateur(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # what writing the model printed
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


ARGUMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "recipe": (
        ("--recipe", "fastvv"),
        f"--recipe: no recipe 'fastvv' (available: {NAMES}); or give a .yaml file, or FILE.py:NAME",
    ),
    "recipe file": (("--recipe", "absent.yaml"), "absent.yaml: cannot read it: No such file or directory"),
    "keep 0": (("--recipe", "fastv", "--keep", "0"), f"--keep: keep ratio 0 is out of (0, 1]; {KEEP}"),
    "keep -1": (("--recipe", "fastv", "--keep", "-1"), f"--keep: keep ratio -1 is out of (0, 1]; {KEEP}"),
    "keep 1.5": (("--recipe", "fastv", "--keep", "1.5"), f"--keep: keep ratio 1.5 is out of (0, 1]; {KEEP}"),
    "keep nan": (("--recipe", "fastv", "--keep", "nan"), f"--keep: keep ratio nan is out of (0, 1]; {KEEP}"),
    "keep inf": (("--recipe", "fastv", "--keep", "inf"), f"--keep: keep ratio inf is out of (0, 1]; {KEEP}"),
    "keep nothing": (
        ("--keep", "0.5"),
        "--keep 0.5: recipe none keeps every token; leave --keep out or choose a recipe",
    ),
    "text tokens": (
        ("--text-tokens", "0"), "geometry: text_tokens is 0; give --text-tokens a number of at least 1"
    ),
    "images": (("--images", "-2"), "geometry: images is -2; give --images a number of at least 1"),
    "target": (
        ("--target", "tensorflow"),
        "--target: no target 'tensorflow' (available: onnxruntime, onnxruntime-cuda, plain, tensorrt, tensorrt-rtx)",
    ),
    "dtype": (("--dtype", "int8"), "--dtype: no dtype 'int8' (available: fp32, fp16, bf16, auto)"),
    "architecture": (("--sm", "89"), "--sm: target onnxruntime has no GPU architecture; leave --sm out"),
    "fp32 engine": (
        ("--target", "tensorrt-rtx", "--dtype", "fp32"),
        "--dtype fp32: tensorrt-rtx has no fused attention in fp32 (available: fp16, bf16); "
        "compile with --dtype fp16; norms and scores stay in fp32 inside the graph",
    ),
    "pass": (("--stop-after", "prune"), f"--stop-after: no pass 'prune' (available: {PASS_NAMES})"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(capsys: pytest.CaptureFixture[str], model_dir: Any, tmp_path: Path, case: str) -> None:
    arguments, text = ARGUMENTS[case]
    code, out, err = secateur(capsys, "compile", model_dir(), "-o", tmp_path / "out", *arguments)
    assert (code, out, err) == (2, "", f"error: {text}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_word_where_a_number_belongs(capsys: pytest.CaptureFixture[str], model_dir: Any, tmp_path: Path) -> None:
    code, _, err = secateur(capsys, "compile", model_dir(), "-o", tmp_path / "out", "--keep", "half")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: Invalid value for '--keep': ")
    assert err.endswith("; see secateur compile --help\n")


RECIPES: dict[str, tuple[str, str]] = {
    "site": ("site: decoder.out", "site: no site 'decoder.out' (available: vision.layer[i], vision.out, projector.out, "
                                  "audio.out, decoder.layer[k])"),
    "signal": ("site: vision.out, score: {name: last_query_attention_mean, options: {heads: mean}}",
               "signals.last_query_attention: signal 'last_query_attention' does not exist at vision.out "
               "(available: decoder.layer)"),
    "score": ("site: vision.out, score: magic", "score: no score 'magic' (available: "),
    "option": ("site: vision.out, score: {name: seeded_random, options: {sed: 1}}",
               "score.options: seeded_random has no option 'sed' (available: seed)"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_recipe_files(capsys: pytest.CaptureFixture[str], model_dir: Any, tmp_path: Path, case: str) -> None:
    fields, text = RECIPES[case]
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nstages: [{{{fields}, select: top_k, share: 0.5}}]")
    code, out, err = secateur(capsys, "compile", model_dir(), "-o", tmp_path / "out", "--recipe", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {path}: stages[0].{text}")
    assert list(tmp_path.iterdir()) == [path]


def test_a_site_beyond_the_last_layer(capsys: pytest.CaptureFixture[str], model_dir: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    score = "score: {name: last_query_attention_mean, options: {heads: mean}}"
    path.write_text(f"name: mine\nstages: [{{site: 'decoder.layer[4]', {score}, select: top_k, share: 0.5}}]")
    code, _, err = secateur(capsys, "compile", model_dir(), "-o", tmp_path / "out", "--recipe", path)
    assert (code, err) == (
        2,
        "error: recipe: site decoder.layer[4] is beyond the last layer "
        "(available: decoder.layer[0] to decoder.layer[3])\n",
    )


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_library_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setitem(sys.modules, target.replace("-", "_"), None)
    monkeypatch.setattr("secateur.exporters.tensorrt.has_driver", lambda: True)
    code, _, err = secateur(capsys, "compile", model_dir(), "-o", tmp_path / "out", "--target", target)
    assert (code, err.count("\n")) == (2, 1)
    start = f"error: --target {target}: the library is not installed; install it with: pip install 'secateur[{target}]'"
    assert err.startswith(start)


def test_no_output_is_named(capsys: pytest.CaptureFixture[str], model_dir: Any) -> None:
    code, _, err = secateur(capsys, "compile", model_dir())
    assert (code, err) == (2, "error: --output: no place for the bundle; name a directory: -o BUNDLE\n")


def test_a_directory_without_a_tokenizer_or_weights(
    capsys: pytest.CaptureFixture[str], model_dir: Any, tmp_path: Path
) -> None:
    source = write_config(tmp_path / "model")
    code, _, err = secateur(capsys, "compile", source, "-o", tmp_path / "out")
    assert (code, err) == (
        2,
        f"error: {source}: no tokenizer.json; save the processor with transformers "
        "(AutoProcessor.save_pretrained) into the model directory\n",
    )
    for path in model_dir().iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, source)
    code, _, err = secateur(capsys, "compile", source, "-o", tmp_path / "out")
    assert (code, err) == (
        2,
        f"error: {source}: no model.safetensors; save the model with save_pretrained; other weight formats "
        "are not read\n",
    )
    for name, content in (("tokenizer.json", "{"), ("generation_config.json", "[")):
        before = (source / name).read_text()
        (source / name).write_text(content)
        code, _, err = secateur(capsys, "compile", source, "-o", tmp_path / "out")
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {source / name}: not ")
        (source / name).write_text(before)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# -- outputs that exist -----------------------------------------------------------------------------------


def make_bundle(path: Path, **more: str) -> Path:
    """The least that counts as a bundle, with files of the given names and contents."""
    path.mkdir()
    files: dict[str, Any] = {name.replace("__", "."): text for name, text in more.items()}
    for name, text in files.items():
        (path / name).write_text(text)
    (path / "manifest.json").write_text(json.dumps({"secateur": "0.0.1", "files": dict.fromkeys(files)}))
    return path


def contents(path: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in path.iterdir()}


def test_outputs_that_exist_are_refused(capsys: pytest.CaptureFixture[str], model_dir: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    link = tmp_path / "link"
    bundle, folder = make_bundle(tmp_path / "bundle"), tmp_path / "folder"
    link.symlink_to(bundle)
    mixed = make_bundle(tmp_path / "mixed")
    (mixed / "notes.txt").write_text("mine")
    foreign = make_bundle(tmp_path / "foreign")
    (foreign / "manifest.json").write_text('{"name": "a browser extension", "files": {}}')
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    only = "--force replaces bundles only; choose another directory"
    for path, force, text in (
        (bundle, False, "exists already; choose another directory, or replace it with --force"),
        (folder, False, "exists already; choose another directory, or replace it with --force"),
        (file, True, "is a file; name a directory for the bundle"),
        (link, True, "is a link; name the directory it points to, or a new one"),
        (folder, True, f"exists and is not a bundle; {only}"),
        (foreign, True, f"exists and is not a bundle; {only}"),
        (mixed, True, f"holds what is no part of the bundle: notes.txt; {only}"),
    ):
        code, _, err = secateur(capsys, "compile", model_dir(), "-o", path, *(["--force"] if force else []))
        assert (code, err) == (2, f"error: {path}: {text}\n")
    assert (folder / "thesis.txt").read_text() == (mixed / "notes.txt").read_text() == file.read_text() == "mine"


def test_a_bundle_is_replaced_whole(tmp_path: Path) -> None:
    out = make_bundle(tmp_path / "out", old__onnx="old")
    with whole_directory(out, force=True) as work:
        (work / "new.onnx").write_text("new")
        assert (out / "old.onnx").read_text() == "old"
    assert contents(out) == {"new.onnx": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_and_missing_parents_will_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        with whole_directory(out, force=False) as work:
            (work / "x").write_text("x")
        assert contents(out) == {"x": "x"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), SystemExit()])
@pytest.mark.parametrize("when", ["inside", "at the end", "after the old one moved"])
def test_whatever_happens_the_old_bundle_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str
) -> None:
    out = make_bundle(tmp_path / "out", old__onnx="old")
    before = contents(out)
    moves: list[Path] = []
    move = output.os.replace

    def fail_to_move(source: Path, target: Path) -> None:
        moves.append(source)
        if len(moves) == (1 if when == "at the end" else 2):
            raise error
        move(source, target)

    if when != "inside":
        monkeypatch.setattr(output.os, "replace", fail_to_move)

    def replace() -> None:
        with whole_directory(out, force=True) as work:
            (work / "new.onnx").write_text("new")
            if when == "inside":
                raise error

    with pytest.raises(type(error)):
        replace()
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as caught, whole_directory(tmp_path / "file" / "out", force=False):
        pass
    assert str(caught.value).startswith(f"{tmp_path / 'file' / 'out'}: cannot be written (")
    assert str(caught.value).endswith("); choose another place")


# -- in the middle ----------------------------------------------------------------------------------------


@pytest.fixture
def half_way(traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """``half_way(error)`` makes writing the weights fail when half of them are written."""
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: traced())
    real = build_bundle.write_weights

    def arm(error: BaseException) -> None:
        def write(layout: Any, checkpoint: Any, path: Path, on_bytes: Any) -> str:
            def stop(done: int, total: int) -> None:
                assert path.stat().st_size > 0
                if done > total / 2:
                    raise error

            return real(layout, checkpoint, path, stop)

        monkeypatch.setattr(build_bundle, "write_weights", write)

    return arm


FULL = "disk full; free some space or choose another directory"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, FULL),
    ],
)
@pytest.mark.parametrize("replaced", [False, True])
def test_failing_in_the_middle_of_the_weights(
    capsys: pytest.CaptureFixture[str], model_dir: Any, traced: Any, half_way: Any, tmp_path: Path,
    error: BaseException, code: int, text: str, replaced: bool,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    before = contents(make_bundle(out, old__onnx="old")) if replaced else None
    half_way(error)
    sizes = ("--text-tokens", 24, "--new-tokens", 8, "--force")
    got, printed, err = secateur(capsys, "-q", "compile", model_dir(), "-o", out, *sizes)
    assert (got, printed, err) == (code, "", f"error: {text}\n")
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if replaced else [])
    assert not replaced or contents(out) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB, where the user may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("told", [True, False], ids=["told beforehand", "while writing"])
def test_a_disk_that_is_really_full(
    capsys: pytest.CaptureFixture[str], model_dir: Any, traced: Any, small_disk: Path,
    monkeypatch: pytest.MonkeyPatch, told: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: traced())
    if not told:
        monkeypatch.setattr(weights, "require_space", lambda *_: None)
    sizes = ["--text-tokens", 24, "--new-tokens", 8, *["--ignore-forecast"] * (not told)]
    code, out, err = secateur(capsys, "-q", "compile", model_dir(), "-o", small_disk / "out", *sizes)
    assert (code, out, err.count("\n")) == (2 if told else 1, "", 1)
    assert "disk full" in err
    more = "; --ignore-forecast goes on anyway" if told else ""
    assert err.endswith(f"free some space or choose another directory{more}\n")
    assert list(small_disk.iterdir()) == []


def test_the_weights_of_another_model(
    capsys: pytest.CaptureFixture[str], model_dir: Any, traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(model_dir(), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "mlp" not in n}, source / "model.safetensors")
    trace = traced()
    monkeypatch.setattr(pipeline, "trace_model", lambda found, *_: type(trace)(
        found, trace.geometry, trace.dtype, trace.model, trace.programs))  # fmt: skip
    sizes = ("--text-tokens", 24, "--new-tokens", 8)
    code, _, err = secateur(capsys, "-q", "compile", source, "-o", tmp_path / "out", *sizes)
    assert code == 2
    assert err.startswith(f"error: {source}: checkpoint lacks 24 tensors: model.vision_tower.encoder.layers.0.mlp.fc1.")
    assert err.endswith("and 21 more; download the whole checkpoint, or check that config.json belongs to it\n")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = secateur(capsys, "--debug", "compile", tmp_path / "absent", "-o", tmp_path / "out")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.endswith("absent: no such directory; give the directory of a Hugging Face model\n")


def test_the_current_directory_is_not_replaced(
    capsys: pytest.CaptureFixture[str], model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for out in (".", tmp_path):
        code, _, err = secateur(capsys, "compile", model_dir(), "-o", out, "--force")
        assert (code, err) == (2, f"error: {out}: is the directory you are in; name a new one, such as ./bundle\n")
