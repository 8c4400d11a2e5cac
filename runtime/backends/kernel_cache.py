"""TensorRT-RTX compiles an engine's kernels for the GPU when it is opened; this keeps them for the next time.

Files lie in the user's cache directory and never in a bundle: one for each engine, GPU, driver and library.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

from secateur.runtime.backends.preflight import Machine
from secateur.runtime.leftovers import held_file

_log = logging.getLogger(__name__)
_DIGEST = 32


def default_cache_directory() -> Path:
    """``$XDG_CACHE_HOME/secateur/tensorrt-rtx``, or the same under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "secateur" / "tensorrt-rtx"


class KernelCache:
    """The compiled kernels of one engine. A cache that cannot be read or written costs time, never an answer."""

    def __init__(self, directory: Path, engine_sha256: str, machine: Machine) -> None:
        key = "\n".join((engine_sha256, machine.gpu, str(machine.sm), str(machine.driver), machine.library.__version__))
        self.path = directory / f"{hashlib.sha256(key.encode()).hexdigest()}.kernels"
        self._cache: Any = None
        self._saved = b""
        self._ran = self._told = False
        self._lock = threading.Lock()

    def attach(self, config: Any) -> None:
        """Have a context that is made with ``config`` take kernels from here, and leave here what it compiles."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                if self._cache is None:
                    self._not_kept("the library makes no cache for them")
                    return
                self._load()
            if not config.set_runtime_cache(self._cache):
                _log.debug("the library does not take the kernel cache %s", self.path)

    def save_first(self) -> None:
        """:meth:`save` the first time: what an engine's first run has not compiled can wait until it is closed."""
        if not self._ran:
            self._ran = True
            self.save()

    def save(self) -> None:
        """Write what is new since the last time, whole or not at all."""
        with self._lock:
            if self._cache is None:
                return
            serialized = self._cache.serialize()
            if serialized is None:
                self._not_kept("the library does not give them")
                return
            blob = bytes(memoryview(serialized))
            digest = hashlib.sha256(blob).digest()
            if digest == self._saved:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with held_file(self.path.parent, ".kernels-") as (made, handle):
                    with os.fdopen(handle, "wb", closefd=False) as file:
                        file.write(digest + blob)
                    os.replace(made, self.path)
            except OSError as error:
                self._not_kept(str(error))
            self._saved = digest

    def _not_kept(self, reason: str) -> None:
        if not self._told:
            self._told = True
            _log.info("compiled kernels are not kept: %s", reason)

    def _load(self) -> None:
        """The library checks whose cache it is; that its bytes are whole is checked here."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return
        digest, blob = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(blob).digest() != digest:
            _log.info("%s is damaged and will be made again", self.path)
        elif self._cache.deserialize(blob):
            self._saved = digest
        else:
            _log.info("%s does not fit this machine and will be made again", self.path)
