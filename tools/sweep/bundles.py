"""Many bundles of one model: it is traced once, every recipe is compiled from that trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from secateur.compiler.pipeline import (
    Geometry,
    Recipe,
    build,
    check_target,
    export,
    plan_for,
    prune,
    read_source,
    trace_model,
)
from secateur.runtime.leftovers import held_directory
from secateur.tools.console import quiet_compiler

TARGET = "onnxruntime"


@dataclass(frozen=True)
class Bundles:
    """Compiles recipes of ``model`` for one geometry into folders below ``work``."""

    model: Path
    geometry: Geometry
    work: Path

    @cached_property
    def source(self) -> Any:
        return read_source(self.model)

    @cached_property
    def traced(self) -> Any:
        with quiet_compiler():
            return trace_model(self.source, self.geometry, "fp32")

    def plan(self, recipe: Recipe, keep: float) -> Any:
        """Layers and token counts, without tracing."""
        return plan_for(self.source, self.geometry, recipe, _keep(recipe, keep))

    def compile(self, recipe: Recipe, keep: float, out: Path, expose: bool = False, weights: str = "stream") -> Path:
        with quiet_compiler():
            pruned = prune(self.traced, recipe, _keep(recipe, keep), expose=expose)
            return build(pruned, export(pruned, TARGET, weights), check_target(TARGET, "fp32", None), out, force=True)

    @contextmanager
    def borrow(self, recipe: Recipe, keep: float, expose: bool = False, weights: str = "stream") -> Iterator[Path]:
        """A bundle that is deleted afterwards; ``expose`` adds the hidden rows at sites to its outputs. ``weights`` as
        for :func:`~secateur.compiler.pipeline.compile`."""
        self.work.mkdir(parents=True, exist_ok=True)
        with held_directory(self.work, "bundle-") as folder:
            yield self.compile(recipe, keep, Path(folder) / "bundle", expose, weights)


def _keep(recipe: Recipe, keep: float) -> float | None:
    return keep if recipe.stages else None
