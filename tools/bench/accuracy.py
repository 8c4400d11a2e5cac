"""Accuracy of the demo model against keep ratio, for every recipe: `python -m secateur.tools.bench accuracy`.

Every cell of the table is a bundle of its own, compiled and asked the held-out questions through ONNX Runtime. The rows
`oracle-keep` are the ceiling: the patches with most ink, which the scene generator knows, enter the pruned decoder.
Interrupt it when you like: finished cells are kept below the work folder and hold as long as weights and programs do.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from secateur.compiler.pipeline import RECIPES, Geometry
from secateur.runtime.manifest import read_manifest
from secateur.runtime.schema import Manifest
from secateur.tools.bench.answer import Asked, UnprunedVision, ask_all
from secateur.tools.bench.bundles import Bundles, choose_recipes
from secateur.tools.bench.grid import KEEPS, Cell, list_cells
from secateur.tools.bench.records import (
    PROGRAM_SOURCES,
    cell_key,
    digest,
    digest_model,
    digest_sources,
    holds,
    mean,
    read_record,
    write_record,
)
from secateur.tools.console import notes, results, set_up_logging

QUESTIONS = 1000
GEOMETRY = Geometry(batch=1, images=1, text_tokens=24, new_tokens=4)
# The questions and the way they are asked; a change here makes old results worthless.
ASKING_SOURCES = (
    *(f"tools/demo/{name}.py" for name in ("architecture", "drawing", "language", "scenes")),
    "tools/bench/answer.py",
    "tools/bench/grid.py",
)


@dataclass(frozen=True)
class Bench:
    """One run over a grid of cells."""

    bundles: Bundles
    count: int
    threads: int
    fresh: bool

    @cached_property
    def model_digest(self) -> str:
        return digest_model(self.bundles.model)

    @cached_property
    def sources(self) -> str:
        return digest_sources(*PROGRAM_SOURCES, *ASKING_SOURCES)

    @cached_property
    def questions(self) -> list[Asked]:
        return load_questions(self.count)

    def path(self, cell: Cell) -> Path:
        return self.bundles.work / f"accuracy-{self.count}" / cell.file_name

    def key(self, cell: Cell) -> str:
        plan = self.bundles.plan(cell.recipe, cell.keep)
        return cell_key(
            model=self.model_digest, plan=str(plan), positions=cell.recipe.positions, questions=self.count,
            geometry=vars(self.bundles.geometry), sources=self.sources, by_oracle=cell.by_oracle,
        )  # fmt: skip

    def run(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """A record per cell, from disk where it holds."""
        records = []
        with ExitStack() as stack:
            progress = stack.enter_context(_progress())
            overall = progress.add_task("cells", total=len(cells))
            inner = progress.add_task("", total=self.count, visible=False)
            vision: list[UnprunedVision] = []

            def unpruned_vision() -> UnprunedVision:
                if not vision:
                    bundle = stack.enter_context(self.bundles.borrow(RECIPES["none"], 1.0))
                    vision.append(UnprunedVision(bundle, self.questions, self.threads))
                    stack.callback(vision[0].close)
                return vision[0]

            for cell in cells:
                record = {} if self.fresh else read_record(self.path(cell))
                if not holds(record, self.key(cell)):
                    progress.reset(inner, description=f"{cell.row} {cell.keep:g}", total=self.count, visible=True)
                    record = self._measure(cell, record, unpruned_vision(), lambda: progress.advance(inner))
                    write_record(self.path(cell), record)
                records.append(record)
                progress.advance(overall)
        return records

    def _measure(
        self, cell: Cell, old: dict[str, Any], vision: UnprunedVision, advance: Callable[[], None]
    ) -> dict[str, Any]:
        begin = time.perf_counter()
        with self.bundles.borrow(cell.recipe, cell.keep) as bundle:
            manifest = read_manifest(bundle)
            proof = {
                "bundle": manifest.manifest_sha256, "asked": digest_questions(self.questions),
                "asking": digest_sources("tools/bench/answer.py"),
            }  # fmt: skip
            if old and all(old.get(name) == value for name, value in proof.items()):
                # Sources moved, what they compile to did not: the answers are still those.
                return {**old, "key": self.key(cell)}
            right = ask_all(
                bundle, self.questions, vision, by_oracle=cell.by_oracle, threads=self.threads, advance=advance
            )
        record = {"key": self.key(cell), **proof, "row": cell.row, "keep": cell.keep, **describe(manifest)}
        record |= {"seconds": round(time.perf_counter() - begin, 1), **summarize(self.questions, right)}
        return record


def load_questions(count: int) -> list[Asked]:
    """The first ``count`` held-out questions; every sixth is of the same kind."""
    from secateur.tools.demo.language import KINDS
    from secateur.tools.demo.scenes import held_out

    return [
        Asked(KINDS[index % len(KINDS)], image, text, answer, scene.rank_patches())
        for index, (image, text, answer, scene) in enumerate(held_out(count))
    ]


def digest_questions(questions: list[Asked]) -> str:
    return digest([[q.image.tobytes().hex(), q.text, q.answer, q.ranking.tolist()] for q in questions])


def describe(manifest: Manifest) -> dict[str, Any]:
    """What the table says about a bundle: [layers, visual tokens] per segment, and FLOPs."""
    text = manifest.geometry.text_tokens
    return {
        "segments": [[s.last_layer - s.first_layer, s.length - text] for s in manifest.segments],
        "flops": {name: program.flops for name, program in manifest.programs.items()},
        "unpruned_flops": {name: program.unpruned_flops for name, program in manifest.programs.items()},
    }


def summarize(questions: list[Asked], right: list[bool]) -> dict[str, Any]:
    """Accuracy in all and per kind; ``right`` keeps every answer as 0 or 1, for paired comparisons."""
    kinds: dict[str, list[bool]] = {}
    for asked, good in zip(questions, right, strict=True):
        kinds.setdefault(asked.kind, []).append(good)
    return {
        "questions": len(right),
        "accuracy": mean(right),
        "kinds": {kind: mean(values) for kind, values in kinds.items()},
        "right": "".join("1" if good else "0" for good in right),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench accuracy", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="Hugging Face directory (%(default)s)")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="how many are asked (%(default)s)")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="rows of the table; all if not given")
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS), metavar="R", help="keep ratios")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="ask again even where results are there")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where results are kept (%(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs/accuracy.md"), help="page to write (%(default)s)")
    options = parser.parse_args(arguments)
    from secateur.tools.cli import fail

    set_up_logging()
    logging.getLogger("secateur.compiler").setLevel(logging.WARNING)  # dozens of compilations; the bars say enough
    try:
        run(options)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(fail(error))


def run(options: argparse.Namespace) -> None:
    from secateur.tools.bench import accuracy_page

    whole = options.recipes is None and tuple(options.keeps) == KEEPS and options.questions == QUESTIONS
    cells = list_cells(choose_recipes(options.recipes), options.keeps)
    bench = Bench(Bundles(options.model, GEOMETRY, options.work), options.questions, options.threads, options.fresh)
    records = bench.run(cells)
    report = {"model": bench.model_digest, "questions": options.questions, "geometry": vars(GEOMETRY), "cells": records}
    write_record(options.work / "accuracy.json", report)
    results.print(accuracy_page.draw(records))
    notes.print(accuracy_page.judge_ceiling(records))
    if whole:
        options.docs.write_text(accuracy_page.write(report))
        notes.print(f"wrote {options.docs}")
    else:
        notes.print(f"{options.docs} is written only for all recipes, keep ratios and {QUESTIONS} questions")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=notes
    )  # fmt: skip


if __name__ == "__main__":
    main()
