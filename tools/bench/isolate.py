"""A recipe's stages cut out of its compiled programs: what scoring, selecting and gathering adds, and nothing else.

The pass list is run as ever. Every node that the two inserting passes add is marked, and the marked nodes of a
finished program become a program of their own, whose inputs are the values that were there without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.compiler.pipeline import PASSES, Recipe, export, plan_job, prune

INSERTING = ("insert_vision_stages", "insert_decoder_stages")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Cut:
    """The stages of one program as an ONNX model, with an array per input; ``scans``: loops of dependent steps."""

    program: str
    model: bytes
    feed: Mapping[str, Array]
    nodes: int
    scans: int


def cut_stages(traced: Any, recipe: Recipe, keep: float, ids: Mapping[str, Tensor]) -> list[Cut]:
    """The stages of ``vision`` and ``prefill`` at ``keep``, where there are any.

    ``ids`` holds the inputs of prefill that are no floats, from which masks and slots follow; floats are drawn at
    random, seeded, and so are the weights of projections a stage applies.
    """
    pruned = prune(traced, recipe, keep)
    programs = _mark(traced, recipe, keep)
    found = []
    for name, stages in (("vision", pruned.job.vision_stages), ("prefill", pruned.job.decoder_stages)):
        if not stages:
            continue
        marked = [n for n in programs[name].graph.nodes if n.meta.get("stage")]
        module, outside = _take_out(programs[name], marked)
        results = tuple(f"out_{i}" for i in range(len(_args(module.graph.output_node())[0])))
        alone = replace(programs[name], module=module, outputs=results)
        exported = export(replace(pruned, programs=replace(programs, programs={name: alone})), "onnxruntime")
        import onnx_ir as ir

        graph = exported.models[name].graph
        operators = [node.op_type for node in graph.all_nodes()]
        wanted = {str(value.name) for value in graph.inputs}
        feed = {n: v for n, v in _draw(outside, programs[name].module, ids).items() if n in wanted}
        model = ir.to_proto(exported.models[name]).SerializeToString()
        found.append(Cut(name, model, feed, len(operators), operators.count("Scan")))
    return found


def _mark(traced: Any, recipe: Recipe, keep: float) -> Any:
    """The finished programs, with ``meta["stage"]`` on what the inserting passes added."""
    job, programs = plan_job(traced.source, traced.geometry, recipe, keep), traced.programs
    for step in PASSES:
        before = {name: {n.name for n in p.graph.nodes} for name, p in programs.programs.items()}
        programs = step.run(programs, job)
        if step.name in INSERTING:
            for name, program in programs.programs.items():
                for node in program.graph.nodes:
                    if node.op == "call_function" and node.name not in before[name]:
                        node.meta["stage"] = True
    return programs


def _take_out(program: Any, marked: list[fx.Node]) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """The marked nodes as a module, and which node of ``program`` each of its inputs stands for."""
    graph, root = fx.Graph(), nn.Module()
    inside, values = set(marked), dict[fx.Node, fx.Node]()
    source = torch.Generator().manual_seed(0)
    outside: dict[str, fx.Node] = {}
    entering = dict.fromkeys(a for node in marked for a in node.all_input_nodes if a not in inside)
    for node in entering:
        if node.op != "get_attr":
            values[node] = graph.placeholder(f"in_{len(outside)}")
            values[node].meta = {"val": node.meta["val"]}
            outside[values[node].name] = node
    for node in entering:
        if node.op == "get_attr":
            held = getattr(program.module, str(node.target))
            if "weight" in node.meta:
                held = torch.randn(held.shape, generator=source) / max(1, held.shape[-1]) ** 0.5
            setattr(root, str(node.target), nn.Buffer(held, persistent=False) if isinstance(held, Tensor) else held)
            values[node] = graph.get_attr(str(node.target))
            values[node].meta = {"val": held} if isinstance(held, Tensor) else {}
    for node in marked:
        values[node] = graph.node_copy(node, lambda n: values[n])
        values[node].meta = dict(node.meta)
    leaving = [values[n] for n in marked if any(user not in inside for user in n.users)]
    graph.output(tuple(leaving))
    return fx.GraphModule(root, graph), outside


def _draw(outside: Mapping[str, fx.Node], module: fx.GraphModule, ids: Mapping[str, Tensor]) -> dict[str, Array]:
    """A value per input: floats at random, masks and slots as the program computes them from ``ids``."""
    source = torch.Generator().manual_seed(1)
    known: dict[fx.Node, Any] = {}
    found = {}
    for name, node in outside.items():
        kind = node.meta["val"]
        value = (
            torch.randn(kind.shape, generator=source)
            if kind.dtype.is_floating_point
            else evaluate(node, module, ids, known)
        )
        found[name] = value.contiguous().numpy()
    return found


def evaluate(node: fx.Node, module: fx.GraphModule, ids: Mapping[str, Tensor], known: dict[fx.Node, Any]) -> Any:
    """The value of a node that follows from ``ids`` and constants alone."""
    if node not in known:
        if node.op == "placeholder":
            known[node] = ids[node.name]
        elif node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        else:
            take = lambda n: evaluate(n, module, ids, known)  # noqa: E731
            args, kwargs = fx.map_arg((node.args, node.kwargs), take)
            target: Any = node.target
            known[node] = target(*args, **kwargs)
    return known[node]


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args
