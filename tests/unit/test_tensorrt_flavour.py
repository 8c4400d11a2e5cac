"""--target tensorrt takes the same road: checked against a stand-in module that records what it is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("polygraphy", reason="needs the extra tensorrt or tensorrt-rtx")

STAND_IN = """
import enum
__version__ = "11.4.0"
class ILogger: pass
class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
class IProgressMonitor: pass
class BuilderFlag(enum.IntEnum): TF32 = 7
class NetworkDefinitionCreationFlag(enum.IntEnum): STRONGLY_TYPED = 1
class LayerType(enum.IntEnum): ATTENTION_INPUT = 1
def init_libnvinfer_plugins(logger, namespace): return True
class Layer:
    name, metadata, type = "attend", "[ONNX Layer: attend]", "LayerType.ATTENTION_INPUT"
class Network:
    num_layers = num_inputs = num_outputs = 1
    name = "Unnamed Network 0"
    def get_layer(self, index): return Layer()
class DeviceType(enum.Enum): GPU, DLA = range(2)
class Config:  # what Polygraphy prints of it, and no architecture to set
    __slots__ = ("progress_monitor", "cleared")
    DLA_core, default_device_type, num_optimization_profiles = -1, DeviceType.GPU, 1
    def get_flag(self, flag): return False
    def clear_flag(self, flag): self.cleared = flag
class Builder:
    def __init__(self, logger): pass
    def create_network(self, flags): print("typed", flags); return Network()
    def create_builder_config(self): return Config()
    def build_serialized_network(self, network, config):
        config.progress_monitor.phase_start("Building engine", None, 1)
        goes_on = config.progress_monitor.step_complete("Building engine", 0)
        config.progress_monitor.phase_finish("Building engine")
        print("build", network.name, config.cleared.name, goes_on)
        return b"plan"
class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger): pass
    def parse_from_file(self, path): print("parse", path.rpartition("/")[2]); return True
"""


def test_same_road_for_the_datacentre_library(tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text(STAND_IN)
    (tmp_path / "prefill.onnx").write_bytes(b"")
    script = """
from secateur.exporters.tensorrt import build_engine
from secateur.exporters.tensorrt_library import load_library
from secateur.runtime.errors import SecateurError
info = build_engine("prefill.onnx", "prefill.engine", flavour="tensorrt", progress=lambda *step: print(*step))
print(info.sm, info.layer_types, open("prefill.engine", "rb").read())
import sys, types
sys.modules["tensorrt_rtx"] = types.ModuleType("tensorrt_rtx")
try:
    load_library("tensorrt-rtx")
except SecateurError as error:
    print(error)
"""
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "typed 2",
        "parse prefill.onnx",
        "Building engine 0 1",
        "Building engine 1 1",
        "Building engine 1 1",
        "build prefill TF32 True",
        "None (('ATTENTION_INPUT', 1),) b'plan'",
        "--target tensorrt-rtx: this process builds for tensorrt; build in a process of its own",
    ]
