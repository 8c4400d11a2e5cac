"""How much memory this process may take: what the kernel has free, and the limits of its control groups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """What this process holds and may take beside it; None where the kernel does not say (other than Linux)."""
    try:
        free = _kib(proc / "meminfo", "MemAvailable")
        held = _kib(proc / "self" / "status", "VmRSS")
    except (OSError, LookupError):
        return None
    return held + min([free, *_limits(proc, cgroup)])


def _kib(file: Path, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.M)
    if match is None:
        raise LookupError(name)
    return int(match[1]) * 1024


def _limits(proc: Path, root: Path) -> Iterator[int]:
    """Bytes left under the memory limit of every control group this process is in, of either version.

    Cached pages nobody uses are given back when they are wanted, so they count as free.
    """
    try:
        groups = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        version2 = controllers == ""
        top = root if version2 else root / "memory"
        limit, used, idle = (
            ("memory.max", "memory.current", "inactive_file")
            if version2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        own = top / path.lstrip("/")
        # Inside a container the path may be the host's: then only the top is there.
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            try:
                most = (group / limit).read_text().strip()
                if most == "max":
                    continue
                stat = re.search(rf"^{idle} (\d+)$", (group / "memory.stat").read_text(), re.M)
                yield max(0, int(most) - int((group / used).read_text()) + (int(stat[1]) if stat else 0))
            except (OSError, ValueError):
                continue
