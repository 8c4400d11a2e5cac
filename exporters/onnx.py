"""From a pruned program to an ONNX model in one dialect, without reading a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, fx

from secateur.compiler.program import Program
from secateur.exporters.builder import TYPES, Builder
from secateur.exporters.dialects import DIALECTS, Dialect
from secateur.exporters.expand_scores import expand_scores
from secateur.exporters.lowering_shapes import LOWERINGS
from secateur.exporters.plugins.lowering import with_plugins
from secateur.exporters.weights import WeightLayout
from secateur.runtime.errors import UserError

IR_VERSION = 10


@dataclass(frozen=True)
class Exported:
    """ONNX models by program name, in one dialect, and the layout of the weights they point into."""

    dialect: str
    models: Mapping[str, ir.Model]
    layout: WeightLayout

    def __str__(self) -> str:
        parts = []
        for name, model in self.models.items():
            counts: dict[str, int] = {}
            for node in model.graph:
                key = f"{node.domain}.{node.op_type}".lstrip(".")
                counts[key] = counts.get(key, 0) + 1
            parts.append(f"onnx {name} dialect {self.dialect}")
            parts += [f"  {op} x{counts[op]}" for op in sorted(counts)]
        return "\n".join(parts)

    @property
    def opset(self) -> int:
        return DIALECTS[self.dialect].opset


def export_programs(
    programs: Mapping[str, Program], dialect: str, layout: WeightLayout, plugins: bool = False
) -> Exported:
    """Lower every program.

    ``plugins``: the heavy parts of scores and selectors become nodes of domain ``secateur``, for the dialect tensorrt
    and the library ``tensorrt`` alone; who builds an engine of them calls
    :func:`secateur.exporters.plugins.register.register_plugins` first. Otherwise they are written out.
    """
    if dialect not in DIALECTS:
        raise UserError(f"no dialect {dialect!r}", where="export", available=sorted(DIALECTS))
    chosen = DIALECTS[dialect]
    if plugins:
        if dialect != "tensorrt":
            raise UserError(
                f"dialect {dialect} has no plugins", where="export", fix="export for tensorrt, or without plugins"
            )
        chosen = with_plugins(chosen)
    return Exported(dialect, {n: export_program(p, chosen, layout) for n, p in programs.items()}, layout)


def export_program(program: Program, dialect: Dialect, layout: WeightLayout) -> ir.Model:
    """Lower one program. Ports keep their names; ``past_key_3`` becomes ``past_key.3``."""
    program = expand_scores(program, dialect.stays)
    builder = Builder(program.module, {**LOWERINGS, **dialect.lowerings}, dialect=dialect.name)
    inputs: list[ir.Value] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            made = ir.Value(
                name=port_name(node.name), shape=ir.Shape(tuple(value.shape)), type=ir.TensorType(TYPES[value.dtype])
            )
            builder.values[node] = made
            inputs.append(made)
        elif node.op == "get_attr":
            builder.values[node] = _tensor(builder, node, program, layout)
    builder.lower(program.graph)
    outputs = _name_outputs(builder, program)
    graph = ir.Graph(
        inputs, outputs, nodes=builder.nodes, initializers=builder.initializers, name=program.name,
        opset_imports={"": dialect.opset, **dialect.domains},
    )  # fmt: skip
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="secateur")
    RemoveUnusedNodesPass()(model)
    return model


def port_name(name: str) -> str:
    """FX names hold no dots: ``past_key_3`` -> ``past_key.3``, ``slot_s0`` -> ``slot.s0``."""
    return re.sub(r"^(past_key|past_value|slot|positions|deepstack)_(\w+)$", r"\1.\2", name)


def save_model(model: ir.Model, path: Path) -> None:
    """Write one ONNX file; weights stay where their entries point."""
    path.write_bytes(serialize(model))


def serialize(model: ir.Model) -> bytes:
    """What an ONNX file holds; the same for equal models."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _tensor(builder: Builder, node: fx.Node, program: Program, layout: WeightLayout) -> ir.Value | None:
    tensor = getattr(program.module, str(node.target))
    if not isinstance(tensor, Tensor):
        return None
    name = node.meta.get("weight")
    if name is None:
        return builder.constant(tensor)
    name, place = layout.aliases.get(name, name), layout.find(name)
    for held in builder.initializers:
        if held.name == name:  # tied: one tensor by two names
            return held
    kind = TYPES[place.dtype]
    value = ir.Value(name=name, shape=ir.Shape(place.shape), type=ir.TensorType(kind))
    value.const_value = ir.ExternalTensor(
        place.file, place.offset, place.length, kind, shape=ir.Shape(place.shape), name=name
    )
    builder.initializers.append(value)
    if place.turned:
        builder.turned.add(value)
    return value


def _name_outputs(builder: Builder, program: Program) -> list[ir.Value]:
    """Give the results their port names; a result that is an input or already named goes through Identity."""
    taken: set[int] = {id(v) for v in builder.values.values() if isinstance(v, ir.Value) and v.producer() is None}
    outputs = []
    for name, node in zip(program.outputs, program.results, strict=True):
        value = builder.values[node]
        if id(value) in taken:
            shown = node.meta["val"]
            value = builder.op("Identity", value, dtype=shown.dtype, shape=tuple(shown.shape))
        taken.add(id(value))
        value.name = name
        outputs.append(value)
    return outputs
