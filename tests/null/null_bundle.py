"""The tiny bundle with engines of the null library, as a compilation for TensorRT would leave it."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from secateur.runtime import Session
from secateur.runtime.errors import SecateurError

from . import null_tensorrt
from .null_cuda import NullCuda

TRT_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
SCRATCH = {"vision": 4096, "prefill": 9000, "decode": 100}


def install(monkeypatch: pytest.MonkeyPatch, flavour: str = "tensorrt-rtx") -> null_tensorrt.Library:
    """Put the fakes where the libraries are imported from."""
    library = null_tensorrt.Library(install_cuda(monkeypatch), flavour)
    monkeypatch.setitem(sys.modules, null_tensorrt.MODULES[flavour], library.module())
    return library


def install_cuda(monkeypatch: pytest.MonkeyPatch) -> NullCuda:
    """Put the fake CUDA where cuda-python is imported from."""
    cuda = NullCuda()
    runtime = ModuleType("cuda.bindings.runtime")
    for name in dir(cuda):
        if name.startswith("cuda"):
            setattr(runtime, name, getattr(cuda, name))
    utilities = ModuleType("cuda.bindings.utils")
    utilities.get_cuda_native_handle = int  # type: ignore[attr-defined]
    package, inner = ModuleType("cuda"), ModuleType("cuda.bindings")
    for module in (package, inner, runtime, utilities):
        is_package = module in (package, inner)
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=is_package)
        if is_package:
            module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    package.bindings, inner.runtime = inner, runtime  # type: ignore[attr-defined]
    return cuda


def build(
    tiny: ModuleType,
    directory: Path,
    t: Any = None,
    *,
    flavour: str = "tensorrt-rtx",
    weights: str = "plan",
    dtype: str = "fp32",
    sm: int = 89,
    **engines: bool,
) -> Path:
    """``dtype`` is that of caches, features and logits; the graphs compute in fp32 whatever it is."""
    tiny.build(directory, t)
    raw = json.loads((directory / "manifest.json").read_text())
    tensors: dict[str, Any] = {}
    for name, program in raw["programs"].items():
        proto = onnx.load(directory / program["graph"], load_external_data=False)
        stored = list_stored(proto)
        outside, tensors = list(stored), tensors | stored
        for port in (*program["inputs"], *program["outputs"]):
            if port["dtype"] == "fp32" and port["name"] != "pixel_values":
                port["dtype"] = dtype
        inputs = {port["name"]: [TRT_TYPES[port["dtype"]], port["shape"]] for port in program["inputs"]}
        if weights == "inputs":
            inputs |= {one: ["FLOAT", tensors[one]["shape"]] for one in outside}
        program["engine"] = f"{name}.engine"
        program["weights"] = [] if weights == "plan" else outside
        outputs = {port["name"]: [TRT_TYPES[port["dtype"]], port["shape"]] for port in program["outputs"]}
        what = {
            "name": name, "inputs": inputs, "outputs": outputs, "scratch": SCRATCH[name],
            "aliases": {one: one.replace("present", "past") for one in outputs if one.startswith("present")},
            "stripped": outside if weights == "stripped" else [],
        }  # fmt: skip
        blob = null_tensorrt.write_engine(
            flavour, what, _graph(directory, proto, weights), null_tensorrt.VERSIONS[flavour], sm
        )
        (directory / f"{name}.engine").write_bytes(blob)
    tiny.relist(directory)
    tiny.resign(
        directory, programs=raw["programs"], tensors={} if weights == "plan" else tensors, target=flavour, dtype=dtype,
        sm=sm, versions={flavour: null_tensorrt.VERSIONS[flavour]}, engines={"weights": weights, **engines},
    )  # fmt: skip
    return directory


def build_for_cuda(tiny: ModuleType, directory: Path, ports: dict[str, Any], t: Any, dtype: str) -> Path:
    """For ONNX Runtime's CUDA provider; ``ports``, those of each program, are given their types."""
    tiny.build(directory, t)
    programs, tensors = json.loads((directory / "manifest.json").read_text())["programs"], dict[str, Any]()
    for name, program in programs.items():
        stored = list_stored(onnx.load(directory / program["graph"], load_external_data=False))
        program["weights"], tensors = list(stored), tensors | stored
        for port in (*program["inputs"], *program["outputs"]):
            if port["dtype"] == "fp32" and port["name"] != "pixel_values":
                port["dtype"] = dtype
        ports[name] = program
    tiny.resign(
        directory, programs=programs, tensors=tensors, target="onnxruntime-cuda", dtype=dtype,
        provider="CUDAExecutionProvider",
    )  # fmt: skip
    return directory


def list_stored(proto: onnx.ModelProto) -> dict[str, Any]:
    """Where the weights of a graph lie, as manifests say it."""
    found = {}
    for one in proto.graph.initializer:
        if one.external_data:
            place = {entry.key: entry.value for entry in one.external_data}
            found[one.name] = {
                "file": place["location"], "offset": int(place["offset"]), "bytes": int(place["length"]),
                "dtype": "fp32", "shape": list(one.dims),
            }  # fmt: skip
    return found


def _graph(directory: Path, proto: onnx.ModelProto, weights: str) -> bytes:
    """With its weights inside, or with inputs in their place."""
    if weights == "plan":
        onnx.load_external_data_for_model(proto, str(directory))
    else:
        outside = [one for one in proto.graph.initializer if one.external_data]
        for one in outside:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
            proto.graph.initializer.remove(one)
    return bytes(proto.SerializeToString())


@contextmanager
def nothing_left(library: null_tensorrt.Library) -> Iterator[None]:
    """Inside, every session is closed again; behind it nothing is allocated and no rule was broken."""
    import gc

    yield
    gc.collect()
    assert library.cuda.violations == []
    assert {kind: count for kind, count in library.cuda.live().items() if count} == {}
    assert (list(library.contexts), list(library.engines)) == ([], [])


def refusal(path: Path, kind: type[SecateurError] = SecateurError, backend: str | None = None) -> str:
    """The one line that is said instead of opening."""
    with pytest.raises(kind) as caught:
        Session(path, backend=backend)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def draw(rows: int) -> list[list[Image.Image]]:
    """A small picture for each row."""
    random = np.random.default_rng(1)
    return [[Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))] for _ in range(rows)]
