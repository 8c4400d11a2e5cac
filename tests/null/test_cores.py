"""Counting the cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from secateur.runtime.backends.cores import available_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight hardware threads of four cores, all of them allowed."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def test_hardware_threads_count_once(machine: Path) -> None:
    assert available_cores(machine, machine / "none") == 4


def test_affinity_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 2})
    assert available_cores(machine, machine / "none") == 2


@pytest.mark.parametrize(
    ("quota", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("max 100000", 4), ("1000 100000", 1), ("", 4)]
)
def test_the_quota_caps(machine: Path, quota: str, cores: int) -> None:
    (machine / "cpu.max").write_text(quota)
    assert available_cores(machine, machine / "cpu.max") == cores


def test_an_unknown_topology_counts_every_thread(machine: Path) -> None:
    assert available_cores(machine / "nothing", machine / "none") == 8
