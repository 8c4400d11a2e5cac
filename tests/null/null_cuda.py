"""A FAKE of ``cuda.bindings.runtime`` for tests: no GPU, no speed, nothing it says belongs into any result.

It does what CUDA promises and no more, so that code which relies on more fails. Work on a stream is put off until
somebody waits for it; device memory has real addresses, but only copies reach it; every address is looked up in the
list of what is allocated. What breaks a rule is written to ``violations`` and raised as :class:`BrokenRuleError`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from .null_cuda_types import Block, BrokenRuleError, CaptureMode, Error, FakeStream, Kind, Work

ALIGNMENT = 256
ON_CURRENT = frozenset((
    "cudaMalloc", "cudaHostAlloc", "cudaMemGetInfo", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaStreamCreateWithFlags",
    "cudaEventCreateWithFlags", "cudaEventRecord", "cudaStreamBeginCapture", "cudaGraphInstantiate", "cudaGraphLaunch",
))  # fmt: skip
"""Functions that concern the calling thread's current device."""


class NullCuda:
    """The module's functions, the machine they pretend there is, and what happened to it."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = Error, Kind, CaptureMode
    cudaStreamNonBlocking, cudaHostAllocDefault, cudaEventDisableTiming = 1, 0, 2

    def __init__(self) -> None:
        self.driver, self.runtime, self.gpus, self.sm = 13000, 13000, 1, 89
        self.total = 8 << 30
        self.violations: list[str] = []
        self.calls: list[str] = []
        self.refuse_capture = False
        """Whether the end of a capture says that it was spoilt."""
        self._blocks: dict[int, Block] = {}
        self._graveyard: list[Block] = []
        """What was freed: its addresses are not given out again."""
        self._streams: dict[int, FakeStream] = {}
        self._events: dict[int, tuple[FakeStream, int] | None] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._failing: dict[str, list[int]] = {}
        self._next = 1000
        self._lock = threading.RLock()
        self._thread = threading.local()

    # -- for tests -------------------------------------------------------------------------------------------

    def fail(self, name: str, error: Error, after: int = 0) -> None:
        """The call of ``name`` after ``after`` more of them fails with ``error``."""
        self._failing[name] = [after, int(error)]

    def live(self) -> dict[str, int]:
        """How many of each kind are allocated."""
        count = {"device": 0, "pinned": 0}
        for block in self._blocks.values():
            count[block.where] += 1
        return count | {"streams": len(self._streams), "events": len(self._events), "graphs": len(self._graphs)}

    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return sum(block.size for block in self._blocks.values() if block.where == "device")

    def broken(self, rule: str) -> BrokenRuleError:
        self.violations.append(rule)
        return BrokenRuleError(rule)

    def check_device(self, what: str) -> None:
        """Everything here is on device 0, and the thread must say so."""
        if (device := getattr(self._thread, "device", 0)) != 0:
            raise self.broken(f"{what} while device {device} is the thread's current one")

    def block(self, address: int, size: int, where: str, what: str) -> Block:
        """The live allocation ``address`` to ``address + size`` lies in."""
        found = next((b for b in self._blocks.values() if b.holds(address, size)), None)
        if found is None or found.where != where:
            state = "freed, foreign or too small" if found is None else found.where
            raise self.broken(f"{what}: {size} bytes at {address:#x} are not in live {where} memory ({state})")
        return found

    def stream(self, handle: Any) -> FakeStream:
        if int(handle) not in self._streams:
            raise self.broken(f"stream {int(handle)} does not exist")
        return self._streams[int(handle)]

    def put(self, stream: FakeStream, work: Work) -> None:
        """Onto the stream, or into the graph that is captured from it."""
        (stream.pending if stream.captured is None else stream.captured).append(work)

    def users(self, block: Block) -> set[int]:
        """Streams that have still something to do with ``block``."""
        return {s.number for s in self._streams.values() if any(block is b for work in s.pending for b in work.uses)}

    # -- memory ----------------------------------------------------------------------------------------------

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        def make() -> tuple[Any, ...]:
            if self.used() + size > self.total:
                return Error.cudaErrorMemoryAllocation, None
            return Error.cudaSuccess, self._allocate("device", size)

        return self._do("cudaMalloc", make, 1)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._do("cudaHostAlloc", lambda: (Error.cudaSuccess, self._allocate("pinned", size)), 1)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._do("cudaFree", lambda: self._free("device", address))

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._do("cudaFreeHost", lambda: self._free("pinned", address))

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self._do("cudaMemGetInfo", lambda: (Error.cudaSuccess, self.total - self.used(), self.total), 2)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Kind, stream: Any) -> tuple[Any, ...]:
        def queue() -> tuple[Any, ...]:
            ends = {
                Kind.cudaMemcpyHostToDevice: ("pinned", "device"),
                Kind.cudaMemcpyDeviceToHost: ("device", "pinned"),
                Kind.cudaMemcpyDeviceToDevice: ("device", "device"),
            }[kind]
            # From and to pageable memory this call would not be asynchronous at all.
            uses = [self.block(source, size, ends[0], kind.name), self.block(target, size, ends[1], kind.name)]
            self.put(self.stream(stream), Work(kind.name, lambda: ctypes.memmove(target, source, size), uses))  # type: ignore[arg-type]
            return (Error.cudaSuccess,)

        return self._do("cudaMemcpyAsync", queue)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> tuple[Any, ...]:
        def queue() -> tuple[Any, ...]:
            uses = [self.block(address, size, "device", "cudaMemsetAsync")]
            work = Work("cudaMemsetAsync", lambda: ctypes.memset(address, value, size), uses)  # type: ignore[arg-type]
            self.put(self.stream(stream), work)
            return (Error.cudaSuccess,)

        return self._do("cudaMemsetAsync", queue)

    # -- streams, events, graphs -----------------------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        def make() -> tuple[Any, ...]:
            stream = FakeStream(self._number())
            self._streams[stream.number] = stream
            return Error.cudaSuccess, stream

        return self._do("cudaStreamCreateWithFlags", make, 1)

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        def destroy() -> tuple[Any, ...]:
            self._drain(self.stream(stream))
            del self._streams[int(stream)]
            return (Error.cudaSuccess,)

        return self._do("cudaStreamDestroy", destroy)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        def wait() -> tuple[Any, ...]:
            one = self.stream(stream)
            if one.captured is not None:
                one.spoilt = True
                return (Error.cudaErrorStreamCaptureUnsupported,)
            self._drain(one)
            return (Error.cudaSuccess,)

        return self._do("cudaStreamSynchronize", wait)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        def make() -> tuple[Any, ...]:
            number = self._number()
            self._events[number] = None
            return Error.cudaSuccess, number

        return self._do("cudaEventCreateWithFlags", make, 1)

    def cudaEventRecord(self, event: int, stream: Any) -> tuple[Any, ...]:
        def record() -> tuple[Any, ...]:
            one = self.stream(stream)
            self._events[event] = (one, one.done + len(one.pending))
            return (Error.cudaSuccess,)

        return self._do("cudaEventRecord", record)

    def cudaEventSynchronize(self, event: int) -> tuple[Any, ...]:
        def wait() -> tuple[Any, ...]:
            recorded = self._events[event]
            if recorded is not None:
                self._drain(*recorded)
            return (Error.cudaSuccess,)

        return self._do("cudaEventSynchronize", wait)

    def cudaEventDestroy(self, event: int) -> tuple[Any, ...]:
        return self._do("cudaEventDestroy", lambda: (self._events.pop(event), (Error.cudaSuccess,))[1])

    def cudaStreamBeginCapture(self, stream: Any, mode: CaptureMode) -> tuple[Any, ...]:
        def begin() -> tuple[Any, ...]:
            if mode is not CaptureMode.cudaStreamCaptureModeRelaxed:
                raise self.broken("memory that Python frees meanwhile would spoil a capture in this mode")
            self.stream(stream).captured = []
            return (Error.cudaSuccess,)

        return self._do("cudaStreamBeginCapture", begin)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        def end() -> tuple[Any, ...]:
            one = self.stream(stream)
            captured, one.captured = one.captured, None
            spoilt, one.spoilt = one.spoilt or self.refuse_capture, False
            if spoilt:
                return Error.cudaErrorStreamCaptureInvalidated, None
            if not captured:
                raise self.broken("an empty graph was captured")
            number = self._number()
            self._graphs[number] = captured
            return Error.cudaSuccess, number

        return self._do("cudaStreamEndCapture", end, 1)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        def make() -> tuple[Any, ...]:
            number = self._number()
            self._graphs[number] = self._graphs[graph]
            return Error.cudaSuccess, number

        return self._do("cudaGraphInstantiate", make, 1)

    def cudaGraphLaunch(self, graph: int, stream: Any) -> tuple[Any, ...]:
        def launch() -> tuple[Any, ...]:
            for work in self._graphs[graph]:
                for block in work.uses:
                    if self._blocks.get(block.address) is not block:
                        raise self.broken(f"a graph uses memory at {block.address:#x} that was freed")
                self.put(self.stream(stream), work)
            return (Error.cudaSuccess,)

        return self._do("cudaGraphLaunch", launch)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._do("cudaGraphDestroy", lambda: (self._graphs.pop(graph), (Error.cudaSuccess,))[1])

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._do("cudaGraphExecDestroy", lambda: (self._graphs.pop(graph), (Error.cudaSuccess,))[1])

    # -- the machine -----------------------------------------------------------------------------------------

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.runtime

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (Error.cudaSuccess, self.gpus) if self.gpus else (Error.cudaErrorNoDevice, None)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        properties = SimpleNamespace(name=b"Null GPU", major=self.sm // 10, minor=self.sm % 10)
        return self._do("cudaGetDeviceProperties", lambda: (Error.cudaSuccess, properties), 1)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, getattr(self._thread, "device", 0)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        self._thread.device = device
        return (Error.cudaSuccess,)

    def cudaGetErrorName(self, error: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, Error(int(error)).name.encode()

    def cudaGetErrorString(self, error: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, b"as the test asked"

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    # -- inside ----------------------------------------------------------------------------------------------

    def _do(self, name: str, function: Callable[[], tuple[Any, ...]], results: int = 0) -> tuple[Any, ...]:
        with self._lock:
            self.calls.append(name)
            if name in ON_CURRENT:
                self.check_device(name)
            if name in self._failing:
                self._failing[name][0] -= 1
                if self._failing[name][0] < 0:
                    return (Error(self._failing.pop(name)[1]), *[None] * results)
            return function()

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _allocate(self, where: str, size: int) -> int:
        memory = np.full(size + ALIGNMENT, 0xCD, np.uint8)  # nobody may rely on zeros
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._blocks[address] = Block(where, address, size, memory)
        return address

    def _free(self, where: str, address: int) -> tuple[Any, ...]:
        block = self._blocks.get(address)
        if block is None or block.where != where:
            raise self.broken(f"{address:#x} is freed twice, or is no {where} memory")
        for stream in self._streams.values():  # freeing waits for the whole device
            self._drain(stream)
        self._graveyard.append(self._blocks.pop(address))
        return (Error.cudaSuccess,)

    def _drain(self, stream: FakeStream, upto: int | None = None) -> None:
        """Do what the stream has put off, or the first ``upto`` things it was ever given."""
        while stream.pending and (upto is None or stream.done < upto):
            work = stream.pending.pop(0)
            stream.done += 1
            for block in work.uses:
                if self._blocks.get(block.address) is not block:
                    raise self.broken(f"{work.name} uses memory at {block.address:#x} that was freed")
            work.do()
