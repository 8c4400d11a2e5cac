"""Where programs run. A backend is one file here; the session knows only what this one declares."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import UserError
from secateur.runtime.schema import Manifest, Target

_log = logging.getLogger(__name__)

BACKENDS = ("onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
HOST_BACKEND = "onnxruntime"
"""The one whose buffers lie in the machine's own memory."""
BACKEND_OF_TARGET: Mapping[Target, str] = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-cuda": "onnxruntime-cuda",
    "plain": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}


@runtime_checkable
class Shared(Protocol):
    """Memory that others may read as it lies, through DLPack."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


Writable: TypeAlias = "NDArray[Any] | Shared"


class Buffer(Protocol):
    """Memory of a fixed shape and type that programs read and write in place."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def write(self, values: Any) -> None:
        """Copy an array in, converted to the buffer's type; the shape must be the buffer's.

        Buffers of the backends here take any ``Writable``.
        """

    def read(self) -> NDArray[Any]:
        """A copy of what the buffer holds."""


class Bound(Protocol):
    """A program tied to its buffers."""

    def run(self) -> None:
        """Compute, without holding the GIL, from the bound inputs into the bound outputs."""


class Backend(Protocol):
    """Loaded programs. Weights exist once; any number of threads may run bound programs at a time."""

    name: str

    def buffer(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Zeroed memory. ``dtype`` is a port's: fp32, fp16, bf16, int64, int32 or bool."""

    def bind(
        self, program: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, variant: int = 0
    ) -> Bound:
        """Tie every port of ``program`` to a buffer. An input and an output may share one.

        ``variant`` is which of the bundle's geometries the program is of.
        """

    def close(self) -> None: ...


def open_backend(
    name: str | None,
    directory: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    cuda_graphs: bool | None = None,
) -> Backend:
    """Load a bundle's programs. ``name`` None takes the backend that the bundle was compiled for.

    ``threads`` are an operator's on the CPU; ``cuda_graphs`` whether engines are replayed as CUDA graphs, None for yes.
    """
    name = name or BACKEND_OF_TARGET[manifest.target]
    if name not in BACKENDS:
        raise UserError(f"no backend {name!r}", where="backend", available=BACKENDS)
    if name.startswith("tensorrt"):
        _warn_idle(name, threads=threads)
    else:
        _warn_idle(name, cuda_graphs=cuda_graphs)
    if name == "onnxruntime":
        from secateur.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(directory, manifest, threads=threads)
    if name == "onnxruntime-cuda":
        from secateur.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(directory, manifest, threads=threads)
    from secateur.runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(directory, manifest, name, cuda_graphs=cuda_graphs is not False)


def _warn_idle(backend: str, **given: object) -> None:
    """A caller that opens bundles of any kind says the same to all: what one has no use for is named, not refused."""
    for name, value in given.items():
        if value is not None:
            _log.warning("%s says nothing to backend %s", name, backend)


NUMPY_DTYPES: Mapping[str, type[np.generic]] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}
"""NumPy has no bf16."""
