"""ONNX Runtime: a session for each graph, everything bound in place through IOBinding."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.backends import NUMPY_DTYPES, Buffer, Writable
from secateur.runtime.backends.cores import bound_threads
from secateur.runtime.backends.requires import check_onnxruntime_version
from secateur.runtime.errors import BundleError, SecateurError, UserError
from secateur.runtime.schema import Manifest, Port, Program

_log = logging.getLogger(__name__)

_CPU = "CPUExecutionProvider"
_ONNX_TYPES = {
    "tensor(float)": "fp32",
    "tensor(float16)": "fp16",
    "tensor(bfloat16)": "bf16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class HostBuffer:
    """A NumPy array that ONNX Runtime uses as it lies: writing to the array is writing to the tensor."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        import onnxruntime as ort

        if dtype not in NUMPY_DTYPES:
            raise UserError(
                f"{dtype} cannot run on ONNX Runtime's CPU provider", fix="compile with --dtype fp32 for it"
            )
        self.array = np.zeros(tuple(shape), dtype=NUMPY_DTYPES[dtype])
        self.value = ort.OrtValue.ortvalue_from_numpy(self.array)
        if self.value.data_ptr() != self.array.ctypes.data:
            raise SecateurError("ONNX Runtime copied a buffer it should share", fix="report this with its version")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def write(self, values: Writable) -> None:
        if not isinstance(values, np.ndarray):
            try:
                values = np.from_dlpack(values)
            except (BufferError, RuntimeError, TypeError) as error:
                raise UserError(f"memory the CPU cannot read: {error}", where="DLPack", fix="copy it there") from None
        if values.shape != self.array.shape:
            raise UserError(f"an array of shape {list(values.shape)} for an input of {list(self.array.shape)}")
        self.array[...] = values

    def read(self) -> NDArray[Any]:
        return self.array.copy()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **how: Any) -> Any:
        """The memory itself, not a copy: later runs change it."""
        return self.array.__dlpack__(**how)


class OnnxRuntimeBackend:
    """Opens ``vision``, ``prefill`` and ``decode`` on the CPU, those of further geometries when they are first bound.

    ``threads`` is the number of threads of one operator; None takes all physical cores the process may use.
    ``prepack`` lets ONNX Runtime copy weights into its kernels' preferred layout. Prefill and decode would each
    make that copy (416 MB of private memory for a 200 MB weight, 32 MB without), so it is off: both use the
    one mapping of the weight file, and weights exist once in memory.
    ``arena`` lets every session keep the memory of its largest run for the next one. Each program of each geometry
    would keep its own (300 MB for two prefills of 0.36 B parameters), so it is off: memory goes back after a run.
    ``spinning`` lets idle threads burn their core while they wait for work. Three programs have a pool each,
    and where cores are shared with anything else the waiting threads take them from the working ones: prefill
    took 320 ms instead of 44 ms beside a busy machine's other work. On, it saves waking threads up.
    """

    name = "onnxruntime"

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        prepack: bool = False,
        arena: bool = False,
        spinning: bool = False,
    ) -> None:
        try:
            import onnxruntime as ort
        except ImportError:
            raise UserError(
                "onnxruntime is not installed", where="backend onnxruntime", fix="pip install 'secateur[cpu]'"
            ) from None
        provider = manifest.provider or _CPU
        if provider != _CPU:
            raise UserError(
                f"the bundle was compiled for {provider}, this backend runs on the CPU",
                where="backend onnxruntime",
                fix="leave the backend to the bundle, or compile it with --target onnxruntime",
            )
        if manifest.dtype != "fp32":
            raise UserError(
                f"the bundle computes in {manifest.dtype}, ONNX Runtime on the CPU runs fp32",
                where="backend onnxruntime",
                fix="compile with --dtype fp32 to run it here",
            )
        check_onnxruntime_version(manifest, ort.__version__, "backend onnxruntime")
        self._directory, self._programs = directory, [one.programs for one in manifest.each_variant()]
        self._threads = bound_threads(threads)
        self._prepack, self._arena, self._spinning = prepack, arena, spinning
        self._sessions: dict[str, Any] = {}
        """By graph file: geometries whose graphs are the same have one between them."""
        self._lock = threading.Lock()
        for name in manifest.programs:
            self._open(name, 0)
        _log.debug("opened %s on onnxruntime %s, %d threads", directory, ort.__version__, self._threads)

    def buffer(self, shape: Sequence[int], dtype: str) -> HostBuffer:
        return HostBuffer(shape, dtype)

    def bind(
        self, program: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, variant: int = 0
    ) -> BoundSession:
        return BoundSession(program, self._open(program, variant), inputs, outputs)

    def close(self) -> None:
        self._sessions.clear()

    def _open(self, name: str, variant: int) -> Any:
        """The session of a program. Those of the first geometry are loaded at once, others when they are wanted."""
        import onnxruntime as ort

        program = self._programs[variant][name]
        with self._lock:
            if program.graph not in self._sessions:
                options = ort.SessionOptions()
                options.intra_op_num_threads = self._threads
                options.inter_op_num_threads = 1
                options.log_severity_level = 3
                options.enable_cpu_mem_arena = self._arena
                options.add_session_config_entry("session.disable_prepacking", "0" if self._prepack else "1")
                options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spinning else "0")
                self._sessions[program.graph] = load_session(ort, self._directory, name, program, options, _CPU)
            return self._sessions[program.graph]


class BoundSession:
    """One program with its inputs and outputs in place; keeps the buffers alive."""

    def __init__(self, name: str, session: Any, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._name, self._session = name, session
        self._buffers = (dict(inputs), dict(outputs))
        self._binding = session.io_binding()
        for port, buffer in inputs.items():
            self._binding.bind_ortvalue_input(port, cast(HostBuffer, buffer).value)
        for port, buffer in outputs.items():
            self._binding.bind_ortvalue_output(port, cast(HostBuffer, buffer).value)

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise SecateurError(first_line(error), where=f"program {self._name}") from error


def load_session(
    ort: Any, directory: Path, name: str, program: Program, options: Any, provider: Any, **how: Any
) -> Any:
    """A session whose ports are the manifest's. ``provider`` is a name, or a name with its options; ``how`` is given to
    the library."""
    where = f"{directory}: {program.graph}"
    try:
        # Its fallback would print to standard output and try the same provider again.
        how |= {"providers": [provider], "enable_fallback": 0}
        session = ort.InferenceSession(str(directory / program.graph), options, **how)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise BundleError(
            f"ONNX Runtime {ort.__version__} refuses the graph: {first_line(error)}",
            where=where,
            fix="compile it again with the onnxruntime that will run it" if provider == _CPU else None,
        ) from error
    for kind, declared, actual in (
        ("input", program.inputs, session.get_inputs()),
        ("output", program.outputs, session.get_outputs()),
    ):
        expected = {port.name: _describe(port) for port in declared}
        found = {port.name: f"{_ONNX_TYPES.get(port.type, port.type)}{list(port.shape)}" for port in actual}
        if expected != found:
            port = min(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            raise BundleError(
                f"{kind} {port} is {found.get(port, 'missing')} in the graph, "
                f"{expected.get(port, 'missing')} in the manifest",
                where=where,
                fix=f"the {name} graph and the manifest are not from one compilation; compile again",
            )
    return session


def _describe(port: Port) -> str:
    return f"{port.dtype}{list(port.shape)}"


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
