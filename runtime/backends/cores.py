"""How many cores this process may really use."""

from __future__ import annotations

import logging
import operator
import os
from pathlib import Path

from secateur.runtime.errors import UserError

_log = logging.getLogger(__name__)
_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(topology: Path = _TOPOLOGY, quota: Path = _QUOTA) -> int:
    """Physical cores in the process's affinity mask, capped by the container's CPU quota; at least 1.

    Libraries that count the machine's cores start 64 threads in a container that may use two. Two hardware
    threads of a core share its multipliers, so they count once.
    """
    cores = {_siblings(topology, cpu) for cpu in _allowed()}
    return max(1, min(len(cores), _cap(quota)))


def bound_threads(asked: int | None, name: str = "threads", quota: Path = _QUOTA) -> int:
    """Threads to start where a caller asked for ``asked``; None takes :func:`available_cores`.

    More than the process has hardware threads only take the machine from others: such a number is cut to those, and a
    warning says so. Raises UserError, which names the option ``name``, for what is no whole number of at least 1.
    """
    if asked is None:
        return available_cores(quota=quota)
    try:
        count = -1 if isinstance(asked, bool) else operator.index(asked)
    except TypeError:
        count = -1
    if count < 1:
        raise UserError(f"{name} is {asked!r}", fix="give a whole number of at least 1, or leave it out for all cores")
    most = max(1, min(len(_allowed()), _cap(quota)))
    if count > most:
        _log.warning("%d %s are asked for, this process may use %d: %d are started", count, name, most, most)
    return min(count, most)


def _allowed() -> set[int]:
    """The hardware threads in the process's affinity mask."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _siblings(topology: Path, cpu: int) -> str:
    """The hardware threads of the core that ``cpu`` belongs to, as the kernel writes them."""
    try:
        return (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cap(quota: Path) -> int:
    """Whole cores of ``cpu.max`` ("200000 100000" is two); no quota is no cap."""
    try:
        limit, period = quota.read_text().split()
        return max(1, -(-int(limit) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 16
