"""A copy of the tree in which mutants are put and taken out again, and the process that runs test files there.

The working tree is never written to. The copy lies in a temporary folder that goes when the bench closes.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
PLUGIN = "_hypothesis_pytestplugin"
"""The one plugin the tests need; to look for others in all that is installed takes longer than most tests."""


@dataclass(frozen=True)
class Answer:
    """How a test file ended. ``seconds`` are the processor's; ``failed`` is the first test that failed, or ""."""

    code: int
    late: bool
    seconds: float
    failed: str


def list_tree(root: Path) -> list[str]:
    """Files that git tracks or would track."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sorted({name for name in listed.split("\0") if name and os.path.lexists(root / name)})


class Bench:
    """``with Bench(root) as bench: bench.run("tests/null/test_text.py", cpu=30, wall=90)``."""

    def __init__(self, root: Path = ROOT) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="secateur-mutants-"))
        self.tree = self._folder / "tree"
        self._counter = itertools.count(1)
        for name in list_tree(root):
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, self.tree / name, follow_symlinks=False)
        (self._folder / "tmp").mkdir()
        self.log = self._folder / "log.txt"
        environment = {
            **os.environ, "PYTHONPATH": str(self.tree / "src"), "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._folder / "tmp"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.server"], cwd=self.tree, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """End the process, also from another thread; it takes along the child it waits for."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def run(self, test: str, cpu: float, wall: float, mutant: tuple[str, str] | None = None) -> Answer:
        """Run the test file, or the one test, until it fails; ``mutant`` is a file and what it reads meanwhile."""
        arguments = [
            "-x", "-q", "-p", "no:cacheprovider", "-p", PLUGIN, "-m", "not device",
            f"--basetemp={self._folder / 'base'}", test,
        ]  # fmt: skip
        order = {"arguments": arguments, "cpu": int(cpu), "wall": wall, "log": str(self.log)}
        if mutant is None:
            return Answer(**self._ask(order))
        path = self.tree / mutant[0]
        before, times = path.read_bytes(), path.stat()
        try:
            path.write_text(mutant[1], encoding="utf-8")
            # Python trusts a compiled file by the second and size of its source: every change gets a second of its own.
            later = times.st_mtime + 1000 * next(self._counter)
            os.utime(path, (later, later))
            return Answer(**self._ask(order))
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs the tests ended with {self._process.wait()}")
        return dict(json.loads(answer))
