"""TensorRT and TensorRT-RTX: engines of a bundle on the GPU, with buffers and weights of our own."""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.runtime.backends import Buffer
from secateur.runtime.backends.bound_engine import BoundEngine, GraphUse
from secateur.runtime.backends.cuda import DeviceMemory, Stream, on_device
from secateur.runtime.backends.device_buffer import DeviceBuffer
from secateur.runtime.backends.engine_ports import check_aliases, check_buffers, check_engine_ports, guard_writes
from secateur.runtime.backends.engine_weights import SharedWeights, pick_tensors, refit
from secateur.runtime.backends.kernel_cache import KernelCache, default_cache_directory
from secateur.runtime.backends.preflight import Machine, check_free, check_machine
from secateur.runtime.errors import BundleError, SecateurError, UserError
from secateur.runtime.kv import buffer_bytes, cache_bytes
from secateur.runtime.schema import Engines, Manifest, Program

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """An engine that can make execution contexts."""

    engine: Any
    kernels: KernelCache | None
    """TensorRT-RTX's."""

    def new_context(self, trt: Any, where: str, logger: Any) -> Any:
        """A context that is given its scratch memory: those of one request share it."""
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.kernels is None:
            context = self.engine.create_execution_context(managed)
        else:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            self.kernels.attach(config)
            context = self.engine.create_execution_context(config)
        if context is None:
            raise SecateurError(f"the library makes no execution context: {logger.last or 'no reason given'}",
                                where=where)  # fmt: skip
        return context

    def after_first_run(self) -> None:
        if self.kernels is not None:
            self.kernels.save_first()

    def close(self) -> None:
        if self.kernels is not None:
            self.kernels.save()


class TensorRTBackend:
    """Opens the engines of a bundle's first geometry; those of further ones when they are first bound.

    The bundle's files must have been checked against its manifest. ``cuda_graphs`` replays every program from its
    third run on. ``kernel_cache`` is the directory of TensorRT-RTX's compiled kernels; None for the user's.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        flavour: str,
        *,
        cuda_graphs: bool = True,
        kernel_cache: Path | None = None,
    ) -> None:
        self.name = flavour
        self._directory, self._manifest = directory, manifest
        self._geometries = manifest.each_variant()
        self._engines = manifest.engines or Engines()
        self._cache_directory = kernel_cache or default_cache_directory()
        self._graphs = GraphUse(cuda_graphs)
        self._machine: Machine = check_machine(directory, manifest, self.name)
        self._trt = self._machine.library
        self._logger = make_logger(self._trt)
        self._opened: dict[str, Opened] = {}
        """By engine file: geometries whose engines are the same have one between them."""
        self._closed = False
        self._lock = threading.Lock()
        with on_device():
            self._runtime = self._trt.Runtime(self._logger)
            self._stream = Stream()
            self._weights = SharedWeights(directory, manifest) if self._engines.weights == "inputs" else None
            self._check_room()
        _log.debug("opened %s on %s %s, %s", directory, self.name, self._trt.__version__, self._machine.gpu)

    def buffer(self, shape: Sequence[int], dtype: str) -> DeviceBuffer:
        return DeviceBuffer(shape, dtype, self._stream)

    @on_device()
    def bind(
        self, program: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, variant: int = 0
    ) -> BoundEngine:
        shared = self._hold_weights()
        manifest, opened = self._geometries[variant], self._open(program, variant)
        declared = manifest.programs[program]
        reads = check_buffers(program, declared.inputs, inputs, "input")
        writes = check_buffers(program, declared.outputs, outputs, "output")
        check_aliases(opened.engine, program, reads, writes)
        guard_writes(program, manifest, reads)
        weights = {name: shared.address[name] for name in declared.weights} if shared else {}
        return BoundEngine(
            program,
            opened.new_context(self._trt, f"program {program}", self._logger),
            reads,
            writes,
            weights,
            self._scratch(variant, [*reads.values(), *writes.values()]),
            self._graphs,
            opened.after_first_run,
            alive=(opened, shared, self._runtime, self._logger),
        )

    def close(self) -> None:
        """Let go of engines and weights; bound programs keep theirs, and nothing can be bound any more."""
        with self._lock:
            self._closed = True
            opened = list(self._opened.values())
            self._opened.clear()
            self._weights = None
        for one in opened:
            one.close()

    def _hold_weights(self) -> SharedWeights | None:
        """Once for a program: closing meanwhile must not leave it without."""
        with self._lock:
            self._check_open()
            return self._weights

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("the session is closed", where=f"backend {self.name}", fix="open the bundle again")

    def _open(self, name: str, variant: int) -> Opened:
        program = self._geometries[variant].programs[name]
        assert program.engine is not None  # or the machine check would have refused the bundle
        with self._lock:
            self._check_open()
            if program.engine not in self._opened:
                self._opened[program.engine] = self._load(name, program, program.engine)
            return self._opened[program.engine]

    def _load(self, name: str, program: Program, file: str) -> Opened:
        where = f"{self._directory}: {file}"
        with (
            open(self._directory / file, "rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        ):
            self._check_validity(plan, where)
            self._logger.last = ""
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(
                f"{self.name} {self._trt.__version__} does not open the engine: "
                f"{self._logger.last or 'no reason given'}",
                where=where,
                fix="compile the bundle again with the version and for the GPU that will run it",
            )
        tensors = pick_tensors(self._manifest, program.weights)
        inputs = tensors if self._engines.weights == "inputs" else {}
        check_engine_ports(engine, name, program, inputs, where)
        if self._engines.weights == "stripped":
            refit(self._trt, engine, self._logger, self._directory, tensors, where)
        kernels = None
        if self.name == "tensorrt-rtx":
            kernels = KernelCache(self._cache_directory, self._manifest.files[file].sha256, self._machine)
        return Opened(engine, kernels)

    def _check_validity(self, plan: Any, where: str) -> None:
        """TensorRT-RTX says by itself whether an engine fits the machine, before it is opened."""
        ask = getattr(self._runtime, "get_engine_validity", None)
        if ask is None:
            return
        validity, diagnostics = ask(plan)
        if validity == self._trt.EngineValidity.INVALID:
            named = self._trt.EngineInvalidityDiagnostics.__members__.items()
            why = [key.lower().replace("_", " ") for key, bit in named if int(bit) & int(diagnostics)]
            raise BundleError(
                f"{self.name} {self._trt.__version__} cannot run the engine on {self._machine.gpu}: "
                f"{', '.join(why) or self._logger.last or 'no reason given'}",
                where=where, fix="compile the bundle again for this GPU",
            )  # fmt: skip
        if validity == self._trt.EngineValidity.SUBOPTIMAL:
            _log.info("%s: the library says the engine may be slower here than it could be", where)

    def _scratch(self, variant: int, buffers: Sequence[DeviceBuffer]) -> DeviceMemory:
        """Memory for intermediate results, one for all programs of a request: they run one after the other.

        Which request a program is of shows in its buffers, some of which the request's other programs have too.
        """
        scratch = next((buffer.scratch for buffer in buffers if buffer.scratch is not None), None)
        if scratch is None:
            scratch = DeviceMemory(self._scratch_bytes(variant))
        for buffer in buffers:
            buffer.scratch = scratch
        return scratch

    def _scratch_bytes(self, variant: int) -> int:
        """What the engine that needs most of a geometry's says it needs; opens them."""
        engines = [self._open(name, variant).engine for name in self._geometries[variant].programs]
        return max(int(engine.device_memory_size_v2) for engine in engines)

    def _check_room(self) -> None:
        """Open the first geometry's engines; refuse where a request would not fit beside them and the weights."""
        first, scratch = self._geometries[0], self._scratch_bytes(0)
        needed = cache_bytes(first) + buffer_bytes(first.programs) + scratch
        check_free(needed, "a request of the bundle", self._machine.gpu, f"backend {self.name}")


def make_logger(trt: Any) -> Any:
    """A logger for the library whose ``last`` is the last error's text; everything goes to ``logging``."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rpartition(".")[2]
            if name.endswith("ERROR"):  # what is said of it is said when it is raised
                self.last = " ".join(message.split())[:300]
            _log.log(logging.INFO if name == "WARNING" else logging.DEBUG, "%s: %s", trt.__name__, message)

    return Logger()
