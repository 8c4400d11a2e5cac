"""The command `secateur sweep`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.runtime.errors import UserError, refuse_idle
from secateur.tools.geometry import ImageSize, read_size

if TYPE_CHECKING:
    from secateur.tools.sweep.data import Questions

KEEPS = "0.5,0.25,0.1"

_log = logging.getLogger(__name__)


def sweep(
    model_dir: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors weights.")],
    data: Annotated[str, typer.Argument(help="A JSONL file (image, question, answer), or demo: the held-out set.")],
    recipes: Annotated[
        str, typer.Option(help="Names, FILE.yaml, FILE.py:NAME or stacks of them, joined by commas; or all.")
    ] = "all",
    keeps: Annotated[str | None, typer.Option(help="Ratios, joined by commas; 0.5,0.25,0.1 if not given.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What the ratios are of: keep (if not given), mean-keep or flops-keep, as in `secateur compile`."
        ),
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Ask the first N; all if not given.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 16,
    text_tokens: Annotated[
        int, typer.Option(help="Room for every token of the prompt that stands for no image, video or sound.")
    ] = 64,
    image_size: ImageSize = None,
    oracle: Annotated[
        bool, typer.Option(help="Demo set only: also ask with the best patches kept, which nothing can beat.")
    ] = False,
    repeat: Annotated[int, typer.Option(min=0, help="Timed runs per cell, each beside the unpruned model's.")] = 10,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for results; a second run goes on there.")] = Path(
        "sweep"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there already.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads per operator; all cores if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> dict[str, Any]:
    """Measure accuracy, agreement with the unpruned model, prefill time and FLOPs of recipes at several ratios.

    Every cell is compiled for ONNX Runtime, asked all questions, and timed in turn with the unpruned model. Interrupt
    it when you like: finished cells are kept, and hold as long as model, data, recipe and options are the same.
    Writes sweep.json, index.html (a page of its own) and frontier.png. A cell that fails is reported and left out,
    and the exit code is 1.

    \b
      secateur sweep MODEL_DIR questions.jsonl --recipes fastv,divprune --keeps 0.5,0.25
      secateur sweep demo/model demo --questions 200 --new-tokens 4 --text-tokens 24
    """
    if {text.strip() for text in recipes.split(",")} == {"none"} and not oracle:
        refuse_idle("recipe none keeps every token", keeps=keeps, budget=budget)
    report = run_sweep(
        model_dir, data, recipes=recipes.split(","), keeps=_read_ratios(keeps or KEEPS), budget=budget or "keep",
        questions=questions, new_tokens=new_tokens, text_tokens=text_tokens, image_size=read_size(image_size),
        oracle=oracle, repeat=repeat, out=out, fresh=fresh, threads=threads,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        from secateur.tools.console import results
        from secateur.tools.sweep.frontier import draw

        results.print(draw(report))
    if report["failures"]:
        _log.error("%d cells failed; the others are in %s", len(report["failures"]), out)
        raise typer.Exit(1)
    return report


def run_sweep(
    model_dir: Path,
    data: str,
    *,
    recipes: list[str],
    keeps: list[float],
    budget: str = "keep",
    questions: int | None = None,
    new_tokens: int = 16,
    text_tokens: int = 64,
    image_size: tuple[int, int] | None = None,
    oracle: bool = False,
    repeat: int = 10,
    out: Path = Path("sweep"),
    fresh: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """What the command does, but for printing: the report as plain data, which lies in ``out`` too."""
    from typing import get_args

    from secateur.compiler.pipeline import Geometry
    from secateur.runtime.backends.cores import bound_threads
    from secateur.tools.sweep import frontier, page
    from secateur.tools.sweep.bundles import Bundles
    from secateur.tools.sweep.cells import BudgetKind, Cell, choose_recipes, list_cells
    from secateur.tools.sweep.data import read_questions
    from secateur.tools.sweep.engine import Engine, add_agreement
    from secateur.tools.sweep.records import write_record

    threads = None if threads is None else bound_threads(threads)
    if budget not in get_args(BudgetKind):
        raise UserError(f"no budget {budget!r}", where="--budget", available=get_args(BudgetKind))
    chosen = choose_recipes([text.strip() for text in recipes])
    asked = read_questions(data, questions)
    if oracle and any(question.ranking is None for question in asked.asked):
        raise UserError("nobody knows the best patches of these questions", where="--oracle", fix="leave it out")
    geometry = Geometry(1, asked.images, text_tokens, new_tokens, image_size)
    bundles = Bundles(model_dir, geometry, out)
    cells: list[Cell] = list_cells(chosen, keeps, oracle=oracle, budget=budget)  # type: ignore[arg-type]  # checked above
    for cell in cells:
        cell.asked  # noqa: B018  a ratio out of range is refused now
    frontier.check_plot()
    engine = Engine(bundles, asked, threads, repeat, fresh)
    records = engine.run(cells)
    add_agreement(records)
    report = {
        "model": model_dir.resolve().name, "model_sha256": engine.model_digest, **describe_data(asked),
        "budget": budget, "geometry": vars(geometry), "threads": threads, "repeat": repeat,
        "failures": [{"cell": str(cell), "reason": reason} for cell, reason in engine.failures],
        "frontier": frontier.find_frontier(records), "cells": records,
    }  # fmt: skip
    write_record(out / "sweep.json", report)
    (out / "index.html").write_text(page.write(report), encoding="utf-8")
    drawn = frontier.plot(report, out / "frontier.png")
    _log.info("wrote %s", ", ".join(str(out / name) for name in ("sweep.json", "index.html", *drawn)))
    return report


def describe_data(asked: Questions) -> dict[str, Any]:
    """What the report says of the questions."""
    return {"data": asked.name, "data_sha256": asked.digest, "questions": len(asked.asked)}


def _read_ratios(text: str) -> list[float]:
    ratios = []
    for piece in text.split(","):
        try:
            ratios.append(float(piece))
        except ValueError:
            raise UserError(f"{piece.strip()!r} is no number", where="--keeps", fix="write --keeps 0.5,0.25") from None
        if not 0.0 < ratios[-1] <= 1.0:
            raise UserError(f"{ratios[-1]:g} is out of (0, 1]", where="--keeps")
    return sorted(set(ratios), reverse=True)
