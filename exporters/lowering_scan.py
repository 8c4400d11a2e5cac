"""Lowering of the scan of greedy selectors: as one ``Scan``, or with all its steps written out for TensorRT.

TensorRT-RTX 1.7 unrolls a loop of up to 15 steps itself. A longer one beside fused attention, which every program has,
breaks its builder wherever the two stand and whether or not one reads the other: a check of its own fails
(``ssa_validation``), or the process dies. With ``Loop`` for ``Scan`` it goes well more often, not always. Written out
there is no loop, for some 0.14 MB of engine a step, and a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from secateur.compiler.program import args_of
from secateur.exporters.builder import TYPES, Builder, shape_of, type_of
from secateur.exporters.lowering import lowers, output, read

STEP = "/step/"
"""In the name of every node of a step that is written out."""


@lowers(torch.ops.higher_order.scan)
def lower_as_scan(b: Builder, node: fx.Node) -> list[ir.Value]:
    """One ONNX ``Scan``; what the body reads besides state and step is captured from the graph around it."""
    combine, initial, steps, captured = args_of(node)
    body: fx.GraphModule = getattr(b.module, str(combine.target))
    inner = Builder(body, b.lowerings, b, prefix=f"{b.layer or 'stage'}/scan/")
    inputs: list[ir.Value] = []
    ports = body.graph.find_nodes(op="placeholder")
    inner.values.update(zip(ports[len(initial) + len(steps) :], (read(b, a) for a in captured), strict=True))
    for port in ports[: len(initial) + len(steps)]:
        dtype, shape = output(port)
        name = f"{inner.prefix}{port.name}"
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(TYPES[dtype]))
        inner.values[port] = value
        inputs.append(value)
    inner.lower(body.graph)
    outputs = []
    for result in _results(body):
        dtype, shape = output(result)
        # A graph output must be the body's own value and no other output's: pass it on by name.
        outputs.append(inner.op("Identity", inner.values[result], dtype=dtype, shape=shape))
    graph = ir.Graph(inputs, outputs, nodes=inner.nodes, name="step")
    types = [(v.dtype, tuple(v.shape)) for v in node.meta["val"]]
    feeds = [read(b, a) for a in (*initial, *steps)]
    return b.ops("Scan", *feeds, types=types, attributes={"body": graph, "num_scan_inputs": len(steps)})


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
