"""Options of the engine builder: what is refused before anything is traced, by text, with no library installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.exporters import engine_options
from secateur.exporters.engine_options import EngineOptions, check_library, check_options
from secateur.runtime.errors import UserError
from secateur.tools import cli


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_options, "has_driver", lambda: False)


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize(
    ("flavour", "options", "text"),
    [
        (
            "tensorrt-rtx",
            {"version_compatible": True},
            "--version-compatible: tensorrt-rtx cannot: its engines run on the release that built them, and the lean "
            "runtime they would need is not part of it; leave it out, and compile again for another release",
        ),
        (
            "tensorrt-rtx",
            {"hardware_compatible": True},
            "--hardware-compatible: tensorrt-rtx cannot: it ignores this; name every architecture instead: "
            "--sm 86 --sm 89 --sm 120",
        ),
        (
            "tensorrt-rtx",
            {"timing_cache": Path("cache")},
            "--timing-cache: tensorrt-rtx cannot: it measures nothing when it builds, and a cache would make it look "
            "for a GPU; leave it out",
        ),
        (
            "tensorrt-rtx",
            {"score_plugins": True},
            "--score-plugins: tensorrt-rtx cannot: its library takes no kernels compiled ahead of time; leave it out: "
            "scores are written out",
        ),
        (
            "tensorrt-rtx",
            {"weights": "stripped"},
            "--engine-weights stripped: tensorrt-rtx strips weights only where a GPU driver is (libcuda.so.1), and "
            "there is none here; take --engine-weights inputs: its engines hold as little, and are built without a GPU",
        ),
        ("tensorrt", {"opt_level": 6}, "--opt-level: no optimization level 6 (available: 0, 1, 2, 3, 4, 5)"),
        ("tensorrt", {"workspace": 0}, "--workspace: 0 bytes are no room; say 4GiB, for instance"),
        (
            "tensorrt",
            {"weights": "outside"},
            "--engine-weights: no place 'outside' for weights (available: inputs, plan, stripped)",
        ),
        (
            "tensorrt",
            {"timing_cache": Path("nowhere/cache")},
            "--timing-cache nowhere/cache: there is no directory nowhere; name a file; it is made if it is not there",
        ),
        (
            "tensorrt",
            {"timing_cache": Path(".")},
            "--timing-cache .: is a directory; name a file; it is made if it is not there",
        ),
    ],
)
def test_options_that_cannot_be(flavour: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        check_options(flavour, EngineOptions(**options))
    assert str(caught.value) == text


def test_options_that_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_options, "has_driver", lambda: True)
    every = EngineOptions("stripped", 1 << 30, 5, True, True, tmp_path / "cache", score_plugins=True)
    check_options("tensorrt", every)
    check_options("tensorrt-rtx", EngineOptions("stripped", 1 << 30, 0))


def test_options_the_version_has_no_name_for() -> None:
    old = SimpleNamespace(__version__="10.15.0", BuilderFlag=SimpleNamespace(STRIP_PLAN=1))
    check_library("tensorrt", old, EngineOptions())
    with pytest.raises(UserError) as caught:
        check_library("tensorrt", old, EngineOptions(weights="stripped"))
    assert str(caught.value) == (
        "--engine-weights stripped: tensorrt 10.15.0 has no BuilderFlag.REFIT_INDIVIDUAL; leave it out, or upgrade "
        "the library"
    )
    with pytest.raises(UserError, match=r"--workspace: .* 10\.15\.0 has no IBuilderConfig\.set_memory_pool"):
        check_library("tensorrt", old, EngineOptions(workspace=1))


def test_the_installed_library_has_every_name() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    check_library("tensorrt-rtx", trt, EngineOptions("stripped", 1, 1, True, True, Path("cache")))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--workspace", "1GiB"), "--workspace: target onnxruntime builds no engines; leave it out"),
        (("--engine-weights", "inputs"), "--engine-weights: target onnxruntime builds no engines; leave it out"),
        (("--target", "plain", "--strip-weights"), "--engine-weights: target plain builds no engines; leave it out"),
        (
            ("--strip-weights", "--engine-weights", "plan"),
            "--strip-weights: says the opposite of --engine-weights plan; give one",
        ),
        (("--workspace", "much"), "--workspace: 'much' is no size; give 24GiB, 80GB or a number of bytes"),
    ],
)
def test_the_command_line_refuses_before_it_reads_a_model(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", "no_such_model", "-o", "no_such_bundle", *arguments])
    assert (stop.value.code, capsys.readouterr().err.strip()) == (2, f"error: {text}")
