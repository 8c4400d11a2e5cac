"""Accuracy of the demo model against keep ratio, for every recipe: `python -m secateur.tools.bench accuracy`.

A sweep over the held-out questions without timing, written as a page. `random` is the floor; the rows `oracle-keep` are
the ceiling: the patches with most ink, which the scene generator knows, enter the pruned decoder. A row under the floor
is asked again with one thing changed, the control. Interrupt it when you like: finished cells are kept below the work
folder and hold as long as weights and programs do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from secateur.compiler.pipeline import Geometry
from secateur.runtime.errors import SecateurError
from secateur.tools.console import notes, results
from secateur.tools.sweep.bundles import Bundles
from secateur.tools.sweep.cells import choose_recipes, list_cells
from secateur.tools.sweep.data import read_demo
from secateur.tools.sweep.engine import Engine
from secateur.tools.sweep.records import write_record
from secateur.tools.threads import read_threads

QUESTIONS = 300
KEEPS = (1.0, 0.5, 0.25, 0.1)
GEOMETRY = Geometry(batch=1, images=1, text_tokens=24, new_tokens=4)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench accuracy", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="Hugging Face directory (%(default)s)")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="how many are asked (%(default)s)")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="rows of the table; all if not given")
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS), metavar="R", help="keep ratios")
    parser.add_argument("--threads", type=read_threads, default=2, help="threads of ONNX Runtime (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="ask again even where results are there")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where results are kept (%(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs/accuracy.md"), help="page to write (%(default)s)")
    options = parser.parse_args(arguments)
    from secateur.tools.cli import run_script

    run_script(run, options)


def run(options: argparse.Namespace) -> None:
    from secateur.tools.bench import accuracy_bounds, accuracy_page
    from secateur.tools.sweep import frontier

    whole = options.recipes is None and tuple(options.keeps) == KEEPS and options.questions == QUESTIONS
    cells = list_cells(choose_recipes(options.recipes), options.keeps)
    bundles = Bundles(options.model, GEOMETRY, options.work / f"accuracy-{options.questions}")
    engine = Engine(bundles, read_demo(options.questions), options.threads, repeat=0, fresh=options.fresh)
    records = engine.run(cells)
    controls = accuracy_bounds.control_cells(records)
    if controls:
        # The unpruned model comes first in every walk; its record holds.
        records += engine.run([cells[0], *controls])[1:]
    report = {
        "model": engine.model_digest, "questions": options.questions, "geometry": vars(GEOMETRY), "cells": records,
    }  # fmt: skip
    write_record(options.work / "accuracy.json", report)
    results.print(accuracy_page.draw(records))
    notes.print(accuracy_page.judge_ceiling(records))
    if engine.failures:
        cell, reason = engine.failures[0]
        raise SecateurError(f"{len(engine.failures)} cells failed, the first with: {reason}", where=str(cell))
    if whole:
        options.docs.write_text(accuracy_page.write(report))
        shown = [r for r in records if not accuracy_bounds.is_control(r)]
        about = {"model": "demo model", "data": "the held-out set", "frontier": frontier.find_frontier(shown)}
        frontier.plot({**report, **about, "cells": shown}, options.docs.with_name("frontier.png"))
        notes.print(f"wrote {options.docs} and frontier.png beside it")
    else:
        notes.print(f"{options.docs} is written only for all recipes, keep ratios and {QUESTIONS} questions")


if __name__ == "__main__":
    main()
