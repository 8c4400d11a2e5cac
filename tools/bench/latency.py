"""Time against FLOPs, for every recipe: `python -m secateur.tools.bench latency`.

Each pruned bundle runs in turn with the unpruned one, A B A B, and medians are compared, on the demo model and on a
bigger decoder with random weights. Run it on a machine that does nothing else; finished cells are kept below the work
folder and hold for the same model, programs and machine.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from secateur.compiler.pipeline import RECIPES, Geometry, Recipe
from secateur.tools.console import notes, results
from secateur.tools.sweep.bundles import Bundles
from secateur.tools.sweep.cells import choose_recipes
from secateur.tools.sweep.records import (
    PROGRAM_SOURCES,
    cell_key,
    digest_model,
    digest_sources,
    holds,
    read_record,
    write_record,
)
from secateur.tools.threads import read_threads

QUIET = 1.0
"""Load of the machine above which times are not worth writing down."""


@dataclass(frozen=True)
class Workbench:
    """A model to measure on; ``kind`` stands beside its figures."""

    name: str
    kind: str
    bundles: Bundles
    keeps: Sequence[float]
    repeat: int
    warmup: int


def saved_share(time_ratio: float, flops_ratio: float) -> float | None:
    """The share of the saved FLOPs that became saved time: (1 - 1/time) / (1 - 1/FLOPs).

    1 when time falls as FLOPs do, 0 when the clock does not move, negative when it got slower; None where the recipe
    saves less than a tenth of the FLOPs: the quotient of two small numbers says nothing.
    """
    saved = 1 - 1 / flops_ratio
    return (1 - 1 / time_ratio) / saved if saved >= 0.1 else None


def measure_cell(pruned: Path, unpruned: Path, bench: Workbench, threads: int) -> dict[str, Any]:
    """Medians in seconds of both bundles, and per time the ratios and the share that was saved."""
    from secateur.tools.profile import profile_bundles

    report = profile_bundles(
        [pruned, unpruned], repeat=bench.repeat, warmup=bench.warmup, threads=threads, memory=False
    )
    own, whole = report["bundles"]
    return {
        "visual_tokens": list(own["visual_tokens"].values()),
        "seconds": {name: values["p50"] for name, values in own["times"].items()},
        "unpruned_seconds": {name: values["p50"] for name, values in whole["times"].items()},
        "flops": own["flops"],
        "unpruned_flops": whole["flops"],
        "cache_bytes": [own["cache_bytes"], whole["cache_bytes"]],
        "ratios": {
            name: {**ratio, "saved": saved_share(ratio["time"], ratio["flops"])}
            for name, ratio in report["ratios"].items()
        },
    }


def run_workbench(
    bench: Workbench, recipes: Sequence[Recipe], threads: int, fresh: bool, load: float, progress: Progress
) -> list[dict[str, Any]]:
    """A record per recipe and keep ratio, from disk where it holds; ``load`` is the machine's before the first."""
    cells = [(recipe, keep) for recipe in recipes for keep in bench.keeps]
    task = progress.add_task(f"{bench.name} model", total=len(cells))
    model, sources = digest_model(bench.bundles.model), digest_sources(*PROGRAM_SOURCES, "tools/measure.py")
    whole = bench.bundles.work / f"latency-{bench.name}-none"
    records: list[dict[str, Any]] = []
    compiled = False
    for recipe, keep in cells:
        progress.update(task, description=f"{bench.name}: {recipe.name} {keep:g}")
        key = cell_key(
            model=model, plan=str(bench.bundles.plan(recipe, keep)), positions=recipe.positions, sources=sources,
            geometry=vars(bench.bundles.geometry), repeat=bench.repeat, machine=describe_machine(threads),
        )  # fmt: skip
        path = bench.bundles.work / "latency" / f"{bench.name}-{recipe.name}-{keep:g}.json"
        record = {} if fresh else read_record(path)
        if not holds(record, key):
            if not compiled:
                bench.bundles.compile(RECIPES["none"], 1.0, whole)
                compiled = True
            with bench.bundles.borrow(recipe, keep) as pruned:
                record = {"key": key, "recipe": recipe.name, "keep": keep, "load": load}
                record |= measure_cell(pruned, whole, bench, threads)
            write_record(path, record)
        records.append(record)
        progress.advance(task)
    progress.update(task, description=f"{bench.name} model")
    return records


def describe_machine(threads: int) -> dict[str, Any]:
    """What the times depend on, as far as it can be named."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return {"cpu": name, "cores": os.cpu_count(), "threads": threads, "onnxruntime": version("onnxruntime")}


def list_workbenches(options: argparse.Namespace) -> list[Workbench]:
    from secateur.tools.bench.random_model import make_random_model

    found = []
    if "demo" in options.models:
        small = Bundles(options.model, Geometry(batch=1, images=1, text_tokens=32, new_tokens=16), options.work)
        found.append(Workbench("demo", "trained", small, options.keeps, options.repeat, 3))
    if "random" in options.models:
        notes.print(f"random weights in {options.work / 'random-model'}")
        model = make_random_model(options.work / "random-model")
        big = Bundles(model, Geometry(batch=1, images=1, text_tokens=64, new_tokens=8), options.work)
        found.append(Workbench("random", "random weights", big, options.random_keeps, max(options.repeat // 6, 2), 1))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench latency", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=("demo", "random"), default=["demo", "random"])
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="the demo's directory (%(default)s)")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="rows of the table; all if not given")
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.5, 0.25, 0.1], metavar="R", help="for the demo")
    parser.add_argument("--random-keeps", nargs="+", type=float, default=[0.25, 0.1], metavar="R", help="for the other")
    parser.add_argument("--repeat", type=int, default=30, help="runs on the demo, a sixth on the other (%(default)s)")
    parser.add_argument("--threads", type=read_threads, default=2, help="threads of ONNX Runtime (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again even where results are there")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where results are kept (%(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs/latency.md"), help="page to write (%(default)s)")
    options = parser.parse_args(arguments)
    from secateur.tools.cli import run_script

    run_script(run, options)


def run(options: argparse.Namespace) -> None:
    from secateur.tools.bench import latency_page

    load = os.getloadavg()[0]
    if load > QUIET:
        notes.print(f"warning: the machine is busy (load {load:.1f}); times will be worse than they need be")
    recipes = choose_recipes(options.recipes)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    models = []
    with Progress(*columns, console=notes) as progress:
        for bench in list_workbenches(options):
            records = run_workbench(bench, recipes, options.threads, options.fresh, round(load, 2), progress)
            models.append(
                {"name": bench.name, "kind": bench.kind, "repeat": bench.repeat,
                 "geometry": vars(bench.bundles.geometry), "cells": records}
            )  # fmt: skip
    report = {"machine": describe_machine(options.threads), "models": models}
    write_record(options.work / "latency.json", report)
    for model in models:
        results.print(latency_page.draw(model))
    if options.recipes is None and len(models) == 2:
        options.docs.write_text(latency_page.write(report))
        notes.print(f"wrote {options.docs}")
    else:
        notes.print(f"{options.docs} is written only for all recipes and both models")


if __name__ == "__main__":
    main()
