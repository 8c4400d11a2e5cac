"""CUDA's runtime through cuda-python: every return code is looked at, and what is allocated frees itself.

One device is used, number 0 of those the process sees; ``CUDA_VISIBLE_DEVICES`` says which that is. Which one CUDA
works on is each thread's own, so whatever allocates or enqueues does so :func:`on_device`.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import SecateurError, UserError

_log = logging.getLogger(__name__)

DEVICE_NUMBER = 0

_FIXES = {
    "cudaErrorMemoryAllocation": "free memory of the GPU, run fewer requests at once, or compile a smaller geometry",
    "cudaErrorIllegalAddress": "this process cannot use the GPU any more: start it again",
    "cudaErrorLaunchFailure": "this process cannot use the GPU any more: start it again",
    "cudaErrorInsufficientDriver": "update the NVIDIA driver",
}


def bindings() -> Any:
    """The module ``cuda.bindings.runtime``."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise UserError(
            "cuda-python is not installed", where="CUDA",
            fix="pip install 'secateur[cuda]' (or 'secateur[tensorrt]', 'secateur[tensorrt-rtx]')",
        ) from None  # fmt: skip
    return runtime


def call(name: str, *arguments: Any) -> Any:
    """Call a function of CUDA's runtime: its result, a tuple of several, or None.

    Raises SecateurError with the name CUDA gives the error.
    """
    code, *results = getattr(bindings(), name)(*arguments)
    if int(code) != 0:
        error = _text("cudaGetErrorName", code)
        raise SecateurError(
            f"{name} failed with {error}: {_text('cudaGetErrorString', code)}", where="CUDA", fix=_FIXES.get(error)
        )
    return results[0] if len(results) == 1 else tuple(results) or None


@contextmanager
def on_device() -> Iterator[None]:
    """Inside, the calling thread works on number 0; behind it, on what it did before: threads are the caller's."""
    before = call("cudaGetDevice")
    call("cudaSetDevice", DEVICE_NUMBER)  # even where it is that one: a new thread has no context until then
    try:
        yield
    finally:
        if before != DEVICE_NUMBER:
            bindings().cudaSetDevice(before)


class DeviceMemory:
    """``size`` bytes of the GPU's memory, aligned to 256 bytes; freed with the object."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(call("cudaMalloc", max(size, 1)))
        self._release = _release_with(self, "cudaFree", self.address)


class PinnedMemory:
    """``size`` bytes of host memory that the GPU copies from and to by itself; freed with the object."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(call("cudaHostAlloc", max(size, 1), bindings().cudaHostAllocDefault))
        self._release = _release_with(self, "cudaFreeHost", self.address)
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        """The memory itself; not to be used once this object is gone."""


class Stream:
    """Work in order, beside that of other streams and of the legacy default stream."""

    def __init__(self) -> None:
        self.handle = call("cudaStreamCreateWithFlags", bindings().cudaStreamNonBlocking)
        from cuda.bindings.utils import get_cuda_native_handle

        self.number = int(get_cuda_native_handle(self.handle))
        """What other libraries call the stream."""
        self._release = _release_with(self, "cudaStreamDestroy", self.handle)

    def synchronize(self) -> None:
        """Wait, without the GIL, until everything is done; raises what went wrong in it."""
        call("cudaStreamSynchronize", self.handle)

    def upload(self, device: int, pinned: int, size: int) -> None:
        """Host to device. ``pinned`` must stay as it is until the stream has come here."""
        call("cudaMemcpyAsync", device, pinned, size, bindings().cudaMemcpyKind.cudaMemcpyHostToDevice, self.handle)

    def download(self, pinned: int, device: int, size: int) -> None:
        """Device to host. ``pinned`` holds the bytes once the stream has come here."""
        call("cudaMemcpyAsync", pinned, device, size, bindings().cudaMemcpyKind.cudaMemcpyDeviceToHost, self.handle)

    def copy(self, target: int, source: int, size: int) -> None:
        """Device to device."""
        kind = bindings().cudaMemcpyKind.cudaMemcpyDeviceToDevice
        call("cudaMemcpyAsync", target, source, size, kind, self.handle)

    def zero(self, device: int, size: int) -> None:
        call("cudaMemsetAsync", device, 0, size, self.handle)


class Event:
    """A place in a stream that can be waited for."""

    def __init__(self) -> None:
        self._handle = call("cudaEventCreateWithFlags", bindings().cudaEventDisableTiming)
        self._release = _release_with(self, "cudaEventDestroy", self._handle)

    def record(self, stream: Stream) -> None:
        call("cudaEventRecord", self._handle, stream.handle)

    def synchronize(self) -> None:
        """Wait for where it was recorded last; at once if it never was."""
        call("cudaEventSynchronize", self._handle)


class Graph:
    """What ``enqueue`` put on ``stream``, kept to be launched as one. Nothing of it runs while it is made.

    The memory it names must outlive it and keep its place. Raises SecateurError where the work cannot be captured;
    the stream can be used on. The mode is the relaxed one: memory that Python happens to free meanwhile must not
    spoil the capture.
    """

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        call("cudaStreamBeginCapture", stream.handle, bindings().cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            enqueue()
        except BaseException:
            code, begun = bindings().cudaStreamEndCapture(stream.handle)
            if int(code) == 0 and begun is not None:
                bindings().cudaGraphDestroy(begun)
            bindings().cudaGetLastError()
            raise
        try:
            captured = call("cudaStreamEndCapture", stream.handle)
            try:
                self._handle = call("cudaGraphInstantiate", captured, 0)
            finally:
                call("cudaGraphDestroy", captured)
        except SecateurError:
            bindings().cudaGetLastError()  # or the next call of someone else would report it
            raise
        self._release = _release_with(self, "cudaGraphExecDestroy", self._handle)

    def launch(self, stream: Stream) -> None:
        call("cudaGraphLaunch", self._handle, stream.handle)


def _release_with(owner: object, name: str, handle: Any) -> weakref.finalize[Any, Any]:
    return weakref.finalize(owner, _release, name, getattr(bindings(), name), handle)


def _release(name: str, function: Callable[[Any], Any], handle: Any) -> None:
    """Never raises: it runs where nobody can catch, and after an error of the GPU everything reports that error."""
    try:
        code = function(handle)[0]
    except Exception as error:
        _log.debug("%s: %s", name, error)
        return
    if int(code) != 0:
        _log.debug("%s: CUDA error %d", name, int(code))


def _text(function: str, code: Any) -> str:
    failed, text = getattr(bindings(), function)(code)
    return f"error {int(code)}" if int(failed) != 0 else bytes(text).decode("utf-8", "replace")
