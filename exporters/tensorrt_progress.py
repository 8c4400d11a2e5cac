"""Watches a TensorRT build: progress out, cancellation in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Progress = Callable[[str, int, int], None]
"""Called with (phase, step, steps) as the builder goes on; step 0 opens a phase, step == steps closes it.

Phases nest and may come from several threads. An exception stops the build and is raised from build_engine.
"""


class Watch:
    """What a build reports to, and whether it was stopped. ``stopped_by`` is None or what stopped it."""

    def __init__(self, progress: Progress | None) -> None:
        self.stopped_by: BaseException | None = None
        self._progress = progress
        self._steps: dict[str, int] = {}
        self._lock = threading.Lock()

    def open_phase(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self.tell(phase, 0)

    def close_phase(self, phase: str) -> None:
        self.tell(phase, self._steps.get(phase, 0))

    def tell(self, phase: str, step: int) -> None:
        """Report a step. What the callback raises stops the build: in C++ frames it would end the process."""
        with self._lock:
            if self._progress is None or self.stopped_by is not None:
                return
            try:
                self._progress(phase, step, self._steps.get(phase, step))
            except BaseException as error:
                self.stopped_by = error

    def as_monitor(self, trt: Any) -> Any:
        """This watch as the library's own kind of object."""
        watch = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # of an optional library
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                watch.open_phase(phase_name, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                watch.tell(phase_name, step + 1)
                return watch.stopped_by is None

            def phase_finish(self, phase_name: str) -> None:
                watch.close_phase(phase_name)

        return Monitor()


@contextmanager
def stop_on_interrupt(watch: Watch) -> Iterator[None]:
    """Let Ctrl-C, and signals the caller handles by raising, stop the build at its next step.

    Raised inside the library's callbacks they would be lost, or end the process. What their handlers raise is kept
    for the end of the build.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken: dict[int, Callable[[int, FrameType | None], Any]] = {}
    for each in _SIGNALS:
        if callable(handler := signal.getsignal(each)):
            taken[each] = handler

    def note(number: int, frame: FrameType | None) -> None:
        try:
            taken[number](number, frame)
        except BaseException as error:
            watch.stopped_by = watch.stopped_by or error

    for number in taken:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in taken.items():
            if signal.getsignal(number) is note:  # a handler may have set another for the time after it
                signal.signal(number, handler)
