"""Temporary files and directories that end with their process: locked while it lives, else cleared by the next one.

A process that is killed removes nothing. What it leaves is told from what another one is still writing by a lock of the
kernel (``flock``), which ends with its process, however that ends. The lock of another machine on a shared disk may not
be seen, so names carry their machine: what another one made is cleared only when nothing in it was written for a day.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks there: nothing is cleared
    fcntl = None  # type: ignore[assignment]

QUIET_S = 24 * 3600
"""Seconds without a write after which what another machine made counts as left over."""
_TRIES = 8

_log = logging.getLogger(__name__)


@contextmanager
def held_directory(parent: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A new directory in ``parent``, removed at the end unless it was moved away; what killed processes left of the
    same prefix and suffix is removed first. Raises OSError where nothing can be made."""
    clear_leftovers(parent, prefix, suffix)
    made, lock = _make(parent, prefix, suffix, is_file=False)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def make_directory(parent: Path, prefix: str, suffix: str = "") -> Path:
    """A new directory that is named as :func:`held_directory` names it, and not held."""
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{_machine()}-", suffix=suffix, dir=parent))


@contextmanager
def held_file(parent: Path, prefix: str) -> Iterator[tuple[Path, int]]:
    """The same for a file, with a descriptor open for writing."""
    clear_leftovers(parent, prefix)
    made, handle = _make(parent, prefix, "", is_file=True)
    assert handle is not None, "a file is made open"
    try:
        yield made, handle
    finally:
        made.unlink(missing_ok=True)
        os.close(handle)


def clear_leftovers(parent: Path, prefix: str, suffix: str = "") -> list[Path]:
    """Remove what :func:`held_directory` and :func:`held_file` made in ``parent`` for processes that are gone.

    Nothing of another user, no link, nothing whose lock is held or cannot be asked for. Returns what was removed.
    """
    removed = []
    for path in list_leftovers(parent, prefix, suffix):
        with lock_leftover(path, prefix, suffix) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                if not path.exists():
                    _log.info("removed %s, which a process that was killed had left", path)
                    removed.append(path)
    return removed


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Lock a file or directory that is there, where that can be done, so that nobody takes it for left over."""
    handle = _open(path)
    try:
        if handle is not None:
            _try_lock(handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def list_leftovers(parent: Path, prefix: str, suffix: str = "") -> list[Path]:
    """Everything in ``parent`` that is named as if made here, in use or not."""
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return []
    return [parent / name for name in names if _machine_of(name, prefix, suffix) is not None]


@contextmanager
def lock_leftover(path: Path, prefix: str, suffix: str = "") -> Iterator[bool]:
    """Whether ``path`` was left by a process that is gone; it is locked meanwhile if so."""
    handle = _open(path)
    try:
        yield handle is not None and _is_left(path, handle, _machine_of(path.name, prefix, suffix))
    finally:
        if handle is not None:
            os.close(handle)


def _is_left(path: Path, handle: int, machine: str | None) -> bool:
    if not _try_lock(handle) or os.fstat(handle).st_uid != os.getuid():
        return False
    return machine == _machine() or time.time() - _last_write(path) > QUIET_S


def _last_write(path: Path) -> float:
    """The latest change of anything below a path, seconds since the epoch."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    times = [0.0]
    for one in paths:
        try:
            times.append(one.lstat().st_mtime)
        except OSError:  # gone meanwhile: somebody works there
            times.append(time.time())
    return max(times)


def _make(parent: Path, prefix: str, suffix: str, *, is_file: bool) -> tuple[Path, int | None]:
    """A new file or directory and the descriptor that holds its lock. Another process may clear it before it is locked:
    then it is made again."""
    for _ in range(_TRIES):
        if is_file:
            handle, name = tempfile.mkstemp(prefix=f"{prefix}{_machine()}-", suffix=suffix, dir=parent)
            made, lock = Path(name), handle
        else:
            made = make_directory(parent, prefix, suffix)
            opened = _open(made)
            if opened is None:
                if not made.exists():
                    continue
                return made, None
            lock = opened
        _try_lock(lock)
        try:
            if os.path.samestat(os.fstat(lock), made.stat()):
                return made, lock
        except FileNotFoundError:
            pass
        os.close(lock)
    raise OSError(errno.EAGAIN, "other processes remove it at once", str(parent))


def _open(path: Path) -> int | None:
    """A descriptor to lock; None for links and what cannot be opened."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    kind = os.fstat(handle).st_mode
    if not stat.S_ISDIR(kind) and not stat.S_ISREG(kind):
        os.close(handle)
        return None
    return handle


def _try_lock(handle: int) -> bool:
    """Whether the lock is ours now; not where somebody has it, nor on a disk that has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _machine() -> str:
    """Eight digits that stand for this machine's name."""
    return hashlib.sha256(socket.gethostname().encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _machine_of(name: str, prefix: str, suffix: str) -> str | None:
    """The machine a name made here speaks of, "" for names as they were made before there was one in them; None for
    other names. Of those before, only what a suffix marks is told from a user's own."""
    match = re.fullmatch(rf"{re.escape(prefix)}(?:([0-9a-f]{{8}})-)?[a-z0-9_]{{8}}{re.escape(suffix)}", name)
    if match is None or (match[1] is None and not suffix):
        return None
    return match[1] or ""
