"""Lowering of the scan of greedy selectors: as one ``Scan``, as one ``Loop``, or with all its steps written out.

ONNX Runtime gets the ``Scan``. OpenVINO 2026.4 imports none whose body reads values of the graph around it, but a
``Loop`` that does, which is what ``plain`` has. Written out there is no control flow, for toolchains that take none.
TensorRT-RTX 1.7 unrolls a loop of up to 15 steps itself. A longer one beside fused attention, which every program has,
breaks its builder wherever the two stand and whether or not one reads the other: a check of its own fails
(``ssa_validation``), or the process dies. With ``Loop`` for ``Scan`` it goes well more often, not always. Written out
the steps take some 0.14 MB of engine each, and a CUDA graph can capture them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.compiler.program import args_of
from secateur.exporters.builder import TYPES, Builder, make_port, shape_of, type_of
from secateur.exporters.lowering import lowers, output, read

STEP = "/step/"
"""In the name of every node of a step that is written out."""


class _Body(NamedTuple):
    """A scan's body in a graph of its own: values of the graph around it stand for what it reads besides its ports."""

    builder: Builder
    state: list[fx.Node]
    """Placeholders of what is handed from step to step."""
    rows: list[fx.Node]
    """Placeholders of a step's rows of the scan's inputs."""
    results: Sequence[fx.Node]

    def port(self, node: fx.Node) -> ir.Value:
        """An input of the body for a placeholder."""
        dtype, shape = output(node)
        self.builder.values[node] = value = make_port(self.builder, node.name, TYPES[dtype], shape)
        return value

    def close(self, inputs: Sequence[ir.Value], first: Sequence[ir.Value] = ()) -> ir.Graph:
        """The graph of a step, its results after ``first``."""
        outputs = [*first]
        for result in self.results:
            dtype, shape = output(result)
            # A graph output must be the body's own value and no other output's: pass it on by name.
            outputs.append(self.builder.op("Identity", self.builder.values[result], dtype=dtype, shape=shape))
        return ir.Graph(inputs, outputs, nodes=self.builder.nodes, name="step")


@lowers(torch.ops.higher_order.scan)
def lower_as_scan(b: Builder, node: fx.Node) -> list[ir.Value]:
    """One ONNX ``Scan``; what the body reads besides state and step is captured from the graph around it."""
    _, initial, steps, _ = args_of(node)
    body = _open(b, node, "scan")
    inputs = [body.port(port) for port in (*body.state, *body.rows)]
    body.builder.lower(body.builder.module.graph)
    feeds = [read(b, a) for a in (*initial, *steps)]
    attributes = {"body": body.close(inputs), "num_scan_inputs": len(steps)}
    return b.ops("Scan", *feeds, types=_types(node), attributes=attributes)


def lower_as_loop(b: Builder, node: fx.Node) -> list[ir.Value]:
    """One ONNX ``Loop`` of as many steps; a step takes its rows of the scan's inputs out of the graph around it."""
    _, initial, steps, _ = args_of(node)
    body, feeds = _open(b, node, "loop"), [read(b, a) for a in steps]
    inner = body.builder
    number, going = make_port(inner, "number", ir.DataType.INT64, []), make_port(inner, "going", ir.DataType.BOOL, [])
    inputs = [number, going, *(body.port(port) for port in body.state)]
    for port, feed in zip(body.rows, feeds, strict=True):
        if port.users:
            dtype, shape = output(port)
            inner.values[port] = inner.op("Gather", feed, number, dtype=dtype, shape=shape, attributes={"axis": 0})
    inner.lower(inner.module.graph)
    on = inner.op("Identity", going, dtype=torch.bool, shape=[])
    count = b.constant(shape_of(feeds[0])[0], torch.int64)
    given = [count, b.constant(True), *(read(b, a) for a in initial)]
    return b.ops("Loop", *given, types=_types(node), attributes={"body": body.close(inputs, [on])})


def lower_written_out(b: Builder, node: fx.Node) -> list[ir.Value]:
    """The nodes of every step, one after the other; constants of a step are taken out of the scan's inputs here."""
    combine, initial, steps, captured = args_of(node)
    body: fx.GraphModule = getattr(b.module, str(combine.target))
    inner = b.inside(body, f"{b.layer or 'stage'}{STEP}")
    ports, results = body.graph.find_nodes(op="placeholder"), _results(body)
    state, feeds = [read(b, a) for a in initial], [read(b, a) for a in steps]
    inner.values.update(zip(ports[len(initial) + len(steps) :], (read(b, a) for a in captured), strict=True))
    rows: list[list[ir.Value]] = [[] for _ in results[len(initial) :]]
    for step in range(shape_of(feeds[0])[0]):
        inner.values.update(zip(ports, [*state, *(_row_of(b, feed, step) for feed in feeds)], strict=False))
        inner.lower(body.graph)
        made = [inner.values[result] for result in results]
        state = made[: len(initial)]
        for found, value in zip(rows, made[len(initial) :], strict=True):
            found.append(value)
    return [*state, *(_stack(b, found) for found in rows)]


def _open(b: Builder, node: fx.Node, title: str) -> _Body:
    """The body of a scan, with the values it captures."""
    combine, initial, steps, captured = args_of(node)
    module: fx.GraphModule = getattr(b.module, str(combine.target))
    inner = Builder(module, b.lowerings, b, prefix=f"{b.layer or 'stage'}/{title}/")
    ports = module.graph.find_nodes(op="placeholder")
    own = len(initial) + len(steps)
    inner.values.update(zip(ports[own:], (read(b, a) for a in captured), strict=True))
    return _Body(inner, ports[: len(initial)], ports[len(initial) : own], _results(module))


def _types(node: fx.Node) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(value.dtype, tuple(value.shape)) for value in node.meta["val"]]


def _results(body: fx.GraphModule) -> Sequence[fx.Node]:
    found: Sequence[fx.Node] = args_of(body.graph.output_node())[0]
    return found


def _row_of(b: Builder, feed: ir.Value, step: int) -> ir.Value:
    shape = shape_of(feed)[1:]
    if feed.const_value is not None and not isinstance(feed.const_value, ir.ExternalTensor):
        return b.constant(np.ascontiguousarray(feed.const_value.numpy()[step]))
    return b.reshape(b.slice(feed, 0, step, step + 1), shape)


def _stack(b: Builder, rows: Sequence[ir.Value]) -> ir.Value:
    """Equal rows, one below the other."""
    shape = shape_of(rows[0])
    layers = [b.reshape(row, [1, *shape]) for row in rows]
    return b.op("Concat", *layers, dtype=type_of(rows[0]), shape=[len(rows), *shape], attributes={"axis": 0})
