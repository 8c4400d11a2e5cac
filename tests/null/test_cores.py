"""Counting the cores a process may use."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import pytest

from secateur.runtime.backends.cores import available_cores, bound_threads
from secateur.runtime.errors import UserError
from secateur.runtime.session import Session
from secateur.tools import cli
from secateur.tools.threads import read_threads


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
    ("quota", "cores"),
    [("200000 100000", 2), ("150000 100000", 2), ("max 100000", 4), ("1000 100000", 1), ("", 4), ("100000 0", 4)],
)
def test_the_quota_caps(machine: Path, quota: str, cores: int) -> None:
    (machine / "cpu.max").write_text(quota)
    assert available_cores(machine, machine / "cpu.max") == cores


def test_an_unknown_topology_counts_every_thread(machine: Path) -> None:
    assert available_cores(machine / "nothing", machine / "none") == 8


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("quota", "most"), [("", 8), ("300000 100000", 3)])
def test_more_threads_than_may_run_are_not_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quota: str, most: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert bound_threads(most, quota=tmp_path / "cpu.max") == most
    assert caplog.messages == []
    assert bound_threads(100_000, quota=tmp_path / "cpu.max") == most
    assert caplog.messages == [f"100000 threads are asked for, this process may use {most}: {most} are started"]


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("asked", [0, -1, -100_000, 2.0, "4", True, float("nan")])
def test_a_number_of_threads_that_is_none(asked: object) -> None:
    with pytest.raises(UserError, match=r"threads is .*; give a whole number of at least 1"):
        bound_threads(asked)  # type: ignore[arg-type]


@pytest.mark.usefixtures("eight")
def test_scripts_read_threads_the_same_way() -> None:
    assert (read_threads("3"), read_threads("1000000")) == (3, 8)
    for text in ("0", "-2", "many", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="threads is"):
            read_threads(text)


def test_no_script_reads_a_count_of_threads_or_processes_in_another_way() -> None:
    root = Path(__file__).parents[2]
    for path in sorted(p for folder in ("tools", "tests/matrix") for p in (root / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for option in ("--threads", "--jobs", "--workers", "--processes"):
            for at in text.split(f'"{option}"')[1:]:
                typed = at.lstrip(", \n").startswith("type=")
                assert not typed or at.lstrip(", \n").startswith("type=read_threads"), f"{path}: {option}"


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the kernel lists no threads")
def test_a_session_starts_no_more_threads_than_there_are_cores(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = count_threads()
    with caplog.at_level(logging.WARNING), Session(built, threads=100_000):
        # The three programs have a pool each.
        assert count_threads() - before <= 3 * len(os.sched_getaffinity(0))
    assert [message.partition(",")[0] for message in caplog.messages] == ["100000 threads are asked for"]


@pytest.mark.parametrize("threads", ["0", "-1"])
def test_the_command_refuses_no_threads(
    built: Path, image_file: Path, capsys: pytest.CaptureFixture[str], threads: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(built), "--image", str(image_file), "--prompt", "x", "--threads", threads])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
