"""A bundle's programs in other toolchains: what ONNX Runtime was given and gave is recorded and run again there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.compiler.inputs import random_rows
from secateur.compiler.parity import TOLERANCE
from secateur.compiler.runs import CompiledRun
from secateur.runtime.backends import Buffer
from secateur.runtime.backends.onnxruntime import OnnxRuntimeBackend
from secateur.runtime.manifest import read_manifest
from secateur.runtime.session import Session

ROOT = Path(__file__).parents[2]
Values = dict[str, np.ndarray[Any, Any]]

OPENVINO = {
    "INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1,
}  # fmt: skip
"""Without the first two OpenVINO may compute in half precision."""


@dataclass(frozen=True)
class Call:
    """One run of a program: what its inputs held before, what its outputs held after."""

    graph: Path
    inputs: Values
    outputs: Values


class _Recorder(OnnxRuntimeBackend):
    """ONNX Runtime as it is installed, writing down every run."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, read_manifest(directory), threads=1)
        self.calls: list[Call] = []
        self._folder = directory

    def bind(
        self, program: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, variant: int = 0
    ) -> Any:
        bound, graph = super().bind(program, inputs, outputs, variant=variant), self._folder / f"{program}.onnx"
        return _Recorded(bound, lambda given, made: self.calls.append(Call(graph, given, made)), inputs, outputs)


@dataclass(frozen=True)
class _Recorded:
    bound: Any
    tell: Any
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]

    def run(self) -> None:
        given = {name: buffer.read() for name, buffer in self.inputs.items()}
        self.bound.run()
        self.tell(given, {name: buffer.read() for name, buffer in self.outputs.items()})


def record(bundle: Path, steps: int = 2) -> list[Call]:
    """Every program of a bundle on a random prompt and ``steps`` forced tokens, on the installed ONNX Runtime."""
    backend = _Recorder(bundle)
    with Session(bundle, backend=backend) as session:
        sizes = session.manifest.geometry
        CompiledRun(session.manifest, session.request()).run(random_rows(session.manifest, sizes.batch, steps, seed=0))
    return backend.calls


def differences(call: Call, made: Values) -> list[str]:
    """Outputs that are not what ONNX Runtime gave: integers, such as the tokens kept, must be equal, numbers within
    ``TOLERANCE`` of the largest magnitude, as they must be to the eager model's."""
    assert set(made) == set(call.outputs)
    found = []
    for name, expected in call.outputs.items():
        own = made[name]
        if own.shape != expected.shape or own.dtype != expected.dtype:
            found.append(f"{call.graph.stem}.{name}: {own.dtype}{own.shape} for {expected.dtype}{expected.shape}")
        elif expected.dtype.kind != "f":
            if not np.array_equal(own, expected):
                found.append(f"{call.graph.stem}.{name}: {int((own != expected).sum())} of {own.size} differ")
        elif not np.array_equal(np.isfinite(own), np.isfinite(expected)):
            found.append(f"{call.graph.stem}.{name}: other values are infinite")
        else:
            there = np.isfinite(expected)
            largest = np.abs(own - expected, where=there, out=np.zeros_like(expected)).max()
            scale = np.abs(expected, where=there, out=np.zeros_like(expected)).max()
            if largest > TOLERANCE * max(scale, 1.0):
                found.append(f"{call.graph.stem}.{name}: differs by {largest:.2e}, its largest value is {scale:.2e}")
    return found


def run_in_openvino(graph: Path, feeds: Sequence[Values]) -> list[Values]:
    """Outputs by name of every feed, on OpenVINO's CPU plugin."""
    import onnx
    import openvino

    core, names = openvino.Core(), [port.name for port in onnx.load(graph, load_external_data=False).graph.output]
    model = core.compile_model(str(graph), "CPU", OPENVINO)
    # By their own names: a port may have others beside it.
    made = [model(dict(feed)) for feed in feeds]
    return [{name: found[name].copy() for name in names} for found in made]


def other_onnxruntimes() -> list[str]:
    """Releases that `make test` installs beside the environment: the least and the newest."""
    return re.findall(r"^ONNXRUNTIMES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()


def run_in_onnxruntime(version: str, calls: Sequence[Call], work: Path) -> list[Values]:
    """Outputs of every call on another release, in a process of its own."""
    folder = ROOT / "build" / f"onnxruntime-{version}"
    assert (folder / ".installed").is_file(), f"{folder} is missing: make {folder.relative_to(ROOT)}/.installed"
    work.mkdir()
    for number, call in enumerate(calls):
        np.savez(work / f"{number}.npz", **call.inputs)  # type: ignore[arg-type]  # a port is not called allow_pickle
    (work / "graphs.json").write_text(json.dumps([str(call.graph) for call in calls]))
    worker = Path(__file__).with_name("onnxruntime_worker.py")
    path = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(worker), str(work)], capture_output=True, text=True,
                          env={**os.environ, **path}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(f"{version}."), f"onnxruntime {done.stdout} for {version}"
    made = []
    for number in range(len(calls)):
        with np.load(work / f"{number}.out.npz") as held:
            made.append(dict(held))
    return made
