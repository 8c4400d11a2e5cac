"""What a bundle is expected to take, worked out from its graphs before anything is written or built.

Nothing here depends on the machine: the same graphs give the same forecast, so it may stand in the manifest.
docs/forecast.md compares it with what was measured, and says where the constants come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from secateur.compiler.pruned import Pruned
from secateur.exporters.engine_weights import list_shared
from secateur.exporters.liveness import peak_bytes
from secateur.exporters.lowering_scan import STEP
from secateur.exporters.onnx import Exported, serialize
from secateur.exporters.weights import Placed, WeightLayout
from secateur.runtime import manifest as m
from secateur.runtime.kv import buffer_bytes, cache_bytes

_MIB = 1 << 20
_KINDS = {
    ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16", ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32", ir.DataType.BOOL: "bool",
}  # fmt: skip

# Fitted to TensorRT-RTX 1.7 by `python -m secateur.tools.bench.forecast`.
_ENGINES = {"vision": (2_100_000, 5_200), "prefill": (1_800_000, 13_500), "decode": (700_000, 12_700)}
"""Bytes of an engine beside weights and constants: at all, and for each node of its graph but those of steps."""
_DECODE_FROM_INPUTS = (2_100_000, 5_200)
"""The same where weights are inputs: as in a tower, layers have kernels between them."""
_KERNELS_OF_STEP = {"ArgMax": 2, "TopK": 2, "GatherElements": 1}
"""Kernels of a selector's step that is written out, by the nodes that begin one; the others are fused into them."""
_ENGINE_OF_KERNEL = 70_000
_BUILDER, _BUILDER_OF_NODE, _BUILDER_OF_WEIGHTS = 180 * _MIB, _MIB // 7, 3.7
"""Resident memory of building an engine: at all, with the library; for each node; for each byte of weights in it."""
_COMPILER, _COMPILER_OF_NODE = 540 * _MIB, _MIB // 36
"""Resident memory of imports, traces and graphs: at all, and for each node of all graphs."""
_READ = 2
"""Bytes of an element as checkpoints have it, most of them."""

Place = tuple[str, int]
"""A weight by the file it lies in and its offset there."""


@dataclass(frozen=True)
class Needs:
    """A bundle's forecast: of every geometry, and of all of them together. Bytes throughout."""

    target: str
    engine_weights: str | None
    """Where engines have their weights, as :class:`~secateur.runtime.schema.Engines` says it; None for graphs."""
    weights_mode: str
    batches: tuple[int, ...]
    geometries: tuple[m.Forecast, ...]
    weights: int
    """Weights on the device once every geometry has run."""
    written: int
    """Weights files that are written or copied into the bundle; linked ones take no room."""
    graphs: int
    """The graphs of all geometries, which stay in a bundle beside its engines; equal ones are one."""
    engines: int
    """The engines of all geometries, each of a graph of its own; 0 for targets without."""
    host: int
    """Memory of the machine while it compiles; one process compiles all geometries."""

    @property
    def disk(self) -> int:
        """Room the bundle takes where nothing of it can be linked but weights files that shall be."""
        return self.written + self.graphs + self.engines

    @property
    def device(self) -> int:
        """Memory of the device once every geometry has run, one request at a time."""
        return self.weights + max(one.device - one.weights for one in self.geometries)

    def __str__(self) -> str:
        only = self.geometries[0] if len(self.geometries) == 1 else None
        parts = only.model_dump() if only else {"weights": self.weights, "host": self.host}
        told = [f"{name} {count}" for name, count in (parts | {"device": self.device, "disk": self.disk}).items()]
        return f"forecast bytes {self.target} {' '.join(told)}"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        geometries = [one.model_dump() | {"device": one.device} for one in self.geometries]
        return {"disk": self.disk, "host": self.host, "device": self.device, "geometries": geometries}


def forecast(pruned: Sequence[Pruned], exported: Sequence[Exported], target: str, engine_weights: str | None) -> Needs:
    """Forecast a bundle of these geometries, in their order; no weight is read and nothing is built.

    ``engine_weights`` is ``plan``, ``stripped`` or ``inputs`` for TensorRT targets, None for others.

    * weights: the bytes of the tensors. Graphs map one file, so each tensor counts once; with ``inputs`` so do those
      of one allocation; in ``plan`` each engine has its own copy, and a stripped one gets it when it is loaded.
      Geometries whose graphs are equal have one engine between them.
    * caches and buffers: what the runtime allocates for a request (``runtime/kv.py``).
    * activations: the largest program's, see :func:`~secateur.exporters.liveness.peak_bytes`; all programs' for ONNX
      Runtime's CUDA provider, of which every session keeps what its largest run took.
    * engines: graph files to the byte. An engine is its weights and constants and, of kernels, some 2 MB and 13 kB for
      each node, or 5 kB where layers share them, and 0.14 MB for each step of a selector.
    * host: imports, traces and graphs, and on top of them the larger of the tensors being streamed and the builder,
      which holds the weights that go into its engine almost four times.
    """
    made = [_of_geometry(*one, target, engine_weights) for one in zip(pruned, exported, strict=True)]
    layout = exported[0].layout
    files = _distinct(exported)
    return Needs(
        target=target, engine_weights=engine_weights, weights_mode=layout.mode,
        batches=tuple(one.job.geometry.batch for one in pruned), geometries=tuple(made),
        weights=_weights([model for _, model in files.values()], engine_weights),
        written=_written(layout), graphs=sum(map(len, files)), engines=_engines(files.values(), engine_weights),
        host=_host(exported, engine_weights),
    )  # fmt: skip


def _distinct(exported: Sequence[Exported]) -> dict[bytes, tuple[str, ir.Model]]:
    """Programs by what their files hold: equal ones are one file of a bundle, and one engine."""
    programs = [program for one in exported for program in one.models.items()]
    return {serialize(model): (name, model) for name, model in programs}


def _of_geometry(pruned: Pruned, exported: Exported, target: str, engine_weights: str | None) -> m.Forecast:
    models = exported.models
    peaks = [peak_bytes(model.graph, engine_weights is None) for model in models.values()]
    programs = {name: _ports(model.graph) for name, model in models.items()}
    files = sum(len(serialize(model)) for model in models.values())
    return m.Forecast(
        engines=_engines(models.items(), engine_weights) if engine_weights else files,
        weights=_weights(models.values(), engine_weights),
        caches=_caches(pruned, programs),
        activations=sum(peaks) if target == "onnxruntime-cuda" else max(peaks),
        buffers=buffer_bytes(programs),
        host=_host([exported], engine_weights),
    )


def _weights(models: Iterable[ir.Model], engine_weights: str | None) -> int:
    graphs = [model.graph for model in models]
    if engine_weights in ("plan", "stripped"):
        return sum(_inside_bytes(graph, "plan") for graph in graphs)
    once = {place: size for graph in graphs for place, size in stored_tensors(graph).items()}
    if engine_weights is None:
        return sum(once.values())
    outside = {place for graph in graphs for place in _outside(graph)}
    return sum(once[place] for place in outside) + sum(_inside_bytes(graph, "inputs") for graph in graphs)


def stored_tensors(graph: ir.Graph) -> dict[Place, int]:
    """Bytes of the weights a graph points at in other files, by place."""
    held = [value.const_value for value in graph.initializers.values()]
    return {_place(data): int(data.nbytes) for data in held if isinstance(data, ir.ExternalTensor)}


def _place(data: ir.ExternalTensor) -> Place:
    return str(data.location), int(data.offset or 0)


def constant_bytes(graph: ir.Graph) -> int:
    """Bytes of the data inside a graph."""
    held = [value.const_value for value in graph.initializers.values()]
    return sum(data.nbytes for data in held if data is not None and not isinstance(data, ir.ExternalTensor))


def count_nodes(graph: ir.Graph) -> int:
    """Nodes, those of loops' bodies counted once."""
    return sum(1 for _ in graph.all_nodes())


def _outside(graph: ir.Graph) -> set[Place]:
    """Weights that are inputs of an engine where its weights are."""
    held = [graph.initializers[name].const_value for name in list_shared(graph)]
    return {_place(data) for data in held if isinstance(data, ir.ExternalTensor)}


def _inside_bytes(graph: ir.Graph, engine_weights: str) -> int:
    """Bytes of the weights an engine file holds."""
    outside = set() if engine_weights == "plan" else _outside(graph)
    return sum(size for place, size in stored_tensors(graph).items() if place not in outside)


def _engines(programs: Iterable[tuple[str, ir.Model]], engine_weights: str | None) -> int:
    """Bytes of engines by the names of their programs; 0 for targets without."""
    if engine_weights is None:
        return 0
    return sum(engine_bytes(name, model.graph, engine_weights) for name, model in programs)


def engine_bytes(program: str, graph: ir.Graph, engine_weights: str) -> int:
    """Bytes an engine file is expected to have."""
    steps = [node for node in graph.all_nodes() if STEP in str(node.name)]
    kernels = sum(_KERNELS_OF_STEP.get(node.op_type, 0) for node in steps)
    fed = program == "decode" and engine_weights == "inputs" and _outside(graph)
    base, of_node = _DECODE_FROM_INPUTS if fed else _ENGINES[program]
    own = _inside_bytes(graph, engine_weights) + constant_bytes(graph)
    return own + base + of_node * (count_nodes(graph) - len(steps)) + _ENGINE_OF_KERNEL * kernels


def _caches(pruned: Pruned, programs: Mapping[str, m.Program]) -> int:
    """The runtime's own formula, with heads and their size as the programs have them."""
    past = next(port for port in programs["decode"].inputs if port.name.startswith("past_key."))
    _, heads, _, width = past.shape
    told = m.Manifest.model_construct(
        model=m.Model.model_construct(kv_heads=heads, head_dim=width),
        geometry=m.GeometrySizes.model_construct(batch=pruned.job.geometry.batch),
        segments=[m.Segment(**vars(segment)) for segment in pruned.programs.segments],
        dtype=past.dtype,  # type: ignore[arg-type]  # a cache's is the model's
    )
    return cache_bytes(told)


def _ports(graph: ir.Graph) -> m.Program:
    """A program's ports as the manifest has them."""
    inputs, outputs = ([_port(value) for value in values] for values in (graph.inputs, graph.outputs))
    return m.Program.model_construct(inputs=inputs, outputs=outputs)


def _port(value: ir.Value) -> m.Port:
    assert value.dtype is not None
    assert value.shape is not None
    kind, shape = _KINDS[value.dtype], [int(n) for n in value.shape]  # type: ignore[arg-type]  # static by then
    return m.Port(name=str(value.name), dtype=kind, shape=shape)  # type: ignore[arg-type]  # pydantic checks


def _written(layout: WeightLayout) -> int:
    copied = sum(path.stat().st_size for path in layout.shards.values()) if layout.mode == "copy" else 0
    return len(layout.header) + sum(place.length for place in layout.written.values()) + copied


def _streamed(place: Placed) -> int:
    """Bytes of a tensor on its way: as it was read, and beside that cast."""
    read = place.length * _READ // place.dtype.itemsize
    return place.length if place.dtype.itemsize <= _READ else place.length + read


def _host(exported: Sequence[Exported], engine_weights: str | None) -> int:
    graphs = [model.graph for one in exported for model in one.models.values()]
    base = _COMPILER + _COMPILER_OF_NODE * sum(map(count_nodes, graphs))
    streamed = max(map(_streamed, exported[0].layout.written.values()), default=0)
    if engine_weights is None:
        return base + streamed
    # What a stripped engine leaves out its builder has all the same.
    held = "inputs" if engine_weights == "inputs" else "plan"
    building = max(
        _BUILDER + _BUILDER_OF_NODE * count_nodes(graph) + int(_BUILDER_OF_WEIGHTS * _inside_bytes(graph, held))
        for graph in graphs
    )
    return base + max(streamed, building)
