"""Walk over cells: what holds is read, the rest is run in processes of its own, and every result is written down."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
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
LIBRARIES = ("torch", "transformers", "onnxruntime", "onnx-ir", "tensorrt-rtx-cu13")


@lru_cache
def digest_code() -> str:
    """Everything a result depends on but the table's rows: each cell has its own row's text in its key."""
    here = Path(__file__).parent
    root = Path(secateur.__file__).parent
    code = [path for part in PROGRAM_SOURCES for path in (root / part).rglob("*.py")]
    code = [path for path in code if root / "passes" / "recipes" not in path.parents]
    own = [here / f"{name}.py" for name in ("applies", "cells", "engines", "fused", "layouts", "work")]
    own += [here.parent / "unit" / "rows.py", *(here.parent / "unit").glob("tiny_*.py")]
    return digest(
        {
            "files": {"/".join(path.parts[-3:]): hash_file(path) for path in sorted([*code, *own])},
            "libraries": {name: _version(name) for name in LIBRARIES},
        }
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def key_of(cell: Cell) -> str:
    return digest({"code": digest_code(), "row": recipe_to_data(RECIPES[cell.recipe]), "cell": cell.as_json()})


def read_held(cells: Sequence[Cell], work: Path) -> dict[Cell, dict[str, Any]]:
    """Cells whose record still holds, passed or not."""
    records = {cell: read_record(record_path(cell, work)) for cell in cells}
    return {c: r for c, r in records.items() if holds(r, key_of(c))}


def record_path(cell: Cell, work: Path) -> Path:
    return work / "cells" / f"{cell}.json"


class Hands:
    """Deals cells out to processes so that each stays with one layout: what it traced for a cell serves the next.

    A process that is done takes the layout with most cells left, or, when all are taken, half of what another one has
    left, if that is more than the traces it costs.
    """

    WORTH_SHARING = 12

    def __init__(self, cells: Sequence[Cell], jobs: int) -> None:
        layouts: dict[str, list[Cell]] = {}
        for cell in cells:
            layouts.setdefault(cell.layout, []).append(cell)
        # Cells of one trace stand together.
        self.free = [sorted(found, key=_trace_of) for found in sorted(layouts.values(), key=len)]
        self.held: list[list[Cell]] = [[] for _ in range(jobs)]

    def next(self, process: int) -> Cell | None:
        """The cell that ``process`` shall run now; None where there is none left for it."""
        if not self.held[process]:
            self.held[process] = self.free.pop() if self.free else self._share()
        return self.held[process].pop(0) if self.held[process] else None

    def _share(self) -> list[Cell]:
        longest = max(self.held, key=len)
        if len(longest) < self.WORTH_SHARING:
            return []
        middle = len(longest) // 2
        taken, longest[middle:] = longest[middle:], []
        return taken


def _trace_of(cell: Cell) -> tuple[str, int, int]:
    return cell.dtype, cell.batch, cell.images


def walk(cells: Sequence[Cell], work: Path, jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run cells in ``jobs`` processes and yield them as they come, each written down."""
    # Spawned: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    processes = [ProcessPoolExecutor(1, context, _open, (work,)) for _ in range(jobs)]
    try:
        for cell, outcome in _run_all(Hands(cells, jobs), [process.submit for process in processes]):
            record = {"key": key_of(cell), "name": str(cell), "cell": cell.as_json(), "outcome": outcome}
            write_record(record_path(cell, work), record)
            yield cell, record
    finally:
        for process in processes:
            process.shutdown(cancel_futures=True)
        for folder in (f for kind in ("models-*", "bundle-*", "engine-*") for f in work.glob(kind)):
            shutil.rmtree(folder, ignore_errors=True)


def _run_all(hands: Hands, submit: Sequence[Callable[..., Future[Any]]]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    running: dict[Future[Any], int] = {}

    def give(process: int) -> None:
        if (cell := hands.next(process)) is not None:
            running[submit[process](_run, cell)] = process

    for process in range(len(submit)):
        give(process)
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            give(running.pop(future))
            yield future.result()


def _open(work: Path) -> None:
    global _shop
    logging.getLogger("secateur").setLevel(logging.ERROR)  # this process's own; the records say what went wrong
    _shop = Workshop(work)


def _run(cell: Cell) -> tuple[Cell, dict[str, Any]]:
    assert _shop is not None, "the process was opened"
    return cell, try_cell(cell, _shop)
