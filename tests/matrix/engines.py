"""Engine cells: every program of a row as a TensorRT-RTX engine, and as the fused layers the model has."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import secateur
from secateur.compiler.pipeline import export, prune
from secateur.compiler.recipe import Recipe
from secateur.exporters.checkpoint import Checkpoint
from secateur.exporters.lint import lint_graph
from secateur.exporters.onnx import Exported, save_model
from secateur.exporters.tensorrt import DEFAULT_SM, build_engine, parsed_layers
from secateur.exporters.tensorrt_library import load_library
from secateur.exporters.weights import WEIGHTS_FILE, write_weights
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError
from secateur.runtime.leftovers import held_directory
from secateur.tools.sweep.records import digest

from .cells import Cell
from .fused import Counts, count_fused, differences, expect_fused, summarize

if TYPE_CHECKING:
    from .work import Workshop

FLAVOUR = "tensorrt-rtx"
SMALL = 1 << 10
"""Bytes below which a weight stays in an engine: the real limit is above all that these tiny models have, so that none
of their matrices would become an input, as all of a real model's do."""


class NoLibraryError(Exception):
    """TensorRT-RTX is not installed: its cells say nothing."""


def build(cell: Cell, recipe: Recipe, shop: Workshop) -> dict[str, Any]:
    """Build, lint and count every program. A graph that was built before, for any row, is not built again.

    ``passed``: all engines are there, nothing warned, the linter has no finding, and every layer of the model became
    the same fused layers as without a recipe: those that the model's modules ask for.
    """
    try:
        version = load_library(FLAVOUR).version
    except UserError as error:
        raise NoLibraryError(f"not built: {error}") from None
    traced = shop.traced(cell)
    expected, unpruned = expect_fused(traced.source, traced.model), _without_recipe(cell, shop)
    exported = export(prune(traced, recipe, cell.keep), "tensorrt")
    programs: dict[str, dict[str, Any]] = {}
    with held_directory(shop.work, "engine-") as folder:
        for name, path in _save(exported, traced, Path(folder)).items():
            made = _build_once(path, shop.work / "engines", f"{version} {cell.layout} {cell.dtype}")
            lint = [str(found) for found in lint_graph(exported.models[name], FLAVOUR, cell.dtype, DEFAULT_SM)]
            unlike = list(differences(made["fused"], expected[name], unpruned[name]))
            programs[name] = {**made, "fused": summarize(made["fused"]), "lint": lint, "unlike": unlike}
    passed = all(p["bytes"] and not (p["warnings"] or p["lint"] or p["unlike"]) for p in programs.values())
    return {"library": f"{FLAVOUR} {version}", "programs": programs, "passed": passed}


def _without_recipe(cell: Cell, shop: Workshop) -> dict[str, Counts]:
    """Fused layers of the unpruned model's programs, parsed once for each trace."""
    key = cell.batch, cell.images, cell.dtype
    if key not in shop.unpruned:
        traced = shop.traced(cell)
        exported = export(prune(traced, RECIPES["none"], None), "tensorrt")
        with held_directory(shop.work, "engine-") as folder:
            paths = _save(exported, traced, Path(folder))
            shop.unpruned[key] = {name: count_fused(parsed_layers(path)) for name, path in paths.items()}
    return shop.unpruned[key]


def _save(exported: Exported, traced: Any, folder: Path) -> dict[str, Path]:
    write_weights(exported.layout, Checkpoint(traced.source.path, traced.model), folder / WEIGHTS_FILE)
    paths = {name: folder / f"{name}.onnx" for name in exported.models}
    for name, path in paths.items():
        save_model(exported.models[name], path)
    return paths


def _build_once(graph: Path, notes: Path, kind: str) -> dict[str, Any]:
    """Size, warnings and fused layers of a graph's engine, from the note on an equal graph where there is one."""
    key = hashlib.sha256(f"{kind} {_digest_builder()} ".encode() + graph.read_bytes()).hexdigest()
    note = notes / f"{key}.json"
    with suppress(OSError, ValueError):
        held: dict[str, Any] = json.loads(note.read_text())
        return held
    layers = parsed_layers(graph, flavour=FLAVOUR)
    with patch("secateur.exporters.engine_weights.SMALL", SMALL):
        info = build_engine(graph, graph.with_suffix(".engine"), flavour=FLAVOUR)
    graph.with_suffix(".engine").unlink()
    found = {
        "bytes": info.bytes, "warnings": list(info.warnings), "fused": count_fused(layers), "outside": len(info.weights)
    }  # fmt: skip
    notes.mkdir(parents=True, exist_ok=True)
    partial = note.with_name(f"{key}.{os.getpid()}.partial")
    partial.write_text(json.dumps(found))
    partial.replace(note)
    return found


@lru_cache
def _digest_builder() -> str:
    """What an engine depends on beside its graph, and how its layers are counted."""
    files = [*Path(secateur.__file__).parent.glob("exporters/tensorrt*.py"), Path(__file__).with_name("fused.py")]
    return digest({path.name: path.read_text() for path in files})
