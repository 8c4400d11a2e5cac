"""A bundle runs where torch, transformers and onnx are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from secateur.runtime import Session
with Session(sys.argv[1], threads=1) as session:
    print(session.generate("what", sys.argv[2], ignore_eos=True).tokens)
"""


def test_a_bundle_runs_without_the_compiler(built: Path, image_file: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(built), str(image_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(",")) == 8
