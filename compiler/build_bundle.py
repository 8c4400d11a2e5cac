"""Pruned programs become a bundle: weights laid out and placed, graphs saved, engines built, the manifest last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from secateur.compiler import ops
from secateur.compiler.bundle import (
    Part,
    Target,
    copy_processor_files,
    graph_file,
    make_manifest,
)
from secateur.compiler.forecast import Needs, forecast
from secateur.compiler.meta_model import DTYPES
from secateur.compiler.output import whole_directory
from secateur.compiler.passlist import count_unpruned
from secateur.compiler.program import ProgramSet
from secateur.compiler.pruned import Pruned
from secateur.compiler.self_test import add_self_test
from secateur.compiler.trace import Traced
from secateur.exporters.checkpoint import Checkpoint, open_checkpoint
from secateur.exporters.digests import Digests
from secateur.exporters.engine_options import EngineOptions
from secateur.exporters.engine_weights import list_shared
from secateur.exporters.lint import lint_graph, refuse
from secateur.exporters.onnx import Exported, export_programs, save_model
from secateur.exporters.shards import place_shards, refer_weights
from secateur.exporters.tensor_names import tied_names
from secateur.exporters.tensorrt import EngineInfo, build_engine
from secateur.exporters.weights import MODES, WEIGHTS_FILE, WeightLayout, plan_weights, write_weights
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import hash_file, write_manifest

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) when a phase begins and during long ones; total 0 when nobody knows it yet."""


def export(pruned: Pruned, dialect: str, weights: str = "stream", plugins: bool = False) -> Exported:
    """Lower pruned programs to ONNX models. Weights are laid out, not read: ``weights`` as for :func:`compile`.
    ``plugins`` as for :func:`export_programs`: score kernels as nodes, for the library tensorrt alone."""
    return export_programs(pruned.programs.programs, dialect, lay_out([pruned], weights), plugins)


_log = logging.getLogger(__name__)


def lay_out(geometries: Sequence[Pruned], weights: str) -> WeightLayout:
    """Places for the weights of all geometries of a model: one file, or the same references, for all of them."""
    check_weights_mode(weights)
    used: dict[str, Tensor] = {}
    for pruned in geometries:
        for program in pruned.programs.programs.values():
            used |= {k: v for k, v in program.weights().items() if k not in used}
    traced = geometries[0].traced
    if weights == "stream":
        return plan_weights(used, traced.model, DTYPES[traced.dtype])
    checkpoint = open_checkpoint(geometries[0].job.source.path, traced.model)
    turnable = list_turnable(*(pruned.programs for pruned in geometries))
    return refer_weights(used, checkpoint, DTYPES[traced.dtype], weights, turnable)


def build(
    pruned: Pruned | Sequence[Pruned],
    exported: Exported | Sequence[Exported],
    target: Target,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    digests: Digests | None = None,
    needs: Needs | None = None,
    self_test: str = "none",
) -> Path:
    """Write the bundle: graphs, weights, processor files, engines for TensorRT targets, and last the manifest.

    Several geometries come as sequences of the same length, their weights laid out together (:func:`lay_out`).
    ``digests`` may have begun to read the checkpoint's files. ``needs`` is :func:`foresee`'s, where it was asked.
    ``self_test`` as for :func:`~secateur.compiler.self_test.add_self_test`.
    """
    pruned = [pruned] if isinstance(pruned, Pruned) else pruned
    exported = [exported] if isinstance(exported, Exported) else exported
    tell = progress or (lambda what, done, total: None)
    needs = needs or foresee(pruned, exported, target)
    with whole_directory(out, force) as work:
        for one in pruned:
            copy_processor_files(one.job, work)
        graphs = _save_graphs(exported, target, work)
        # Counted while a large checkpoint is still being read.
        counts = [count_unpruned(one.traced) for one in pruned]
        with phase("weights", progress):
            checkpoint = open_checkpoint(pruned[0].job.source.path, pruned[0].traced.model)
            weights = _place_weights(exported[0], checkpoint, work, tell, digests)
        files = list(dict.fromkeys(file for files in graphs for file in files.values()))
        engines = _build_engines(files, target, work, tell)
        parts = [Part(*one) for one in zip(pruned, graphs, counts, needs.geometries, strict=True)]
        outside = {graph: engine.weights for graph, engine in engines.items()}
        if target.name == "onnxruntime-cuda":
            outside = _list_given(exported, graphs)
        manifest = make_manifest(parts, exported[0], target, work, weights, engines, outside)
        if self_test != "none":
            with phase("self-test", progress):
                manifest = add_self_test(work, manifest, self_test)
        write_manifest(work, manifest)
    return out


def foresee(pruned: Sequence[Pruned], exported: Sequence[Exported], target: Target) -> Needs:
    """What the bundle is expected to take; see :func:`~secateur.compiler.forecast.forecast`."""
    weights = (target.engines or EngineOptions()).weights if target.dialect == "tensorrt" else None
    return forecast(pruned, exported, target.name, weights)


def check_weights(*geometries: Traced, weights: str = "stream") -> list[Path]:
    """Refuse a checkpoint that lacks a tensor of the traced programs, has it in another shape, or cannot be used as it
    is where ``weights`` says so; warn of tensors the model does not have. Reads headers only. Returns the checkpoint's
    files that become the bundle's."""
    traced = geometries[0]
    aliases, checkpoint = tied_names(traced.model), open_checkpoint(traced.source.path, traced.model)
    used: dict[str, Tensor] = {}
    for program in (program for one in geometries for program in one.programs.programs.values()):
        used |= {aliases.get(name, name): tensor for name, tensor in program.weights().items()}
    checkpoint.require({name: tuple(tensor.shape) for name, tensor in used.items()})
    shards: list[Path] = []
    if weights != "stream":
        turnable = list_turnable(*(one.programs for one in geometries))
        shards = list(refer_weights(used, checkpoint, DTYPES[traced.dtype], weights, turnable).shards.values())
    if extra := checkpoint.unexpected():
        _log.warning(
            "%s: %d tensors are no part of the model and are left out, such as %s",
            traced.source.path, len(extra), ", ".join(extra[:3]),
        )  # fmt: skip
    return shards


def list_turnable(*sets: ProgramSet) -> set[str]:
    """Weights that every program reads as experts only: graphs take those as they lie or turned."""
    programs = [program for one in sets for program in one.programs.values()]
    nodes = [n for p in programs for n in p.graph.nodes if n.op == "get_attr" and "weight" in n.meta]
    other = {n.meta["weight"] for n in nodes if any(user.target is not ops.experts for user in n.users)}
    return {n.meta["weight"] for n in nodes} - other


def check_weights_mode(weights: str) -> None:
    if weights not in MODES:
        raise UserError(f"no way {weights!r} of placing weights", where="--weights", available=MODES)


def _place_weights(
    exported: Exported, checkpoint: Checkpoint, work: Path, tell: Progress, digests: Digests | None
) -> dict[str, str]:
    """Put the weights into the bundle; returns the SHA-256 of each file by its path there."""
    layout = exported.layout

    def written(done: int, total: int) -> None:
        tell("weights", done, total)

    placed = place_shards(layout, work, written, digests) if layout.shards else {}
    if layout.header:
        placed[WEIGHTS_FILE] = write_weights(layout, checkpoint, work / WEIGHTS_FILE, written)
    return placed


def _save_graphs(exported: Sequence[Exported], target: Target, work: Path) -> list[dict[str, str]]:
    """Write the graphs; the file of every program, per geometry. Equal graphs are one file."""
    found: list[dict[str, str]] = []
    written: dict[str, str] = {}
    for number, one in enumerate(exported):
        found.append({})
        for name, graph in one.models.items():
            file = graph_file(name, number)
            refuse(lint_graph(graph, target.name, target.dtype, target.sm), where=file)
            save_model(graph, work / file)
            found[-1][name] = written.setdefault(hash_file(work / file), file)
            if found[-1][name] != file:
                (work / file).unlink()
    return found


def _list_given(exported: Sequence[Exported], graphs: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The large weights of every graph file. Its session on a GPU is given them, so that all have one copy there."""
    return {
        files[name]: tuple(list_shared(model.graph))
        for one, files in zip(exported, graphs, strict=True)
        for name, model in one.models.items()
    }


def _build_engines(graphs: Sequence[str], target: Target, work: Path, tell: Progress) -> dict[str, EngineInfo]:
    """The engine of every graph file."""
    if target.dialect != "tensorrt":
        return {}
    made = {}
    for graph in graphs:
        name = graph.removesuffix(".onnx")
        told, sms = partial(_tell_of, tell, f"engine {name}"), target.sms if target.name == "tensorrt-rtx" else None
        with phase(f"engine {name}", tell):
            made[graph] = build_engine(
                work / graph,
                work / f"{name}.engine",
                flavour=target.name,
                sm=sms,
                options=target.engines,
                progress=told,
            )
    return made


def _tell_of(tell: Progress, name: str, what: str, done: int, total: int) -> None:
    tell(f"{name}: {what}", done, total)


@contextmanager
def phase(name: str, tell: Progress | None = None) -> Iterator[None]:
    """Tell that a phase begins, and log how long it took once it is over."""
    start = time.perf_counter()
    if tell is not None:
        tell(name, 0, 0)
    yield
    _log.info("%-16s %6.1f s", name, time.perf_counter() - start)
