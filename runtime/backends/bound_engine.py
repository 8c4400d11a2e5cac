"""One program tied to its buffers: addresses set once, then enqueued, or replayed as a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.runtime.backends.cuda import DeviceMemory, Graph, Stream, on_device
from secateur.runtime.backends.device_buffer import DeviceBuffer
from secateur.runtime.errors import SecateurError

_log = logging.getLogger(__name__)


@dataclass
class GraphUse:
    """Whether programs are replayed as CUDA graphs, and which could not be: they are told of once."""

    wanted: bool
    refused: set[str] = field(default_factory=set)

    def refuse(self, program: str, reason: str) -> None:
        if program not in self.refused:
            self.refused.add(program)
            _log.warning("%s runs without a CUDA graph: %s", program, reason)


class BoundEngine:
    """A program's execution context with everything it reads and writes; keeps all of that alive.

    The first run is a plain one: libraries allocate and compile in it. The second is captured as a CUDA graph, and
    later ones replay that: program, geometry and addresses are this object's for good, so the graph is too.
    """

    def __init__(
        self,
        name: str,
        context: Any,
        inputs: Mapping[str, DeviceBuffer],
        outputs: Mapping[str, DeviceBuffer],
        weights: Mapping[str, int],
        scratch: DeviceMemory,
        graphs: GraphUse,
        after_first: Callable[[], None],
        alive: tuple[Any, ...],
    ) -> None:
        """``weights``: device address of each input that is a weight. ``after_first`` is called after the first run.

        ``alive`` is what the context needs beside its arguments: its engine, the memory of the weights.
        """
        self._name, self._context, self._graphs, self._after_first = name, context, graphs, after_first
        self._alive = (alive, scratch, dict(inputs), dict(outputs))
        self._inputs = list(inputs.values())
        read = {buffer.address for buffer in self._inputs}
        self._only_written = [buffer for buffer in outputs.values() if buffer.address not in read]
        self._stream = Stream()
        self._runs = 0
        self._graph: Graph | None = None
        if scratch.size:
            context.set_device_memory(scratch.address, scratch.size)
        addresses = {**weights, **{port: buffer.address for port, buffer in (*inputs.items(), *outputs.items())}}
        for port, address in addresses.items():
            if not context.set_tensor_address(port, address):
                raise SecateurError(f"the library does not take an address for {port}", where=f"program {name}")

    @on_device()
    def run(self) -> None:
        try:
            for buffer in self._inputs:
                buffer.upload(self._stream)
            for buffer in self._only_written:
                buffer.forget()
            self._launch()
            self._stream.synchronize()
        except SecateurError as error:
            self._settle()
            raise SecateurError(str(error), where=f"program {self._name}") from error
        except BaseException:  # Ctrl-C, above all
            self._settle()
            raise
        self._runs += 1
        if self._runs == 1:
            self._after_first()

    def _launch(self) -> None:
        if self._graph is None and self._runs == 1 and self._graphs.wanted:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.number):
            raise SecateurError("the library does not run the engine")

    def _capture(self) -> Graph | None:
        can = getattr(self._context, "is_stream_capturable", None)
        if can is not None and not can(self._stream.number):
            self._graphs.refuse(self._name, "the library cannot capture it")
            return None
        try:
            return Graph(self._stream, self._enqueue)
        except SecateurError as error:
            self._graphs.refuse(self._name, str(error))
            return None

    def _settle(self) -> None:
        """After a failure: buffers are let go next, and nothing may be running that uses them."""
        try:
            self._stream.synchronize()
        except SecateurError as error:
            _log.debug("%s: %s", self._name, error)
