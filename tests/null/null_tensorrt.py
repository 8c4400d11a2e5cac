"""A FAKE of ``tensorrt`` and ``tensorrt_rtx`` for tests: its engines compute with ONNX Runtime on the simulated memory
of ``null_cuda``. It is never a substitute for the libraries: nothing it says belongs into any result.

An engine file is 64 bytes like those of TensorRT-RTX's, a line of JSON that describes the ports, and an ONNX graph.
The library checks what the real one leaves to its caller: that every address is set, in live memory of the device,
aligned and large enough, that outputs lie in no input but the one they are aliased to, that scratch memory is one
request's at a time, that contexts and engines are let go of.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import weakref
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from .null_cuda import ALIGNMENT, NullCuda
from .null_cuda_types import Work

MAGIC = {"tensorrt-rtx": b"vtrt", "tensorrt": b"null"}
MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
VERSIONS = {"tensorrt-rtx": "1.7.1.116", "tensorrt": "11.4.0.12"}
ARCHITECTURES = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}
TYPES = {
    "FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64), "INT32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_),
}  # fmt: skip


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, INT32, BOOL = range(6)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class EngineValidity(enum.Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, MALFORMED_ENGINE = 1, 2, 32


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


class Weights:
    """``count`` numbers at ``pointer`` of host memory."""

    def __init__(self, dtype: DataType, pointer: int, count: int) -> None:
        self.dtype, self.pointer, self.count = dtype, pointer, count


def header(flavour: str, size: int, version: str, sm: int) -> bytes:
    """64 bytes before ``size`` more."""
    numbers = bytes(int(part) for part in version.split("."))
    start = MAGIC[flavour] + bytes(4) + (2).to_bytes(8, "little") + (64 + size).to_bytes(8, "little") + numbers
    return (start + b"vtrt" + ARCHITECTURES.get(sm, 0).to_bytes(8, "little")).ljust(64, b"\0")


def write_engine(flavour: str, what: dict[str, Any], graph: bytes, version: str, sm: int) -> bytes:
    """``what``: inputs and outputs (name -> [type, shape]), aliases (output -> input), weights, stripped, scratch."""
    body = json.dumps(what).encode() + b"\n" + graph
    return header(flavour, len(body), version, sm) + body


class Context:
    """An execution context whose scratch memory is its user's."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._addresses, self._runs = engine, dict[str, int](), 0
        self._scratch: tuple[int, int] | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        cuda = self._engine.library.cuda
        cuda.block(address, size, "device", "set_device_memory")
        if size < self._engine.device_memory_size_v2:
            raise cuda.broken("scratch memory is smaller than the engine's intermediate results")
        self._scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.ports:
            return False
        if address % ALIGNMENT:
            raise self._engine.library.cuda.broken(f"{name} is not aligned")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, number: int) -> bool:
        library, engine = self._engine.library, self._engine
        cuda, stream = library.cuda, library.cuda.stream(number)
        cuda.check_device("execute_async_v3")
        library.calls.append(f"{engine.name} {'captured' if stream.captured is not None else 'enqueued'}")
        if library.refuses_to_run:
            library.say(Severity.ERROR, "the null library was told to fail")
            return False
        if stream.captured is not None and not self._runs:
            raise cuda.broken("captured before the first plain run, in which a library allocates and compiles")
        if missing := sorted(engine.ports.keys() - self._addresses.keys()):
            raise cuda.broken(f"enqueued without an address for {missing[0]}")
        if engine.stripped and not engine.fitted:
            raise cuda.broken("enqueued without weights")
        places = {name: (address, engine.size(name)) for name, address in self._addresses.items()}
        uses = [cuda.block(*place, "device", f"{engine.name}: {name}") for name, place in places.items()]
        self._check_overlaps(places)
        if engine.device_memory_size_v2:
            if self._scratch is None:
                raise cuda.broken("enqueued without scratch memory")
            scratch = cuda.block(*self._scratch, "device", "scratch")
            if cuda.users(scratch) - {number}:
                raise cuda.broken("two streams use one scratch memory at a time")
            uses.append(scratch)
        cuda.put(stream, Work(f"engine {engine.name}", lambda: engine.compute(places), uses))
        self._runs += 1
        if library.interrupts:
            raise KeyboardInterrupt
        return True

    def _check_overlaps(self, places: dict[str, tuple[int, int]]) -> None:
        engine = self._engine
        for output in engine.what["outputs"]:
            start, size = places[output]
            for name, (other, length) in places.items():
                if name == output:
                    continue
                alias = engine.what["aliases"].get(output) == name
                if alias and start != other:
                    raise engine.library.cuda.broken(f"{output} and {name} are one cache and have two addresses")
                if not alias and start < other + length and other < start + size:
                    raise engine.library.cuda.broken(f"{output} lies in {name}")


class RtxContext(Context):
    def is_stream_capturable(self, number: int) -> bool:
        return not self._engine.library.cannot_be_captured


class Engine:
    """A deserialized engine."""

    def __init__(self, library: Library, blob: bytes) -> None:
        line, _, graph = blob[64:].partition(b"\n")
        self.library, self.what = library, json.loads(line)
        self.name: str = self.what["name"]
        self.ports: dict[str, list[Any]] = {**self.what["inputs"], **self.what["outputs"]}
        self.stripped: list[str] = self.what["stripped"]
        self.fitted: dict[str, np.ndarray] = {}
        self.device_memory_size_v2: int = self.what["scratch"]
        self.num_io_tensors = len(self.ports)
        self._session = _session(graph)

    def size(self, name: str) -> int:
        dtype, shape = self.ports[name]
        return int(np.prod(shape, dtype=np.int64)) * TYPES[dtype].itemsize

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.ports[name][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.ports[name][1])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.what["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        found: str | None = self.what["aliases"].get(name)
        return found

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.library)

    def create_execution_context(self, how: Any) -> Context:
        self.library.cuda.check_device("create_execution_context")
        strategy = how.strategy if isinstance(how, RuntimeConfig) else how
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise self.library.cuda.broken("every context would have scratch memory of its own")
        if isinstance(how, RuntimeConfig) and how.cache is not None and self.name not in how.cache.kernels:
            how.cache.kernels.append(self.name)
            self.library.calls.append(f"{self.name} compiled")
        context = (RtxContext if isinstance(how, RuntimeConfig) else Context)(self)
        self.library.contexts.add(context)
        return context

    def compute(self, places: dict[str, tuple[int, int]]) -> None:
        """Read the inputs where they lie, compute, write the outputs where they lie."""
        arrays = {name: self._view(name, address) for name, (address, _) in places.items()}
        feeds = {
            name: arrays[name].astype(np.float32) if arrays[name].dtype.kind in "fV" else arrays[name].copy()
            for name in self.what["inputs"]
        }
        made = self._session.run(list(self.what["outputs"]), feeds | self.fitted)
        for name, values in zip(self.what["outputs"], made, strict=True):
            arrays[name][...] = values.astype(arrays[name].dtype)

    def _view(self, name: str, address: int) -> np.ndarray:
        import ctypes

        dtype, shape = self.ports[name]
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * self.size(name)).from_address(address))
        return raw.view(TYPES[dtype]).reshape(shape)


class RuntimeCache:
    def __init__(self, library: Library) -> None:
        self._library = library
        self.kernels: list[str] = []

    def serialize(self) -> bytes | None:
        kept = b"null kernels " + json.dumps(self.kernels).encode()
        return None if self._library.keeps_kernels == "to itself" else kept

    def deserialize(self, blob: bytes) -> bool:
        head, _, rest = blob.partition(b"null kernels ")
        if head or not rest:
            return False
        self.kernels = json.loads(rest)
        return True


class RuntimeConfig:
    def __init__(self, library: Library) -> None:
        self.strategy, self.cache = ExecutionContextAllocationStrategy.STATIC, None
        self._library = library

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache | None:
        return None if self._library.keeps_kernels == "nowhere" else RuntimeCache(self._library)

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class Library:
    """What one fake library was asked, and the classes it shows."""

    def __init__(self, cuda: NullCuda, flavour: str) -> None:
        self.cuda, self.flavour, self.version = cuda, flavour, VERSIONS[flavour]
        self.calls: list[str] = []
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.refuses_to_run = self.opens_nothing = self.cannot_be_captured = False
        self.interrupts = False  # Ctrl-C, once an engine is enqueued
        self.keeps_kernels = ""  # or "to itself", giving none out, or "nowhere", without a cache
        self.invalid = 0
        """Bits of the diagnostics that ``get_engine_validity`` gives."""
        self._logger: Any = None

    def say(self, severity: Severity, text: str) -> None:
        self._logger.log(severity, text)

    def open(self, blob: Any) -> Engine | None:
        data = bytes(blob)
        self.cuda.check_device("deserialize_cuda_engine")
        if self.opens_nothing or data[:4] != MAGIC[self.flavour]:
            self.say(Severity.ERROR, "Magic tag does not match")
            return None
        engine = Engine(self, data)
        self.engines.add(engine)
        return engine

    def module(self) -> ModuleType:
        library = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                library._logger = logger

            def deserialize_cuda_engine(self, blob: Any) -> Engine | None:
                return library.open(blob)

        class RtxRuntime(Runtime):
            def get_engine_validity(self, blob: Any) -> tuple[EngineValidity, int]:
                return (EngineValidity.INVALID if library.invalid else EngineValidity.VALID), library.invalid

        class Refitter:
            def __init__(self, engine: Engine, logger: Any) -> None:
                self._engine, self._given = engine, dict[str, Weights]()

            def get_all_weights(self) -> list[str]:
                return list(self._engine.stripped)

            def get_missing_weights(self) -> list[str]:
                return [name for name in self._engine.stripped if name not in self._given]

            def set_named_weights(self, name: str, weights: Weights) -> bool:
                self._given[name] = weights
                return name in self._engine.stripped and weights.dtype is DataType.FLOAT

            def refit_cuda_engine(self) -> bool:
                shapes = {one.name: one.shape for one in self._engine._session.get_inputs()}
                for name, weights in self._given.items():
                    self._engine.fitted[name] = _copy(weights).reshape(shapes[name])
                return True

        module = ModuleType(MODULES[self.flavour])
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        shown = SimpleNamespace(
            __version__=self.version, ILogger=ILogger, DataType=DataType, TensorIOMode=TensorIOMode, Weights=Weights,
            TensorLocation=TensorLocation, ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
            EngineValidity=EngineValidity, EngineInvalidityDiagnostics=EngineInvalidityDiagnostics, Refitter=Refitter,
            Runtime=RtxRuntime if self.flavour == "tensorrt-rtx" else Runtime,
        )  # fmt: skip
        vars(module).update(vars(shown))
        return module


def _copy(weights: Weights) -> np.ndarray:
    import ctypes

    raw = (ctypes.c_uint8 * (weights.count * TYPES[weights.dtype.name].itemsize)).from_address(weights.pointer)
    return np.frombuffer(bytes(raw), TYPES[weights.dtype.name])


def _session(graph: bytes) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
