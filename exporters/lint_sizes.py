"""Rules about what an engine is built for: static sizes, ports it can have, weights it can reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from secateur.exporters.lint_subject import Problem, Subject, given

SIZED_BY_VALUES = ("Compress", "NonZero", "Unique")

SIZED_BY_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,), "Expand": (1,), "OneHot": (1,), "Pad": (1,), "Range": (0, 1, 2), "Reshape": (1,),
    "Resize": (2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Tile": (1,), "TopK": (1,),
    "Unsqueeze": (1,),
}  # fmt: skip
"""Which inputs of an operator decide the size of its result."""

ENGINE_TYPES = (
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT8,
    ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.BOOL,
)  # fmt: skip


def inputs_are_static(subject: Subject) -> Iterator[Problem]:
    """Every size of every input is a number: an engine is built for one geometry."""
    for value in subject.model.graph.inputs:
        if value.shape is None or not value.shape.is_static():
            yield f"input {value.name} has no static shape", "fix every size: an engine is built for one geometry"


def sizes_are_fixed(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    """No size depends on the numbers a graph is given, only on constants and on other sizes."""
    if node.op_type in SIZED_BY_VALUES:
        yield (
            f"how much {node.op_type} leaves depends on the numbers it is given",
            "keep a fixed number with TopK and Gather, or mark with Where",
        )
        return
    for index in SIZED_BY_INPUTS[node.op_type]:
        value = given(node, index)
        if value is not None and not subject.is_fixed(value):
            yield (
                f"the size of {node.op_type}'s result depends on {value.name}, known only when the graph runs",
                "make it a constant: an engine is built for one geometry",
            )
            return


def ports_have_engine_types(subject: Subject) -> Iterator[Problem]:
    """Ports are floats, int32, int64, int8, uint8 or bool: TensorRT has no others.

    int64 is safe: since TensorRT 10 such a port stays one of 64 bits.
    """
    for kind, value in _ports(subject):
        if value.dtype not in (None, ir.DataType.DOUBLE, *ENGINE_TYPES):
            name = str(value.dtype).lower()
            yield f"{kind} {value.name} is {name}, which TensorRT does not have", "make the port int32, int64 or float"


def ports_keep_their_width(subject: Subject) -> Iterator[Problem]:
    """A port of doubles silently becomes one of 32-bit floats: half the bytes that a caller gives."""
    for kind, value in _ports(subject):
        if value.dtype == ir.DataType.DOUBLE:
            what = "is of doubles, which TensorRT silently binds as 32-bit floats"
            yield f"{kind} {value.name} {what}", "make the port float; cast inside where doubles are meant"


def _ports(subject: Subject) -> Iterator[tuple[str, ir.Value]]:
    graph = subject.model.graph
    yield from (("input", value) for value in graph.inputs)
    yield from (("output", value) for value in graph.outputs)


def weights_are_in_reach(subject: Subject) -> Iterator[Problem]:
    """External weights are whole files below the graph's directory: no way out of it, and no symbolic link."""
    if subject.directory is None:
        return
    home = subject.directory.resolve()
    seen: dict[str, int] = {}
    for graph in (subject.model.graph, *subject.model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
                seen[str(tensor.location)] = max(seen.get(str(tensor.location), 0), end)
    for location, end in seen.items():
        yield from _reach(subject, home, location, end)


def _reach(subject: Subject, home: Path, location: str, end: int) -> Iterator[Problem]:
    path = home / location
    beside = "lay the file beside the graph: a hard link costs no space"
    if Path(location).is_absolute() or ".." in Path(location).parts:
        yield f"weights lie at {location}, outside the graph's directory", beside
    elif not path.is_file():
        yield f"weights {location} are not there", "copy every file of the model"
    elif path.stat().st_size < end:
        yield f"weights {location} end at byte {path.stat().st_size} of {end}", "copy the whole file"
    elif not path.resolve().is_relative_to(home) and not subject.target.startswith("tensorrt"):
        yield f"weights {location} are a symbolic link that leaves the graph's directory", beside
