"""Buffers in the GPU's memory, written from and read into pinned host memory, and shared through DLPack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.backends import Writable
from secateur.runtime.backends.cuda import DEVICE_NUMBER, DeviceMemory, PinnedMemory, Stream, on_device
from secateur.runtime.backends.dlpack import CPU, CUDA, export_capsule, read_capsule
from secateur.runtime.backends.host_types import STORAGE, byte_size, check_dtype, load, store
from secateur.runtime.errors import SecateurError, UserError

DEVICE = (CUDA, DEVICE_NUMBER)


class DeviceBuffer:
    """Zeroed device memory of a fixed shape and type.

    What the host writes waits in pinned memory until a program that reads it runs: the copy is then part of that
    program's stream, and none is made for values nobody reads. ``stream`` is for reading and for other people's memory.
    """

    @on_device()
    def __init__(self, shape: Sequence[int], dtype: str, stream: Stream) -> None:
        check_dtype(dtype, "buffer")
        self._shape, self.dtype, self._stream = tuple(shape), dtype, stream
        self.bytes = byte_size(self._shape, dtype)
        self._memory = DeviceMemory(self.bytes)
        self._pinned: PinnedMemory | None = None
        """Made when the host first writes or reads: caches are neither."""
        self._waits = False
        self._limits: tuple[int, int, str] | None = None
        self.scratch: DeviceMemory | None = None
        """Of the request this buffer belongs to, once a program is bound to it."""
        stream.zero(self.address, self.bytes)
        stream.synchronize()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def address(self) -> int:
        return self._memory.address

    def limit(self, low: int, high: int, what: str) -> None:
        """From now on refuse numbers below ``low`` or above ``high``: a program would use them unchecked."""
        self._limits = (low, high, what)

    @on_device()
    def write(self, values: Writable) -> None:
        """Copy ``values`` in, converted to the buffer's type.

        Memory of the same GPU comes through DLPack, without the host, and must be of the buffer's very type.
        """
        if not isinstance(values, np.ndarray) and hasattr(values, "__dlpack__"):
            kind, number = values.__dlpack_device__()
            if int(kind) == CUDA:
                return self._take(values, int(number))
            if int(kind) != CPU:
                raise UserError(f"memory of device type {int(kind)}", where="DLPack", available=("CPU", "CUDA"))
            values = np.from_dlpack(values)
        array = np.asarray(values)
        self._check_shape(array.shape)
        self._check_limits(array)
        store(array, self.dtype, self._staging())
        self._waits = True
        return None

    @on_device()
    def read(self) -> NDArray[Any]:
        """A copy of what the buffer holds, bf16 as float32."""
        staging = self._staging()
        if not self._waits:  # otherwise the staging memory is what the buffer is going to hold
            self._stream.download(self._pin().address, self.address, self.bytes)
            self._stream.synchronize()
        return load(staging, self.dtype)

    def upload(self, stream: Stream) -> None:
        """Put what the host wrote where programs read it, before what comes next on ``stream``."""
        if self._waits:
            stream.upload(self.address, self._pin().address, self.bytes)
            self._waits = False

    def forget(self) -> None:
        """Drop what the host wrote: a program is about to write the whole buffer."""
        self._waits = False

    def __dlpack_device__(self) -> tuple[int, int]:
        return DEVICE

    @on_device()
    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        """The memory itself, not a copy: later runs change it. It is ready when this returns, whatever ``stream``.

        Nothing makes a later run wait for its reader: synchronise your stream before the next run of the request.
        """
        if dl_device not in (None, DEVICE) or copy:
            raise BufferError("a buffer gives its own memory on its own device; copy it there")
        if self._limits is not None:
            raise BufferError(f"{self._limits[2]} is checked when it is written, so its memory is not given away")
        self.upload(self._stream)
        self._stream.synchronize()
        return export_capsule(self.address, self._shape, self.dtype, DEVICE, self)

    def _take(self, values: Any, number: int) -> None:
        if number != DEVICE[1]:
            raise UserError(
                f"memory of GPU {number}, the bundle runs on GPU {DEVICE[1]}", where="DLPack", fix="copy it there first"
            )
        given = read_capsule(values, self._stream.number, DEVICE)
        self._check_shape(given.shape)
        if given.dtype != self.dtype:
            raise UserError(f"{given.dtype} for an input of {self.dtype}", where="DLPack", fix="convert it first")
        if self._limits is None:
            self._waits = False
            self._stream.copy(self.address, given.address, self.bytes)
            self._stream.synchronize()
            return
        # Numbers that are checked have to be seen: these few bytes go through the host.
        self._stream.download(self._pin().address, given.address, self.bytes)
        self._stream.synchronize()
        self._waits = False
        self._check_limits(self._staging())
        self._waits = True

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self._shape:
            raise UserError(f"an array of shape {list(shape)} for an input of {list(self._shape)}")

    def _check_limits(self, values: NDArray[Any]) -> None:
        if self._limits is None:
            return
        low, high, what = self._limits
        if values.size and (int(values.min()) < low or int(values.max()) > high):
            raise SecateurError(
                f"{what} goes from {int(values.min())} to {int(values.max())}, the program takes {low} to {high}",
                where="before running",
            )

    def _pin(self) -> PinnedMemory:
        if self._pinned is None:
            self._pinned = PinnedMemory(self.bytes)
        return self._pinned

    def _staging(self) -> NDArray[Any]:
        return self._pin().bytes.view(STORAGE[self.dtype]).reshape(self._shape)
