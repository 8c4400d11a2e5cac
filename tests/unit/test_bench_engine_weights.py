"""The table of where engines' weights lie: what it says without a GPU, with one, and of what does not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.null import tiny_bundle

from secateur.tools.bench import engine_weights


def report(gpu: int | None, **device: Any) -> dict[str, Any]:
    def program(constants: int) -> dict[str, Any]:
        return {"bytes": 3_400_000, "outside": 0, "seconds": 2.5, "types": {"CONSTANT": constants, "SHUFFLE": 4}}

    ways = {"inputs": {"programs": {"decode": program(5)}}, "plan": {"programs": {"decode": program(9)}}}
    ways |= {"stripped": {"refused": "no driver"}}
    ways["inputs"] |= {"device": device} if device else {}
    return {"target": "tensorrt-rtx", "dtype": "fp16", "gpu": gpu, "ways": ways}


def lines(told: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    for drawn in engine_weights.draw(told):
        engine_weights.results.print(drawn, markup=False, soft_wrap=True)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(report(None), capsys)
    assert said[2:] == [
        "inputs decode 3.40 0.00 2.5 CONSTANT -4",
        "plan decode 3.40 0.00 2.5 none",
        "stripped: not built: no driver",
        "No GPU is here: device memory and times were not measured.",
    ]


def test_with_a_gpu_memory_and_times_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(report(89, bytes=50_000_000, prefill=0.004, step=0.0005), capsys)
    assert said[-1] == "inputs 50.0 4.00 0.50"
    assert "inputs: does not run: no memory" in lines(report(89, failed="no memory"), capsys)


def test_a_bundle_is_opened_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On ONNX Runtime, whose device memory is made up: what a GPU adds is the backend."""
    pytest.importorskip("onnxruntime")
    free = iter((1000, 400))
    monkeypatch.setattr(engine_weights, "_free_bytes", lambda: next(free))
    monkeypatch.setattr(engine_weights, "_REPEAT", 1)
    found = engine_weights.run_once_opened(tiny_bundle.build(tmp_path / "bundle"))
    assert found["bytes"] == 600
    assert min(found["prefill"], found["step"]) > 0
