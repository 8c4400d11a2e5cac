"""``make test-matrix``: every row on every layout, resumable. `python -m tests.matrix` from the repository's root.

Finished cells are kept below the work folder and hold as long as the code, the row's text and the layouts do. Cells
that failed are tried again each time. Exit code 1 when any fails.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.passes.recipes import RECIPES, get_recipe
from secateur.tools.console import notes
from secateur.tools.threads import read_threads

from . import page
from .applies import lacks
from .cells import list_cells
from .layouts import LAYOUTS
from .walk import read_held, walk


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="rows of the table; all if not given")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--kinds", nargs="+", choices=("parity", "identity", "engine"), help="all if not given")
    parser.add_argument("--jobs", type=read_threads, default=2, help="processes (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="run again even what holds")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page, which says what is missing")
    parser.add_argument("--work", type=Path, default=Path("build/matrix"), help="where results are kept (%(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs/matrix.md"), help="page to write (%(default)s)")
    options = parser.parse_args(arguments)
    layouts = {name: LAYOUTS[name] for name in options.layouts}
    recipes = [get_recipe(name) for name in options.recipes or RECIPES]
    pairs = itertools.product(recipes, layouts.values())
    skipped = {(r.name, o.name): why for r, o in pairs if (why := lacks(r, o.tower))}
    cells = [c for c in list_cells(recipes, layouts) if options.kinds is None or c.kind in options.kinds]
    found = {} if options.fresh else read_held(cells, options.work)
    # What failed is tried again.
    todo = [] if options.page else [cell for cell in cells if cell not in found or not found[cell]["outcome"]["passed"]]
    notes.print(f"{len(cells)} cells, {len(cells) - len(todo)} of them hold from before")
    columns = (
        TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=notes, speed_estimate_period=600) as progress:
        task = progress.add_task("starting", total=len(todo))
        for cell, record in walk(todo, options.work, options.jobs):
            found[cell] = record
            progress.update(task, advance=1, description=str(cell)[:44])
            for line in page.failures([record]):
                notes.print(f"failed: {line}", markup=False)
    records = [found[cell] for cell in cells if cell in found]
    whole = not options.recipes and options.kinds is None and options.layouts == list(LAYOUTS)
    if whole:
        options.docs.write_text(page.write(records, skipped, len(cells) - len(records)))
        notes.print(f"wrote {options.docs}")
    else:
        notes.print(f"{options.docs} is written only for all rows, layouts and kinds")
    failed = page.failures(records)
    unbuilt = sum(r["outcome"]["passed"] is None for r in records)
    if unbuilt:
        notes.print(
            f"{unbuilt} engines not built: tensorrt-rtx is not installed (pip install 'secateur[tensorrt-rtx]')",
            markup=False,
        )
    for line in failed:
        notes.print(f"failed: {line}", markup=False)
    notes.print(f"{len(records) - len(failed) - unbuilt} of {len(records)} cells passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
