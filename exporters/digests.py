"""SHA-256 of large files, computed beside other work: a checkpoint is read while its model is traced."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from secateur.runtime.manifest import hash_file

_THREADS = 4
_PIECE = 32 << 20  # between pieces a thread waits for Python's lock, as long as it takes to hash some megabytes
_TELL_SECONDS = 0.2
_NICENESS = 10  # whoever waits for nothing yet lets the rest of the compilation go first


@dataclass
class _Reading:
    job: Future[str]
    stamp: tuple[int, int]
    done: int = 0
    wanted: bool = True


class Digests:
    """Digests of files by path. Hashing keeps a core busy and lets go of Python's lock, so that several files go at a
    time. Leaving the context stops what is under way."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), initializer=_step_back)
        self._found: dict[Path, _Reading] = {}
        self._stopped = False

    def __enter__(self) -> Digests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._pool.shutdown(cancel_futures=True)

    def begin(self, files: Iterable[Path]) -> None:
        """Start reading ``files``, each once."""
        for file in files:
            if file not in self._found or self._found[file].stamp != _stamp(file):
                self._found[file] = reading = _Reading(Future(), _stamp(file))
                reading.job = self._pool.submit(self._hash, file, reading)

    def keep(self, files: Iterable[Path]) -> None:
        """Stop reading any but ``files``."""
        kept = set(files)
        for file in [file for file in self._found if file not in kept]:
            reading = self._found.pop(file)
            reading.wanted = False
            reading.job.cancel()

    def get(self, files: Iterable[Path], on_bytes: Callable[[int], None] = lambda done: None) -> dict[Path, str]:
        """The digests, in hexadecimal, once all are known; ``on_bytes`` is told how many bytes of them were read. A
        file that was written to since :meth:`begin` is read again."""
        files = list(files)
        self.begin(files)
        wanted = [self._found[file] for file in files]
        while wait([one.job for one in wanted], timeout=_TELL_SECONDS).not_done:
            on_bytes(sum(one.done for one in wanted))
        on_bytes(sum(one.done for one in wanted))
        return {file: self._found[file].job.result() for file in files}

    def _hash(self, file: Path, reading: _Reading) -> str:
        def count(read: int) -> None:
            if self._stopped or not reading.wanted:
                raise InterruptedError
            reading.done += read

        return hash_file(file, count, _PIECE)


def _step_back() -> None:
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        except OSError:  # a system that knows no priorities of threads
            return


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
