"""Sizes in bytes for people."""

from __future__ import annotations


def size_text(count: float) -> str:
    """``12.3 MiB``: in the unit that leaves at least 1 before the point, so that nothing small looks like nothing."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
