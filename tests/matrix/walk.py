"""Walk over cells: what holds is read, the rest is run in processes of its own, and every result is written down."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import secateur
from secateur.passes.recipe_file import recipe_to_data
from secateur.passes.recipes import RECIPES
from secateur.runtime.manifest import hash_file
from secateur.tools.sweep.records import PROGRAM_SOURCES, digest, holds, read_record, write_record

from .cells import Cell
from .work import Workshop, try_cell

_shop: Workshop | None = None


@lru_cache
def digest_code() -> str:
    """Everything a result depends on but the table's rows: each cell has its own row's text in its key."""
    here = Path(__file__).parent
    root = Path(secateur.__file__).parent
    code = [path for part in PROGRAM_SOURCES for path in (root / part).rglob("*.py")]
    code = [path for path in code if root / "passes" / "recipes" not in path.parents]
    own = [here / "cells.py", here / "layouts.py", here / "work.py", *(here.parent / "unit").glob("tiny_*.py")]
    return digest(
        {
            "files": {"/".join(path.parts[-3:]): hash_file(path) for path in sorted([*code, *own])},
            "libraries": {name: version(name) for name in ("torch", "transformers", "onnxruntime", "onnx-ir")},
        }
    )


def key_of(cell: Cell) -> str:
    return digest({"code": digest_code(), "row": recipe_to_data(RECIPES[cell.recipe]), "cell": cell.as_json()})


def read_held(cells: Sequence[Cell], work: Path, fresh: bool = False) -> dict[Cell, dict[str, Any]]:
    """Cells whose record still holds and passed."""
    if fresh:
        return {}
    records = {cell: read_record(record_path(cell, work)) for cell in cells}
    return {c: r for c, r in records.items() if holds(r, key_of(c)) and r["outcome"]["passed"]}


def record_path(cell: Cell, work: Path) -> Path:
    return work / "cells" / f"{cell}.json"


def walk(cells: Sequence[Cell], work: Path, jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run cells in ``jobs`` processes and yield them as they come, each written down."""
    # Spawned: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _open, (work,))
    try:
        for future in as_completed([pool.submit(_run, cell) for cell in cells]):
            cell, outcome = future.result()
            record = {"key": key_of(cell), "name": str(cell), "cell": cell.as_json(), "outcome": outcome}
            write_record(record_path(cell, work), record)
            yield cell, record
    finally:
        pool.shutdown(cancel_futures=True)
        for folder in (f for kind in ("models-*", "bundle-*", "engine-*") for f in work.glob(kind)):
            shutil.rmtree(folder, ignore_errors=True)


def _open(work: Path) -> None:
    global _shop
    logging.getLogger("secateur").setLevel(logging.ERROR)  # this process's own; the records say what went wrong
    _shop = Workshop(work)


def _run(cell: Cell) -> tuple[Cell, dict[str, Any]]:
    assert _shop is not None, "the process was opened"
    return cell, try_cell(cell, _shop)
