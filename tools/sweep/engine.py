"""Walk the cells: compile, ask, time, write a record; skip what an earlier run has measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.compiler.pipeline import RECIPES, choose_keep, digest_recipe
from secateur.runtime.errors import SecateurError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.schema import Manifest
from secateur.runtime.session import Session
from secateur.tools.console import notes
from secateur.tools.failures import describe_failure
from secateur.tools.measure import Workload, time_bundles
from secateur.tools.sweep.answers import Unpruned, answer_all
from secateur.tools.sweep.bundles import Bundles
from secateur.tools.sweep.cells import Cell
from secateur.tools.sweep.data import Questions, is_right
from secateur.tools.sweep.records import (
    PROGRAM_SOURCES,
    cell_key,
    digest_model,
    digest_sources,
    holds,
    mean,
    read_record,
    write_record,
)

# How questions are asked and answers judged; a change here makes old answers worthless.
ASKING_SOURCES = ("tools/sweep/answers.py", "tools/sweep/data.py")
TIMED = ("vision", "prefill")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """One walk. ``repeat`` is how often prefill is timed, each time beside the unpruned model's; 0: not at all.

    ``failures`` collects (cell, reason) of those that could not be measured.
    """

    bundles: Bundles
    questions: Questions
    threads: int | None
    repeat: int
    fresh: bool = False
    failures: list[tuple[Cell, str]] = field(default_factory=list)

    @cached_property
    def model_digest(self) -> str:
        return digest_model(self.bundles.model)

    @cached_property
    def sources(self) -> str:
        return digest_sources(*PROGRAM_SOURCES, *ASKING_SOURCES)

    def path(self, cell: Cell) -> Path:
        return self.bundles.work / "cells" / cell.file_name

    def keep(self, cell: Cell) -> float:
        """The keep ratio a cell is compiled at."""
        keep = choose_keep(self.bundles.source, self.bundles.geometry, cell.recipe, cell.asked)
        return 1.0 if keep is None else keep

    def key(self, cell: Cell) -> str:
        return cell_key(
            model=self.model_digest, plan=str(self.bundles.plan(cell.recipe, self.keep(cell))),
            positions=cell.recipe.positions, recipe=digest_recipe(cell.recipe), questions=self.questions.digest,
            geometry=vars(self.bundles.geometry), sources=self.sources, by_oracle=cell.by_oracle,
            timing=[self.repeat, self.threads] if self.repeat else None,
        )  # fmt: skip

    def run(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """A record per cell, from disk where it holds. A cell that fails is noted in ``failures`` and left out.

        The first cell is the unpruned model: when it fails, so does the walk.
        """
        assert not cells[0].recipe.stages, "the unpruned model comes first"
        found: dict[int, dict[str, Any]] = {}
        waiting: list[tuple[int, Cell, str, dict[str, Any]]] = []
        for index, cell in enumerate(cells):
            try:
                key, record = self.key(cell), {} if self.fresh else read_record(self.path(cell))
            except SecateurError as error:
                self._fail(cell, error)
                continue
            if holds(record, key):
                found[index] = record
            else:
                waiting.append((index, cell, key, record))
        if waiting:
            if found:
                _log.info("%d of %d cells are measured already", len(found), len(cells))
            found |= self._measure_all(waiting)
        return [found[index] for index in sorted(found)]

    def _measure_all(self, waiting: list[tuple[int, Cell, str, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
        count = len(self.questions.asked)
        found: dict[int, dict[str, Any]] = {}
        with ExitStack() as stack:
            progress = stack.enter_context(_progress())
            task = progress.add_task("unpruned", total=count * len(waiting))
            bundle = stack.enter_context(self.bundles.borrow(RECIPES["none"], 1.0))
            unpruned = stack.enter_context(Unpruned(bundle, self.questions.asked, self.threads))
            unpruned.check_prompts()
            for done, (index, cell, key, old) in enumerate(waiting):
                progress.update(task, description=str(cell), completed=done * count)
                begin = time.perf_counter()
                try:
                    if cell.recipe.stages:
                        with self.bundles.borrow(cell.recipe, self.keep(cell)) as pruned:
                            record = self._measure(cell, key, old, pruned, unpruned, lambda: progress.advance(task))
                    else:
                        record = self._measure(cell, key, old, bundle, unpruned, lambda: progress.advance(task))
                except Exception as error:
                    if not cell.recipe.stages:
                        raise
                    self._fail(cell, error)
                    continue
                record["seconds"] = round(time.perf_counter() - begin, 1)
                write_record(self.path(cell), record)
                found[index] = record
                _log.info("%s: accuracy %.1f %%, %.0f s", cell, 100 * record["accuracy"], record["seconds"])
        return found

    def _measure(
        self, cell: Cell, key: str, old: dict[str, Any], bundle: Path, unpruned: Unpruned, advance: Callable[[], None]
    ) -> dict[str, Any]:
        manifest = read_manifest(bundle)
        proof = {
            "bundle": manifest.manifest_sha256, "asked": self.questions.digest,
            "asking": digest_sources(*ASKING_SOURCES), "timing": [self.repeat, self.threads] if self.repeat else None,
        }  # fmt: skip
        if old and all(old.get(name) == value for name, value in proof.items()):
            # Sources moved, what they compile to did not: the answers are still those.
            return {**old, "key": key}
        with Session(bundle, threads=self.threads) as session:
            times = {} if cell.by_oracle or not self.repeat else self._time(session, unpruned.session)
            answers = answer_all(
                session, self.questions.asked, unpruned, by_oracle=cell.by_oracle, advance=advance
            )  # fmt: skip
        return {
            "key": key, **proof, "row": cell.row, "ratio": cell.ratio, "budget": cell.budget, "keep": self.keep(cell),
            "title": cell.recipe.title, "link": cell.recipe.link, "times": times, **describe(manifest),
            **judge(self.questions, answers),
        }  # fmt: skip

    def _time(self, session: Session, unpruned: Session) -> dict[str, Any]:
        """Median seconds of vision and prefill, and how many times less than the unpruned model's, run in turn."""
        question = self.questions.asked[0]
        workload = Workload([question.text], [list(question.images)], new_tokens=1)
        samples = time_bundles([unpruned, session], [workload, workload], repeat=self.repeat, warmup=2)
        whole, own = ({name: s.summary()[name]["p50"] for name in TIMED} for s in samples)
        ratios = {name: whole[name] / own[name] for name in TIMED}
        return {"seconds": own, "unpruned": whole, "ratio": ratios | {"both": sum(whole.values()) / sum(own.values())}}

    def _fail(self, cell: Cell, error: Exception) -> None:
        line, _ = describe_failure(error)
        self.failures.append((cell, line))
        _log.error("%s: %s", cell, line)
        _log.debug("traceback", exc_info=error)


def describe(manifest: Manifest) -> dict[str, Any]:
    """What the tables say about a bundle: [layers, visual tokens] per segment, and FLOPs."""
    fixed = manifest.geometry.fixed_tokens
    return {
        "segments": [[s.last_layer - s.first_layer, s.length - fixed] for s in manifest.segments],
        "flops": {name: program.flops for name, program in manifest.programs.items()},
        "unpruned_flops": {name: program.unpruned_flops for name, program in manifest.programs.items()},
    }


def judge(questions: Questions, answers: list[str]) -> dict[str, Any]:
    """Accuracy in all and per kind; ``right`` keeps every answer as 0 or 1, for paired comparisons."""
    kinds: dict[str, list[bool]] = {}
    right = [is_right(answer, question.answer) for question, answer in zip(questions.asked, answers, strict=True)]
    for question, good in zip(questions.asked, right, strict=True):
        if question.kind:
            kinds.setdefault(question.kind, []).append(good)
    return {
        "questions": len(right),
        "accuracy": mean(right),
        "kinds": {kind: mean(values) for kind, values in kinds.items()},
        "right": "".join("1" if good else "0" for good in right),
        "answers": answers,
    }


def add_agreement(records: list[dict[str, Any]]) -> None:
    """Give every record the share of questions it answers with the unpruned model's very text."""
    whole = next((record["answers"] for record in records if record["row"] == "none"), None)
    for record in records:
        same = [a == b for a, b in zip(record["answers"], whole or [], strict=bool(whole))]
        record["agreement"] = mean(same) if whole else None


def _progress() -> Progress:
    quiet = not logging.getLogger("secateur").isEnabledFor(logging.INFO)
    return Progress(
        TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TextColumn("questions"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=notes, transient=True,
        disable=quiet or not notes.is_terminal,
    )  # fmt: skip
