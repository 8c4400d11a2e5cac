"""The words of the FAKE CUDA: error codes, kinds of copies, memory, and work that waits in streams."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class BrokenRuleError(AssertionError):
    """A rule of CUDA or TensorRT was broken."""


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class Kind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


@dataclass
class Block:
    """An allocation. ``where`` is device or pinned."""

    where: str
    address: int
    size: int
    memory: Any = field(repr=False)

    def holds(self, address: int, size: int) -> bool:
        return self.address <= address and address + size <= self.address + self.size


@dataclass
class Work:
    """Something a stream has still to do; ``uses`` is the memory it touches."""

    name: str
    do: Callable[[], None]
    uses: list[Block]


@dataclass
class FakeStream:
    number: int
    pending: list[Work] = field(default_factory=list)
    done: int = 0
    captured: list[Work] | None = None
    spoilt: bool = False

    def __int__(self) -> int:
        return self.number
