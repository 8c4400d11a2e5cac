"""``make fuzz``: property tests on new examples, for so many minutes; what fails becomes a case of ``make test``.

Every seed draws other examples. A process of its own runs the property tests of the repository for one seed; those
that are through are remembered below the work folder, and the next run goes on behind them. What fails is shrunk and
written to tests/fuzz/cases as the values that were drawn. Mend the fault, keep the file: `make test` runs it from then
on. Delete a file only when its test has gone.

    make fuzz MINUTES=30                 # half an hour on one core
    make fuzz MINUTES=30 FUZZ_WORKERS=2
    python -m tests.fuzz --minutes 5 --only tests/unit/test_methods_windows.py
    python -m tests.fuzz --minutes 5 --fresh                # begin with the first seed again
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.tools.console import notes

from .cases import FOLDER, read_cases
from .record import read_record

ROOT = Path(__file__).parents[2]
GRACE = 120.0
"""Seconds that a test may go on when the time is over."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a seed of its own (%(default)s)")
    parser.add_argument("--seeds", type=int, help="stop after so many seeds as well")
    parser.add_argument("--only", nargs="+", type=Path, metavar="FILE", help="test files; all with property tests")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB of data a process may hold (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the seeds that are through")
    parser.add_argument("--work", type=Path, default=Path("build/fuzz"), help="where they are noted (%(default)s)")
    parser.add_argument("--cases", type=Path, default=FOLDER, help="where found cases go (%(default)s)")
    options = parser.parse_args(arguments)
    for name, value in (("--minutes", options.minutes), ("--workers", options.workers), ("--memory", options.memory)):
        if not 0 < value < float("inf"):
            parser.error(f"{name} is {value:g}: give a number above 0")
    files = options.only or list_files()
    if missing := [str(path) for path in files if not path.is_file()]:
        parser.error(f"no file {missing[0]}")
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    known = set(read_cases(options.cases))
    finished = run(options, files)
    found = sorted(set(read_cases(options.cases)) - known)
    for path in found:
        notes.print(f"found: {path}: {read_cases(options.cases)[path]['found']}", markup=False)
    notes.print(f"{finished} seeds through in this run, {len(found)} new cases")
    sys.exit(1 if found or FAULTS else 0)


FAILED: set[str] = set()
"""Tests that have failed in this run: further seeds would find the same fault."""
FAULTS: list[str] = []
"""Processes that ended otherwise than by their tests' failing or passing."""


def list_files() -> list[Path]:
    """Test files that use Hypothesis."""
    every = [path for folder in ("null", "unit") for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))]
    return [path for path in every if "from hypothesis import" in path.read_text(encoding="utf-8")]


def run(options: argparse.Namespace, files: list[Path]) -> int:
    """Seed after seed until the time is over; returns how many came to their end."""
    until, finished, seed = time.time() + 60 * options.minutes, 0, 0
    running: dict[subprocess.Popen[bytes], tuple[int, Path]] = {}
    columns = (TextColumn("{task.description:<60}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes) as progress:
        task, start = progress.add_task("starting", total=60 * options.minutes), time.time()
        try:
            while True:
                more = time.time() < until and (options.seeds is None or finished + len(running) < options.seeds)
                while more and len(running) < options.workers:
                    seed += 1
                    record = options.work / f"seed-{seed:06d}.jsonl"
                    if not _through(record):
                        running[_start(options, files, seed, record, until)] = (seed, record)
                        break
                if not running:
                    if more:
                        continue
                    return finished
                time.sleep(0.3)
                lines = [line for _, record in running.values() for line in read_record(record)[-1:]]
                last = str(lines[-1].get("test", "")).rpartition("::")[2] if lines else ""
                progress.update(task, completed=time.time() - start, description=f"seed {seed}: {last}"[:60])
                for process in [process for process in running if process.poll() is not None]:
                    number, record = running.pop(process)
                    finished += _through(record)
                    _report(number, record, process.returncode)
                if time.time() > until + GRACE:
                    return finished
        finally:
            for process in running:
                process.kill()
                process.wait()


def _through(record: Path) -> bool:
    return any(line.get("done") for line in read_record(record))


def _start(
    options: argparse.Namespace, files: list[Path], seed: int, record: Path, until: float
) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.fuzz.record",
        "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}", f"--fuzz-record={record.resolve()}",
        f"--fuzz-until={until}", f"--fuzz-cases={options.cases.resolve()}", *(str(path.resolve()) for path in files),
        *(f"--deselect={test}" for test in sorted(FAILED)),
    ]  # fmt: skip
    limit = int(options.memory * 2**30)
    with record.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )  # fmt: skip


def _report(seed: int, record: Path, code: int) -> None:
    lines = [line for line in read_record(record) if "test" in line]
    failed = [line["test"] for line in lines if line["outcome"] == "failed"]
    FAILED.update(failed)
    text = f"seed {seed}: {len(lines)} tests, {len(failed)} failed"
    if code not in (0, 1, 5):
        FAULTS.append(f"seed {seed}")
        text += f"; its process ended with {code}, see {record.with_suffix('.log')}"
    notes.print("; ".join([text, *failed]), markup=False)


if __name__ == "__main__":
    main()
