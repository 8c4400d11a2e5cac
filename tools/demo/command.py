"""What the demos have in common: their command line, the bundles they compile, what they leave behind."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from secateur.runtime.errors import UserError
from secateur.tools.console import notes, results
from secateur.tools.threads import read_threads


def make_parser(
    module: str, doc: str | None, *, recipes: Sequence[str], keep: float | None, demo: Path, out: Path
) -> argparse.ArgumentParser:
    """Options of every demo. ``demo`` holds ``model`` and ``questions.json``."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc)
    named = "the published one" if keep is None else f"{keep:g}"
    parser.add_argument(
        "--recipes", nargs="+", default=list(recipes), metavar="NAME",
        help="rows, or YAML files, to compare (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--keep", type=float, default=keep, help=f"share of tokens left ({named})")
    parser.add_argument("--model", type=Path, default=demo / "model", help="Hugging Face directory (%(default)s)")
    parser.add_argument(
        "--questions", type=Path, default=demo / "questions.json", help="what to ask and show (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=out, help="where everything goes (%(default)s)")
    parser.add_argument("--threads", type=read_threads, help="threads of ONNX Runtime; all cores if not given")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback when something fails")
    return parser


def compile_bundles(options: argparse.Namespace, progress: Progress, **geometry: Any) -> dict[str, Path]:
    """Label -> bundle, the unpruned one first. ``geometry`` are the sizes of the one geometry they are made for."""
    task = progress.add_task("load the compiler", total=1 + len(options.recipes))
    from secateur.compiler.pipeline import RECIPES, Geometry, compile, load_recipe

    if options.keep is not None and not 0 < options.keep <= 1:
        raise UserError(f"keep ratio {options.keep:g} is out of (0, 1]", where="--keep")
    rows = {"none": RECIPES["none"], **{Path(name).stem: load_recipe(name) for name in options.recipes}}
    made: dict[str, Path] = {}
    for name, recipe in rows.items():
        keep = options.keep if recipe.stages else None
        progress.update(task, description=f"compile {name}")
        notes.print(f"compiling {options.model} with {name}")
        out = options.out / (name if keep is None else f"{name}-{keep:g}")
        compile(options.model, out, recipe=recipe, keep=keep, geometry=Geometry(**geometry), force=True)
        made["unpruned" if not recipe.stages else name if keep is None else f"{name} {keep:g}"] = out
        progress.advance(task)
    progress.update(task, description="compile")
    return made


def write_results(options: argparse.Namespace, figures: dict[str, object], table: Table, pictures: list[str]) -> None:
    """``demo.json``, and on the screen the table or the same figures; then where the pictures lie."""
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    (options.out / "demo.json").write_text(text + "\n", encoding="utf-8")
    if options.json:
        sys.stdout.write(text + "\n")
    else:
        results.print(table)
    notes.print(f"pictures of what was pruned: {options.out}/{pictures[0]}.png and {len(pictures) - 1} more")


def show_bars() -> Progress:
    """A bar for every step, on standard error."""
    return Progress(
        TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=notes
    )
