"""Run one cell. Models, traces and reference models are made once per process and kept."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tests.unit.rows import ready

from secateur.compiler.inputs import RowInput, random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import KINDS, TOLERANCE, Parity, compare_runs, expected_kinds
from secateur.compiler.pipeline import plan_job, trace_model
from secateur.compiler.recipe import Recipe
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, OracleRun
from secateur.passes.recipes import RECIPES
from secateur.runtime.session import Session
from secateur.tools.sweep.bundles import Bundles

from .cells import KEEPS, Cell
from .engines import NoLibraryError, build
from .layouts import LAYOUTS, shard

FORCED, QUESTIONS = 2, 6


@dataclass
class Workshop:
    """Where cells are made. ``work`` holds models, bundles while they are compared, and notes on built graphs.

    What is kept in memory is that of one layout: cells come layout by layout.
    """

    work: Path
    layout: str = ""
    bundles_made: dict[tuple[int, int], Bundles] = field(default_factory=dict)
    references: dict[str, Any] = field(default_factory=dict)
    half: dict[tuple[int, int, str], Any] = field(default_factory=dict)
    unpruned: dict[tuple[int, int, str], Any] = field(default_factory=dict)
    """Layers of the unpruned engines' programs."""

    def enter(self, layout: str) -> None:
        """Forget what was made for another layout."""
        if layout != self.layout:
            for made in (self.bundles_made, self.references, self.half, self.unpruned):
                made.clear()  # type: ignore[attr-defined]
            self.layout = layout

    @cached_property
    def models(self) -> Path:
        """Seeded, so that every process writes the same; one of its own each, so that none reads half a model."""
        self.work.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="models-", dir=self.work))

    def model(self, layout: str) -> Path:
        path = self.models / layout
        if not path.is_dir():
            from transformers.utils import logging as hf_logging

            hf_logging.disable_progress_bar()
            LAYOUTS[layout].write(path)
            shard(path)
        return path

    def bundles(self, layout: str, batch: int, images: int) -> Bundles:
        self.enter(layout)
        key = batch, images
        if key not in self.bundles_made:
            self.bundles_made[key] = Bundles(self.model(layout), LAYOUTS[layout].geometry(batch, images), self.work)
        return self.bundles_made[key]

    def recipe(self, cell: Cell) -> Recipe:
        """The cell's row; one with learned weights gets seeded random ones, as wide as the decoder's tokens."""
        source = self.bundles(cell.layout, cell.batch, cell.images).source
        return ready(cell.recipe, width=source.text.hidden_size)

    def oracle(self, cell: Cell, recipe: Recipe, keep: float | None) -> Oracle:
        made = self.bundles(cell.layout, cell.batch, cell.images)
        if cell.layout not in self.references:
            self.references[cell.layout] = load_recording_model(made.source)
        return Oracle(plan_job(made.source, made.geometry, recipe, keep), self.references[cell.layout])

    def traced(self, cell: Cell) -> Any:
        """In half precision, for engines."""
        key = cell.batch, cell.images, cell.dtype
        made = self.bundles(cell.layout, cell.batch, cell.images)
        if key not in self.half:
            self.half[key] = trace_model(made.source, made.geometry, cell.dtype)
        return self.half[key]


def run_cell(cell: Cell, shop: Workshop) -> dict[str, Any]:
    """What came out, as JSON; ``passed`` is None where nothing could be said."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = shop.recipe(cell)
        if cell.kind == "parity":
            return compare(cell, recipe, shop)
        return identify(cell, recipe, shop) if cell.kind == "identity" else build(cell, recipe, shop)


def try_cell(cell: Cell, shop: Workshop) -> dict[str, Any]:
    """As :func:`run_cell`; what goes wrong is part of the record."""
    try:
        return run_cell(cell, shop)
    except NoLibraryError as error:
        return {"passed": None, "error": str(error)}
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return {"passed": False, "error": f"{type(error).__name__}: {line}"}


def compare(cell: Cell, recipe: Recipe, shop: Workshop) -> dict[str, Any]:
    """The bundle on ONNX Runtime against the eager oracle, rows of different length side by side."""
    made = shop.bundles(cell.layout, cell.batch, cell.images)
    oracle = shop.oracle(cell, recipe, cell.keep)
    parity = Parity(expects=expected_kinds(recipe))
    keep = 1.0 if cell.keep is None else cell.keep
    # Both roads of a checkpoint's weights: the smaller ratio's graphs point into its files.
    weights = "reference" if cell.keep == min(KEEPS) else "stream"
    with made.borrow(recipe, keep, expose=True, weights=weights) as path, Session(path, threads=1) as session:
        ours = CompiledRun(session.manifest, session.request())
        compare_runs(OracleRun(oracle), ours, questions(session), cell.batch, parity, referee=oracle)
    found = parity.as_json()
    within = all(found[kind] <= TOLERANCE for kind in KINDS)
    kept = ("rows", "chose_equally", "tied", "chose_differently", "scales", "mismatches", "incomparable", *KINDS)
    return {name: found[name] for name in kept} | {
        "passed": parity.complete and not parity.chose_differently and within
    }


def identify(cell: Cell, recipe: Recipe, shop: Workshop) -> dict[str, Any]:
    """At keep 1.0 against the unpruned Hugging Face model: logits after the prompt and after forced tokens."""
    made = shop.bundles(cell.layout, cell.batch, cell.images)
    reference = OracleRun(shop.oracle(cell, RECIPES["none"], None))
    worst, same, steps = 0.0, 0, 0
    with made.borrow(recipe, 1.0) as path, Session(path, threads=1) as session:
        ours = CompiledRun(session.manifest, session.request())
        for item in questions(session)[: QUESTIONS // 2]:
            (own,), (theirs,) = ours.run([item]), reference.run([item])
            for one, other in zip(own.logits, theirs.logits, strict=True):
                assert one.shape == other.shape
                difference = float((one - other).abs().max())
                worst = max(worst, difference if difference == difference else float("inf"))
                same += int(one.argmax() == other.argmax())
                steps += 1
    return {"logits": worst, "same_tokens": same, "steps": steps, "passed": worst <= TOLERANCE and same == steps > 0}


def questions(session: Session) -> list[RowInput]:
    return random_rows(session.manifest, QUESTIONS, FORCED, seed=0)
