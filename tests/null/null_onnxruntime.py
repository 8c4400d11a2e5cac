"""A FAKE of ``onnxruntime`` with a CUDA provider for tests: it computes on the CPU, with the real ONNX Runtime, in the
simulated memory of ``null_cuda``. It is never a substitute: nothing it says belongs into any result.

It checks what the provider leaves to its caller: that bound memory and weights lie in live memory of the device and
that the values they are given in outlive the session, that nothing is still being copied there when a run begins, that
the session is told to keep all bits of fp32, and not to fold weights it is given.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as real

from secateur.runtime.backends.dlpack import Given, read_capsule

from .null_cuda import NullCuda

CUDA = "CUDAExecutionProvider"
TYPES = {
    1: np.dtype(np.float32), 6: np.dtype(np.int32), 7: np.dtype(np.int64), 9: np.dtype(np.bool_),
    10: np.dtype(np.float16), 16: np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
NAMES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16", "int64": "int64", "int32": "int32", "bool": "bool"}


def view(address: int, shape: Any, dtype: np.dtype[Any]) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


class Binding:
    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs: dict[str, tuple[int, list[int], np.dtype[Any]]] = {}
        self.outputs: dict[str, tuple[int, list[int], np.dtype[Any]]] = {}

    def bind_input(self, name: str, device: str, number: int, kind: int, shape: list[int], address: int) -> None:
        assert (device, number) == ("cuda", 0)
        self.inputs[name] = (address, shape, TYPES[kind])

    def bind_output(self, name: str, device: str, number: int, kind: int, shape: list[int], address: int) -> None:
        assert (device, number) == ("cuda", 0)
        self.outputs[name] = (address, shape, TYPES[kind])

    def synchronize_outputs(self) -> None:
        self._session.library.calls.append(f"{self._session.name} waited for")


class Session:
    def __init__(
        self, library: Library, path: str, options: Any, provider: tuple[str, dict[str, str]], unwanted: list[str]
    ) -> None:
        self.library, self.name, self._values = library, Path(path).stem, dict(options.given)
        name, how = provider
        assert name == CUDA
        if how["use_tf32"] != "0" or how["arena_extend_strategy"] != "kSameAsRequested":
            raise library.cuda.broken(f"session options {how}")
        if "ConstantFolding" not in unwanted:
            raise library.cuda.broken("weights are folded from the file, and kept once more")
        model = onnx.load(path)
        self._ports = library.ports[self.name]
        for one in [i for i in model.graph.initializer if i.name in self.given()]:
            model.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
            model.graph.initializer.remove(one)
        own = real.SessionOptions()
        own.intra_op_num_threads, own.log_severity_level = 1, 3
        self._session = real.InferenceSession(model.SerializeToString(), own, providers=["CPUExecutionProvider"])
        library.sessions.add(self)

    def given(self) -> dict[str, Given]:
        """The weights it was given, of which the real one has no more than pointers."""
        found = {name: value() for name, value in self._values.items()}
        if gone := [name for name, value in found.items() if value is None]:
            raise self.library.cuda.broken(f"{gone[0]} was let go of while a session uses it")
        return {name: value.held for name, value in found.items()}

    def get_providers(self) -> list[str]:
        return list(self.library.loads)

    def get_input_memory_infos(self) -> list[Any]:
        return [SimpleNamespace(name=self.library.place) for _ in self.get_inputs()]

    def get_inputs(self) -> list[Any]:
        return self._shown("inputs")

    def get_outputs(self) -> list[Any]:
        return self._shown("outputs")

    def _shown(self, which: str) -> list[Any]:
        return [
            SimpleNamespace(name=p["name"], type=f"tensor({NAMES[p['dtype']]})", shape=p["shape"])
            for p in self._ports[which]
        ]

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding) -> None:
        cuda = self.library.cuda
        cuda.check_device("run_with_iobinding")
        if self.library.fails:
            raise RuntimeError("CUDA failure 2: out of memory")
        self.library.calls.append(f"{self.name} run")
        places = {**binding.inputs, **binding.outputs}
        assert places.keys() == {p["name"] for which in ("inputs", "outputs") for p in self._ports[which]}
        for name, (address, shape, dtype) in places.items():
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if cuda.users(cuda.block(address, size, "device", f"{self.name}: {name}")):
                raise cuda.broken(f"{self.name} reads {name} before what was put there has arrived")
        feeds = {name: _widen(view(*place)) for name, place in binding.inputs.items()}
        for name, given in self.given().items():
            dtype = {"fp32": np.float32, "fp16": np.float16}[given.dtype]
            weight = view(given.address, given.shape, np.dtype(dtype))
            cuda.block(given.address, weight.nbytes, "device", f"{self.name}: {name}")
            feeds[name] = weight.astype(np.float32)
        made = self._session.run(list(binding.outputs), feeds)
        for (address, shape, dtype), values in zip(binding.outputs.values(), made, strict=True):
            view(address, shape, dtype)[...] = values.astype(dtype)


def _widen(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype.kind in "fV" else values.copy()


class Value:
    def __init__(self, held: Given) -> None:
        self.held = held


class SessionOptions:
    def __init__(self) -> None:
        self.given: dict[str, weakref.ref[Value]] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        assert (key, value) == ("session.intra_op.allow_spinning", "0")

    def add_initializer(self, name: str, value: Value) -> None:
        self.given[name] = weakref.ref(value)


class Library:
    """What the fake was asked. ``ports``: of each program as its manifest has them, types included."""

    def __init__(self, cuda: NullCuda, ports: dict[str, Any]) -> None:
        self.cuda, self.ports = cuda, ports
        self.calls: list[str] = []
        self.providers = [CUDA, "CPUExecutionProvider"]
        self.loads = self.providers
        """What sessions open on: less than ``providers`` where libraries are missing."""
        self.place = "Cuda"
        """Where sessions want their inputs."""
        self.fails = False
        self.sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def module(self) -> ModuleType:
        library = self

        class OrtValue:
            @classmethod
            def from_dlpack(cls, data: Any) -> Value:
                assert data.__dlpack_device__() == (2, 0)
                # A consumer may ask without a stream; the reader here wants to name one.
                return Value(read_capsule(SimpleNamespace(__dlpack__=lambda stream: data.__dlpack__()), 0, (2, 0)))

        def open_session(
            path: str, options: Any, *, providers: list[Any], enable_fallback: int, disabled_optimizers: list[str]
        ) -> Session:
            assert enable_fallback == 0
            assert "preloaded" in library.calls, "CUDA's libraries lie where the loader does not look"
            return Session(library, path, options, *providers, disabled_optimizers)

        module = ModuleType("onnxruntime")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        shown = SimpleNamespace(
            __version__=real.__version__, SessionOptions=SessionOptions, OrtValue=OrtValue,
            InferenceSession=open_session, get_available_providers=lambda: list(library.providers),
            preload_dlls=lambda: library.calls.append("preloaded"),
        )  # fmt: skip
        vars(module).update(vars(shown))
        return module
