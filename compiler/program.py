"""Programs: the graphs that travel from trace to export, as values that print themselves."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule as Module

Node = fx.Node


@dataclass(frozen=True)
class Program:
    """One graph. Inputs are its placeholders; weights and constants are ``get_attr`` nodes.

    A weight's node carries ``meta["weight"]``, the parameter's name in the Hugging Face model, and its tensor
    is on the ``meta`` device; constants are real tensors. ``outputs`` names the values of the output node.
    Passes never change a program in place: they edit ``edit()``'s copy.
    """

    name: str
    module: fx.GraphModule
    outputs: tuple[str, ...]

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(n.name for n in self.graph.nodes if n.op == "placeholder")

    @property
    def results(self) -> tuple[Node, ...]:
        """The nodes behind ``outputs``."""
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]  # an output node holds its results

    def edit(self) -> fx.GraphModule:
        """A copy whose graph may be changed; tensors are shared."""
        graph = fx.Graph()
        values: dict[Node, Node] = {}
        result = graph.graph_copy(self.graph, values)
        graph.output(result)
        for old, new in values.items():
            new.meta = dict(old.meta)
        return Module(self.module, graph)

    def with_module(self, module: fx.GraphModule, outputs: Iterable[str] | None = None) -> Program:
        module.graph.lint()
        module.recompile()
        return replace(self, module=module, outputs=tuple(outputs) if outputs is not None else self.outputs)

    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> meta tensor, in order of first use."""
        found: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr" and "weight" in node.meta:
                found.setdefault(node.meta["weight"], getattr(self.module, node.target))
        return found

    def __str__(self) -> str:
        lines = [f"program {self.name}"]
        names = {n: f"%{i}" for i, n in enumerate(n for n in self.graph.nodes if n.op not in ("output", "get_attr"))}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                continue
            if node.op == "output":
                results = ", ".join(f"{o}={_show(r, names)}" for o, r in zip(self.outputs, self.results, strict=True))
                lines.append(f"  return {results}")
                continue
            what = f"input {node.name}" if node.op == "placeholder" else _call(node, names)
            layer = f"  # {where}" if (where := node.meta.get("layer")) else ""
            lines.append(f"  {names[node]} = {what} : {_type(node.meta.get('val'))}{layer}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Segment:
    """A maximal run of decoder layers ``[first, last)`` with one token length and one KV capacity."""

    name: str
    first_layer: int
    last_layer: int
    length: int
    capacity: int
    removed: int
    """Tokens removed per row before this segment, counted from the prompt as prefill receives it."""
    evicted: int = 0
    """Tokens per row this segment's layers saw in prefill and whose keys and values their caches do not keep."""

    def __str__(self) -> str:
        return (
            f"segment {self.name} layers [{self.first_layer},{self.last_layer}) length {self.length} "
            f"capacity {self.capacity} removed {self.removed}" + (f" evicted {self.evicted}" if self.evicted else "")
        )


@dataclass(frozen=True, eq=False)
class ProgramSet:
    """The programs at one point of the pass list, by name, with the segments once they are known."""

    programs: Mapping[str, Program]
    segments: tuple[Segment, ...] = field(default=())

    def __getitem__(self, name: str) -> Program:
        return self.programs[name]

    def update(self, *programs: Program, drop: Iterable[str] = ()) -> ProgramSet:
        merged = {k: v for k, v in self.programs.items() if k not in set(drop)}
        merged.update({p.name: p for p in programs})
        return replace(self, programs=merged)

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.programs.values()), "\n".join(map(str, self.segments))]).rstrip()


def args_of(node: Node) -> tuple[Any, ...]:
    """A node's positional arguments. FX types them as a union of a dozen kinds; who reads them looked at the target."""
    return node.args


def operands_of(node: Node) -> dict[str, Any]:
    """A call's operands by the names of its operator's schema, in that order; those left out have their defaults.
    Empty for calls of what has no schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    found = {a.name: a.default_value for a in schema.arguments}
    return found | dict(zip(found, node.args, strict=False)) | node.kwargs


def arrange_operands(target: Any, operands: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments for a call of ``target``, without those at the end that have their defaults anyway."""
    arguments = target._schema.arguments
    assert set(operands) <= {a.name for a in arguments}, set(operands) - {a.name for a in arguments}
    values = [operands.get(a.name, a.default_value) for a in arguments]
    while arguments[len(values) - 1].has_default_value() and values[-1] == arguments[len(values) - 1].default_value:
        values.pop()
    return tuple(values)


def splice(target: fx.GraphModule, source: Program, feed: Mapping[str, Any]) -> list[Node]:
    """Copy ``source``'s nodes to the insertion point of ``target``; ``feed`` maps its inputs to nodes.

    Returns the nodes that stand for ``source.outputs``.
    """
    values: dict[Node, Any] = {}
    known = target.graph.find_nodes(op="get_attr")
    held = {n.meta["weight"]: n for n in reversed(known) if "weight" in n.meta}
    for node in source.graph.nodes:
        if node.op == "placeholder":
            values[node] = feed[node.name]
        elif node.op == "get_attr":
            # A weight that is already there is shared.
            weight = node.meta.get("weight")
            values[node] = held.get(weight) or attach(
                target, getattr(source.module, str(node.target)), node.meta, str(node.target)
            )
            if weight is not None:
                held[weight] = values[node]
                _hoist(target.graph, values[node])
        elif node.op == "output":
            return [values[n] for n in source.results]
        else:
            values[node] = target.graph.node_copy(node, lambda n: values[n])
            values[node].meta = dict(node.meta)
    raise AssertionError(f"{source.name} has no output")


def attach(target: fx.GraphModule, value: Any, meta: Mapping[str, Any], hint: str) -> Node:
    """A ``get_attr`` node for a tensor or submodule."""
    name, count = hint, 0
    while hasattr(target, name):
        count += 1
        name = f"{hint}_{count}"
    setattr(target, name, torch.nn.Buffer(value, persistent=False) if isinstance(value, Tensor) else value)
    node = target.graph.get_attr(name)
    node.meta = dict(meta)
    return node


def _hoist(graph: fx.Graph, node: Node) -> None:
    first = next(iter(graph.nodes))
    if first is not node:
        first.prepend(node)


def _call(node: Node, names: Mapping[Node, str]) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        title = target.name().split("::")[-1] if target.namespace == "aten" else target.name()
    else:
        title = "item" if target is operator.getitem else getattr(target, "__name__", str(target))
    parts = [_show(a, names) for a in node.args] + [f"{k}={_show(v, names)}" for k, v in node.kwargs.items()]
    return f"{title}({', '.join(parts)})"


def _show(value: Any, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names.get(value) or value.meta.get("weight") or f"constant:{value.target}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_show(v, names) for v in value)}]"
    return repr(value) if not isinstance(value, torch.dtype) else str(value).removeprefix("torch.")


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = ",".join(str(n) if isinstance(n, int) else "s" for n in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type(v) for v in value)})"
    return type(value).__name__ if value is not None else "?"
