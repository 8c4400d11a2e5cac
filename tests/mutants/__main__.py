"""``make mutants``: small faults put into the code, one at a time; the tests near each should fail.

The sample in tests/mutants/sample.json was drawn once. Verdicts are kept below the work folder and hold as long as the
mutated file and the tests that judged it stay as they are; the next run goes on where this one stopped. The working
tree is not touched: mutants live in a copy of it.

    make mutants JOBS=2
    python -m tests.mutants --only passes/stage.py runtime/    # those of a file, of a folder
    python -m tests.mutants --only m017 --fresh                # one, once more
    python -m tests.mutants --page                             # run nothing: write the page from what holds
"""

from __future__ import annotations

import argparse
import queue
import signal
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from secateur.tools.console import notes, results
from secateur.tools.threads import read_threads

from . import page
from .bench import ROOT, Bench
from .judge import Judge, Verdict
from .nearest import LIMIT
from .sample import SAMPLE, SEED, Mutant, draw, list_files, read, write

GOAL = 0.9


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="WHAT", help="mutants, files, or folders with a slash at the end")
    parser.add_argument("--limit", type=int, help="stop after so many")
    parser.add_argument("--jobs", type=read_threads, default=1, help="processes (%(default)s)")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="FACTOR",
                        help="a test file may take so many times its seconds, and ten more (%(default)s)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=LIMIT, metavar="LIMIT",
                        help="processor seconds for tests of a mutant; few: a first look (%(default)s)")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="run again even what holds")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page")
    parser.add_argument("--draw", type=int, metavar="COUNT", help="draw a sample and stop; refused where one exists")
    parser.add_argument("--work", type=Path, default=Path("build/mutants"), help="where verdicts are (%(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs/mutants.md"), help="page to write (%(default)s)")
    options = parser.parse_args(arguments)
    if options.draw is not None:
        if SAMPLE.exists():
            parser.error(f"{SAMPLE} is there: a sample is drawn once, before tests are written for it")
        drawn, lines = draw(ROOT, list_files(ROOT), options.draw, SEED)
        write(drawn, lines, SEED)
        notes.print(f"drew {len(drawn)} of {lines} lines")
        return
    sample, origin = read()
    inside = sorted(sample, key=lambda mutant: (mutant.file, mutant.line))
    wanted = [mutant for word in options.only or ("",) for mutant in inside if _matches(mutant, word)]
    chosen = list({mutant.id: mutant for mutant in wanted}.values())
    if not chosen:
        parser.error(f"no mutant of the sample is {' or '.join(options.only)}")
    judge, reasons = (
        Judge(ROOT, options.work, options.timeout, limit=options.seconds, fresh=options.fresh),
        page.read_reasons(),
    )
    verdicts = {} if options.fresh else {m.id: found for m in chosen if (found := judge.held(m)) is not None}
    todo = [mutant for mutant in chosen if mutant.id not in verdicts]
    notes.print(f"{len(chosen)} mutants, {len(verdicts)} verdicts hold from before")
    if not options.page:
        verdicts |= walk(todo[: options.limit], judge, options.jobs, reasons)
    kinds = {name: page.classify(verdict, reasons.get(name)) for name, verdict in verdicts.items()}
    for row in page.table(chosen, kinds):
        results.print("  ".join(f"{cell:>{12 if place else 10}}" for place, cell in enumerate(row)), markup=False)
    faults = page.list_faults(kinds, reasons) + [
        f"{test} fails on the code as it is, see {options.work / 'failed.log'}" for test in sorted(judge.failing)
    ]
    for line in faults:
        notes.print(line, markup=False)
    if options.page or len(kinds) == len(sample):
        options.docs.write_text(page.write(sample, origin, verdicts, reasons), encoding="utf-8")
        notes.print(f"wrote {options.docs}")
    else:
        notes.print(f"{options.docs} is written when all {len(sample)} mutants have a verdict, or with --page")
    sys.exit(1 if faults or page.share(kinds.values()) < GOAL else 0)


def _matches(mutant: Mutant, word: str) -> bool:
    inside = (word.endswith("/") or not word) and mutant.file.startswith(word)
    return inside or word in (mutant.id, mutant.file)


def walk(todo: list[Mutant], judge: Judge, jobs: int, reasons: dict[str, dict[str, str]]) -> dict[str, Verdict]:
    """Judge ``todo`` on ``jobs`` benches; interrupted, the copies of the tree go as well."""
    left: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in todo:
        left.put(mutant)
    found: dict[str, Verdict] = {}
    benches: list[Bench] = []
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    columns = (TextColumn("{task.description:<50}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, disable=not todo) as progress:
        task = progress.add_task("starting", total=len(todo))

        def work() -> None:
            with Bench(ROOT) as bench:
                benches.append(bench)
                while not stop.is_set():
                    try:
                        mutant = left.get_nowait()
                    except queue.Empty:
                        return
                    progress.update(task, description=f"{mutant.id} {mutant.file}"[:50])
                    found[mutant.id] = judge.judge(mutant, bench)
                    progress.update(task, advance=1)
                    _tell(mutant, found[mutant.id], reasons)

        with ThreadPoolExecutor(jobs) as pool:
            working = [pool.submit(work) for _ in range(min(jobs, len(todo)))]
            try:
                wait(working, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
                for bench in benches:
                    bench.stop()
        for each in working:
            each.result()
    return found


def _tell(mutant: Mutant, verdict: Verdict, reasons: dict[str, dict[str, str]]) -> None:
    kind = page.classify(verdict, reasons.get(mutant.id))
    where = f"{mutant.file}:{mutant.line} {mutant.operator} ({mutant.occurrence}): {mutant.text}"
    killer = verdict.get("killer", "")
    notes.print(f"{mutant.id} {kind:<10} {verdict['seconds']:5.1f} s  {where}  {killer}", markup=False)


if __name__ == "__main__":
    main()
