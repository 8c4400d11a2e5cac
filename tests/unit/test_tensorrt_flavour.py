"""--target tensorrt takes the same road: checked against a stand-in module that records what it is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_engine_weights import save_graph

pytest.importorskip("polygraphy", reason="needs the extra tensorrt or tensorrt-rtx")

STAND_IN = """
import enum, os
__version__ = "11.4.0"
class ILogger: pass
class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
class IProgressMonitor: pass
class BuilderFlag(enum.IntEnum): TF32, VERSION_COMPATIBLE, STRIP_PLAN, REFIT_INDIVIDUAL = 7, 13, 17, 20
class NetworkDefinitionCreationFlag(enum.IntEnum): STRONGLY_TYPED = 1
class LayerType(enum.IntEnum): ATTENTION_INPUT = 1
class MemoryPoolType(enum.Enum): WORKSPACE = 0
class HardwareCompatibilityLevel(enum.Enum): AMPERE_PLUS = 1
class ProfilingVerbosity(enum.Enum): DETAILED = 1
def init_libnvinfer_plugins(logger, namespace): return True
class Layer:
    name, metadata, type = "attend", "[ONNX Layer: attend]", "LayerType.ATTENTION_INPUT"
class INetworkDefinition:
    num_layers = num_inputs = num_outputs = 1
    name = "Unnamed Network 0"
    def get_layer(self, index): return Layer()
    def mark_weights_refittable(self, name): print("mark", name); return True
class DeviceType(enum.Enum): GPU, DLA = range(2)
class Cache:
    def __init__(self, held): self.held = held
    def combine(self, other, ignore_mismatch): return True
    def serialize(self): return memoryview(b"measured " + self.held)
class IBuilderConfig:  # what Polygraphy prints of it, and no architecture to set
    __slots__ = ("cache", "cleared", "said", "progress_monitor", "profiling_verbosity")
    DLA_core, default_device_type, num_optimization_profiles = -1, DeviceType.GPU, 1
    def __init__(self): self.said = []
    def get_flag(self, flag): return False
    def clear_flag(self, flag): self.cleared = flag
    def set_flag(self, flag): self.said.append(flag.name)
    def set_memory_pool_limit(self, pool, limit): self.said.append(f"{pool.name} {limit}")
    def create_timing_cache(self, held): return Cache(held)
    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        self.said.append(f"cache of {len(cache.held)} bytes")
        return cache.held != b"of another GPU"
    def get_timing_cache(self): return self.cache
    builder_optimization_level = property(None, lambda self, level: self.said.append(f"level {level}"))
    hardware_compatibility_level = property(None, lambda self, level: self.said.append(f"hardware {level.name}"))
class Builder:
    def __init__(self, logger): pass
    def create_network(self, flags): print("typed", flags); return INetworkDefinition()
    def create_builder_config(self): return IBuilderConfig()
    def build_serialized_network(self, network, config):
        config.progress_monitor.phase_start("Building engine", None, 1)
        goes_on = config.progress_monitor.step_complete("Building engine", 0)
        config.progress_monitor.phase_finish("Building engine")
        print("build", network.name, config.cleared.name, config.profiling_verbosity.name, goes_on, *config.said)
        return b"plan"
class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger): pass
    def parse_from_file(self, path):
        folder, _, name = path.rpartition("/")
        print("parse", name, *["elsewhere"] * (folder not in ("", os.getcwd())))
        return True
"""


def run_with_stand_in(directory: Path, script: str, stand_in: str = STAND_IN) -> list[str]:
    """What a script prints, in a process of its own in which ``tensorrt`` is the stand-in."""
    (directory / "tensorrt.py").write_text(stand_in)
    paths = os.pathsep.join([str(directory), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=directory, env={**os.environ, "PYTHONPATH": paths}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_same_road_for_the_datacentre_library(tmp_path: Path) -> None:
    (tmp_path / "prefill.onnx").write_bytes(b"")
    script = """
from secateur.exporters.tensorrt import build_engine
from secateur.exporters.tensorrt_library import load_library
from secateur.runtime.errors import SecateurError
info = build_engine("prefill.onnx", "prefill.engine", flavour="tensorrt", progress=lambda *step: print(*step))
print(info.layer_types, open("prefill.engine", "rb").read())
import sys, types
sys.modules["tensorrt_rtx"] = types.ModuleType("tensorrt_rtx")
try:
    load_library("tensorrt-rtx")
except SecateurError as error:
    print(error)
"""
    assert run_with_stand_in(tmp_path, script) == [
        "typed 2",
        "parse prefill.onnx",
        "Building engine 0 1",
        "Building engine 1 1",
        "Building engine 1 1",
        "build prefill TF32 DETAILED True",
        "(('ATTENTION_INPUT', 1),) b'plan'",
        "--target tensorrt-rtx: this process builds for tensorrt; build in a process of its own",
    ]


OPTIONS = """
import secateur.exporters.engine_options as engine_options, secateur.exporters.tensorrt as tensorrt
from pathlib import Path
engine_options.has_driver, tensorrt.find_architecture = lambda: True, lambda: 90
def build(**options):
    made = tensorrt.EngineOptions(**options)
    return tensorrt.build_engine("vision.onnx", "vision.engine", flavour="tensorrt", options=made)
"""


def test_options_become_what_the_library_calls_them(tmp_path: Path) -> None:
    save_graph(tmp_path)
    script = """
print(build(workspace=1 << 30, opt_level=5, version_compatible=True, hardware_compatible=True))
print(build(weights="stripped").weights)
print(build(weights="inputs").weights)
"""
    assert run_with_stand_in(tmp_path, OPTIONS + script) == [
        "typed 2",
        "parse vision.onnx elsewhere",
        "build vision TF32 DETAILED True WORKSPACE 1073741824 level 5 VERSION_COMPATIBLE hardware AMPERE_PLUS",
        "vision.engine: tensorrt 11.4.0, SM90, 4 bytes",
        "typed 2",
        "parse vision.onnx",
        "mark matrix",
        "build vision TF32 DETAILED True STRIP_PLAN REFIT_INDIVIDUAL",
        "('matrix',)",
        "typed 2",
        "parse vision.onnx elsewhere",
        "build vision TF32 DETAILED True",
        "('matrix',)",
    ]


def test_a_timing_cache_is_read_first_and_added_to(tmp_path: Path) -> None:
    (tmp_path / "vision.onnx").write_bytes(b"")
    script = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
cache = Path("cache")
for held in (None, b"", b"of another GPU"):
    if held:
        cache.write_bytes(held)
    build(timing_cache=cache)
    print(cache.read_bytes())
"""
    built = "build vision TF32 DETAILED True cache of"
    assert [line for line in run_with_stand_in(tmp_path, OPTIONS + script) if line[:5] not in ("typed", "parse")] == [
        f"{built} 0 bytes",
        "b'measured '",
        f"{built} 9 bytes",
        "b'measured measured '",
        "cache: the timing cache is of another GPU or version and is made anew",
        f"{built} 14 bytes cache of 0 bytes",
        "b'measured '",
    ]


def test_networks_are_typed_where_there_is_no_flag_for_it(tmp_path: Path) -> None:
    (tmp_path / "vision.onnx").write_bytes(b"")
    without = STAND_IN.replace("STRONGLY_TYPED = 1", "PREFER_AOT_PYTHON_PLUGINS = 2")
    assert run_with_stand_in(tmp_path, OPTIONS + "build()", without)[0] == "typed 0"
