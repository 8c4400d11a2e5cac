"""How many cores this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(topology: Path = _TOPOLOGY, quota: Path = _QUOTA) -> int:
    """Physical cores in the process's affinity mask, capped by the container's CPU quota; at least 1.

    Libraries that count the machine's cores start 64 threads in a container that may use two. Two hardware
    threads of a core share its multipliers, so they count once.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(topology, cpu) for cpu in allowed}
    return max(1, min(len(cores), _cap(quota)))


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
