"""Lints files: any ONNX graph, or all graphs of a bundle. Loads neither torch nor a backend."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from secateur.exporters.lint import Finding, lint_graph
from secateur.exporters.lint_rules import EVERY, GRAPH_RULES, NODE_RULES
from secateur.runtime.errors import UserError, refuse_idle
from secateur.runtime.manifest import read_manifest

__all__ = ["LintedGraph", "Row", "lint_path", "list_rules"]

DTYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


@dataclass(frozen=True)
class LintedGraph:
    """A graph's file, what it was held against, and what was found."""

    path: Path
    target: str
    dtype: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Row:
    """A rule as people read it."""

    rule: str
    targets: tuple[str, ...]
    effect: str
    about: str


def list_rules(target: str | None = None) -> list[Row]:
    """Every rule, or every one of a target; those over whole graphs first."""
    _check_target(target)
    rules = [Row(rule.name, rule.targets, rule.effect, rule.about) for rule in (*GRAPH_RULES, *NODE_RULES)]
    return [row for row in rules if target in (None, *row.targets)]


def lint_path(
    path: Path, target: str | None = None, dtype: str | None = None, sm: int | None = None
) -> list[LintedGraph]:
    """The findings of an ONNX file, or of every graph of a bundle, whose target, dtype and architecture are its own
    where none is given. Of a file, the dtype that most of its weights have is taken.

    Raises UserError for what is no graph, or a file without a target; BundleError for what is no bundle.
    """
    asked = sm
    _check_target(target)
    if dtype is not None and dtype not in DTYPES.values():
        raise UserError(f"no dtype {dtype!r}", where="--dtype", available=tuple(DTYPES.values()))
    if path.is_dir():
        manifest = read_manifest(path)
        programs = [one.programs[name] for one in manifest.each_variant() for name in one.programs]
        files = dict.fromkeys(path / program.graph for program in programs)
        target, dtype = target or manifest.target, dtype or manifest.dtype
        sm = manifest.sm if sm is None else sm
    elif target is None:
        raise UserError("what the graph is meant for is not said", where=str(path), fix="add --for", available=EVERY)
    else:
        files = dict.fromkeys([path])
    if not target.startswith("tensorrt"):
        refuse_idle(f"target {target} builds no engines", sm=asked)
    found = []
    for file in files:
        model = _load(file)
        kind = dtype or guess_dtype(model)
        found.append(LintedGraph(file, target, kind, tuple(lint_graph(model, target, kind, sm, file.parent))))
    return found


def _check_target(target: str | None) -> None:
    if target not in (None, *EVERY):
        raise UserError(f"no target {target!r}", where="--for", available=EVERY)


def guess_dtype(model: ir.Model) -> str:
    """The float type of most weights; of a graph without, of most ports; fp32 where there is none at all."""
    sizes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.dtype in DTYPES and value.const_value is not None:
            sizes[DTYPES[value.dtype]] += int(value.const_value.size)
    if not sizes:
        ports = (*model.graph.inputs, *model.graph.outputs)
        sizes.update(DTYPES[port.dtype] for port in ports if port.dtype in DTYPES)
    return max(sizes, key=lambda kind: sizes[kind], default="fp32")


def _load(path: Path) -> ir.Model:
    """A graph with functions written out and types and shapes as far as they follow; no weight is read."""
    if not path.is_file():
        raise UserError("no such file", where=str(path))
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and the IR's own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"is no ONNX graph: {reason}", where=str(path)) from None
    if model.functions:
        InlinePass()(model)
    if any(value.dtype is None or value.shape is None for node in model.graph for value in node.outputs):
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return model
