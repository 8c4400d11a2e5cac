"""ONNX Runtime on its CUDA provider: a session for each graph, buffers and weights of our own, all bound in place.

Nothing here has run on a GPU yet: it is tested against fakes of CUDA and of the provider (docs/onnxruntime-cuda.md).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.runtime.backends import Buffer
from secateur.runtime.backends.cores import bound_threads
from secateur.runtime.backends.cuda import DEVICE_NUMBER, DeviceMemory, Stream, on_device
from secateur.runtime.backends.device_buffer import DEVICE, DeviceBuffer
from secateur.runtime.backends.dlpack import export_capsule
from secateur.runtime.backends.engine_ports import check_aliases, check_buffers, guard_writes
from secateur.runtime.backends.engine_weights import SharedWeights
from secateur.runtime.backends.onnxruntime import first_line, load_session
from secateur.runtime.backends.preflight import check_free, check_onnxruntime
from secateur.runtime.errors import SecateurError, UserError
from secateur.runtime.kv import buffer_bytes, cache_bytes
from secateur.runtime.schema import Manifest, StoredTensor

_log = logging.getLogger(__name__)

_PROVIDER = "CUDAExecutionProvider"
_ONNX_NUMBERS = {"fp32": 1, "int32": 6, "int64": 7, "bool": 9, "fp16": 10, "bf16": 16}
"""ONNX's numbers of the types: NumPy has no bf16 to say it with."""


class SharedTensor:
    """A weight in memory that all sessions share, as DLPack wants to be asked for it."""

    def __init__(self, address: int, tensor: StoredTensor, memory: DeviceMemory) -> None:
        self._address, self._tensor, self._memory = address, tensor, memory

    def __dlpack_device__(self) -> tuple[int, int]:
        return DEVICE

    def __dlpack__(self, **_: Any) -> Any:
        return export_capsule(self._address, tuple(self._tensor.shape), self._tensor.dtype, DEVICE, self._memory)


class OnnxRuntimeCudaBackend:
    """Opens a bundle's first geometry on the GPU; programs of further ones when they are first bound.

    Large weights lie once on the device: every session is given the same memory for them instead of loading its own.
    ``threads`` are those of what runs on the CPU, None for all physical cores: next to nothing does.
    """

    name = "onnxruntime-cuda"

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        self._ort, self._gpu = check_onnxruntime(manifest)
        self._directory, self._geometries = directory, manifest.each_variant()
        self._threads = bound_threads(threads)
        self._sessions: dict[str, Any] = {}
        """By graph file: geometries whose graphs are the same have one between them."""
        self._closed = False
        self._lock = threading.Lock()
        with on_device():
            self._stream = Stream()
            weights = SharedWeights(directory, manifest)
            self._given: dict[str, Any] = {
                name: self._ort.OrtValue.from_dlpack(SharedTensor(address, manifest.tensors[name], weights.memory))
                for name, address in weights.address.items()
            }
            """Weights as every session is given them. A session holds a bare pointer to each, not a reference."""
            for name in manifest.programs:
                self._open(name, 0)
            first = self._geometries[0]
            needed = cache_bytes(first) + buffer_bytes(first.programs)
            check_free(needed, "a request of the bundle", self._gpu, f"backend {self.name}")
        _log.debug("opened %s on onnxruntime %s, %s", directory, self._ort.__version__, self._gpu)

    def buffer(self, shape: Sequence[int], dtype: str) -> DeviceBuffer:
        return DeviceBuffer(shape, dtype, self._stream)

    @on_device()
    def bind(
        self, program: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, variant: int = 0
    ) -> BoundCudaSession:
        manifest, session = self._geometries[variant], self._open(program, variant)
        declared = manifest.programs[program]
        reads = check_buffers(program, declared.inputs, inputs, "input")
        writes = check_buffers(program, declared.outputs, outputs, "output")
        check_aliases(None, program, reads, writes)
        guard_writes(program, manifest, reads)
        return BoundCudaSession(program, session, reads, writes, self._given)

    def close(self) -> None:
        """Let go of sessions and weights; bound programs keep theirs, and nothing can be bound any more."""
        with self._lock:
            self._closed = True
            self._sessions.clear()
            self._given = {}

    def _open(self, name: str, variant: int) -> Any:
        program = self._geometries[variant].programs[name]
        with self._lock:
            if self._closed:
                raise UserError("the session is closed", where=f"backend {self.name}", fix="open the bundle again")
            if program.graph not in self._sessions:
                options = make_options(self._ort, self._threads, {one: self._given[one] for one in program.weights})
                self._sessions[program.graph] = load_session(
                    self._ort, self._directory, name, program, options, _provider(),
                    # Folding would compute with the file's own weights and keep what comes of it in every session.
                    disabled_optimizers=["ConstantFolding"],
                )  # fmt: skip
                self._check_place(self._sessions[program.graph], name)
            return self._sessions[program.graph]

    def _check_place(self, session: Any, name: str) -> None:
        """The library opens on the CPU, with a warning at most, where it cannot load CUDA's libraries."""
        where = f"backend {self.name}"
        if _PROVIDER not in session.get_providers():
            raise UserError(
                "ONNX Runtime has the CUDA provider but cannot load it: cuBLAS, cuDNN or another of CUDA's libraries "
                "is missing, or of another major version", where=where, fix="pip install 'onnxruntime-gpu[cuda,cudnn]'",
            )  # fmt: skip
        places: list[Any] = getattr(session, "get_input_memory_infos", list)()
        if on_host := [port.name for port, place in zip(session.get_inputs(), places, strict=False)
                       if place.name.startswith("Cpu")]:  # fmt: skip
            # Bound device memory would be copied there once, now, and never again.
            raise SecateurError(f"{name} reads {on_host[0]} on the CPU", where=where, fix="compile the bundle again")


def make_options(ort: Any, threads: int, given: Mapping[str, Any]) -> Any:
    """Options of a session that takes the weights ``given``, which must live as long as it does."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in given.items():
        options.add_initializer(name, value)
    return options


class BoundCudaSession:
    """One program with its inputs and outputs in place; keeps buffers and weights alive."""

    def __init__(
        self, name: str, session: Any, inputs: Mapping[str, DeviceBuffer], outputs: Mapping[str, DeviceBuffer],
        weights: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._name, self._session, self._alive = name, session, (dict(inputs), dict(outputs), weights)
        self._inputs = list(inputs.values())
        read = {buffer.address for buffer in self._inputs}
        self._only_written = [buffer for buffer in outputs.values() if buffer.address not in read]
        self._stream = Stream()
        self._binding = session.io_binding()
        try:
            for bind, buffers in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
                for port, buffer in buffers.items():
                    kind = _ONNX_NUMBERS[buffer.dtype]
                    bind(port, "cuda", DEVICE_NUMBER, kind, list(buffer.shape), buffer.address)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise SecateurError(first_line(error), where=f"program {name}") from error

    @on_device()
    def run(self) -> None:
        for buffer in self._inputs:
            buffer.upload(self._stream)
        for buffer in self._only_written:
            buffer.forget()
        # The library's streams are its own: what it reads must be there before it starts, and it waits for its end.
        self._stream.synchronize()
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise SecateurError(first_line(error), where=f"program {self._name}") from error


def _provider() -> tuple[str, dict[str, str]]:
    return (
        _PROVIDER,
        {
            "device_id": str(DEVICE_NUMBER),
            # Scores are chosen in fp32: keep all of its bits.
            "use_tf32": "0",
            # Memory in doubling steps would reserve up to twice what a run takes.
            "arena_extend_strategy": "kSameAsRequested",
        },
    )
