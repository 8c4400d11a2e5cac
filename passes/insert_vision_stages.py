"""Insert the stages of the vision side: between layers of the tower, before the projector, or after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from secateur.compiler import ops
from secateur.compiler.deepstack import as_input, is_plane_output
from secateur.compiler.families.family import Tower, VisionFacts
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program, args_of, operands_of, splice
from secateur.passes.check_stages import tower_layers
from secateur.passes.edit import Node, aten, check_attention, clone_slice, is_call, layer_index, shape_of
from secateur.passes.insert_decoder_stages import track_state
from secateur.passes.refresh_shapes import refresh_shapes
from secateur.passes.signals import PatchView, list_tower_raws, make_probes, tower_raw
from secateur.passes.sites import Thinned, reduce_patches, start_state
from secateur.passes.stage import StageFunction
from secateur.passes.tile_rows import TileMap
from secateur.runtime.errors import UserError


def insert_vision_stages(
    program: Program,
    stages: Sequence[StageFunction],
    tower: Tower,
    facts: VisionFacts,
    carries: bool = False,
) -> Program:
    """A tower's program with its stages; outputs ``features [B,F,D]``, with ``carries`` what the last score carries on
    (``carried [B,F]``), ``deepstack.<i> [B,F,D]`` of a model that has them, and ``kept.stage<i> [B,K]`` per stage that
    chooses.

    ``kept`` counts within the row: image j's tokens are offset by ``j * length_in``. Stages behind the tower choose
    among all tokens of an image that is cut into tiles, those of its padding left out.
    """
    batch = shape_of(program.results[0])[0] // facts.groups
    inserting = _Inserting(tower, facts, batch, program.outputs[2:])
    for index, stage in enumerate(stages):
        later = track_state(stages, index + 1)
        tracked = [*later, *(["carried"] if carries and "carried" not in later else [])]
        # Shapes anew after each stage: the next one is traced at what this one leaves.
        program = refresh_shapes(inserting.insert(program, stage, tracked))
    module = program.edit()
    graph = module.graph
    output = graph.output_node()
    # With the tower's last state gone, layers the features do not need go as well.
    features, _, *rest = args_of(output)[0]
    grids, length, width = shape_of(features)
    count = grids // batch * length
    names, results = ["features"], [_reshape(graph, output, features, [batch, count, width])]
    if carries:
        carried = rest.pop(inserting.outputs.index("carried"))
        inserting.outputs.remove("carried")
        names.append("carried")
        results.append(_reshape(graph, output, carried, [batch, math.prod(shape_of(carried)) // batch]))
    left = list(zip(inserting.outputs, rest, strict=True))
    for name, plane in (pair for pair in left if is_plane_output(pair[0])):
        names.append(name)
        results.append(_reshape(graph, output, plane, [batch, count, width]))
    kept = [pair for pair in left if pair[0].startswith("kept.")]
    output.args = ((*results, *(r for _, r in kept)),)
    return refresh_shapes(program.with_module(module, (*names, *(n for n, _ in kept))))


class _Inserting:
    """One program on its way through the stages. Its outputs are the features, the tower's last state, and then
    ``outputs``: planes, kept indices, and under their own names the state later stages want."""

    def __init__(self, paths: Tower, facts: VisionFacts, batch: int, outputs: Sequence[str]) -> None:
        self.paths, self.facts, self.batch = paths, facts, batch
        self.outputs = list(outputs)
        self.part = 0

    def insert(self, program: Program, stage: StageFunction, tracked: Sequence[str]) -> Program:
        module = program.edit()
        graph = module.graph
        planned, facts = stage.planned, self.facts
        inside = planned.site.kind == "vision.layer"
        value = self._site_value(graph, stage)
        order = {n: i for i, n in enumerate(graph.nodes)}
        cls = int(inside and facts.has_cls)
        groups = self.batch * planned.groups
        # What tiles have is put together by the first stage that works on whole images; those that are resized are.
        whole = facts.resizes_picture
        tiles = None if shape_of(value)[0] == groups and not whole else TileMap.of(facts)
        after = self._readers(graph, value, stage, order)
        layers = tower_layers(stage, facts)
        attention = {
            layer: self._attention(graph, layer, f"{planned.name}.signals")
            for _, layer in list_tower_raws(stage, layers)
        }
        ports: dict[str, Node] = {"tokens": value}
        for kind, layer in list_tower_raws(stage, layers):
            if kind == "query":
                check_attention(attention[layer], ("softcap", "bias"), f"a score of {planned.site}")
            ports[tower_raw(kind, layer)] = operands_of(attention[layer])[kind[0]]
        scales = {float(operands_of(node)["scale"]) for node in attention.values()} or {1.0}
        assert len(scales) == 1, "tower layers share one scale"
        raw_names = [n for n in ports if n != "tokens"]
        state = self._state(graph, stage, tracked)
        if planned.part != self.part:
            state.pop("carried", None)
        self.part = planned.part
        # From the first stage on, also where a later one is the first to ask.
        made = start_state([n for n in (*stage.signals, *tracked) if n not in state], groups, planned.length_in)
        planes = {} if planned.observes else self._planes(graph)
        at = _first_after(order, (*ports.values(), *planes.values()), after)
        extra = self._extra(module, stage, at)
        ports |= state | extra | {as_input(name): node for name, node in planes.items()}
        passed = [n for n in tracked if n in state or n in made or (n == "carried" and stage.bound.score is not None)]

        def run(*values: Tensor) -> Any:
            given = dict(zip(ports, values, strict=True))
            held = {n: given[n] for n in state} | made
            seen = PatchView(
                given["tokens"][:, cls:], {n: given[n] for n in raw_names}, next(iter(scales)), facts.has_cls, held,
                {n: given[n] for n in extra}, facts.grid, facts.merge, facts.patch_order,
                tiles.join if tiles is not None else None, whole,
            )  # fmt: skip
            thin = reduce_patches(stage, seen, layers, tracked)
            beside = [thin.thin(given[as_input(name)]) for name in planes]
            return self._results(stage, thin, given["tokens"][:, :cls], beside)

        fixed = [] if planned.observes else ["tokens", "kept", *map(as_input, planes)]
        if not fixed and not passed:
            return program
        feed = {name: _zeros_like(node) for name, node in ports.items()}
        traced = trace_function(planned.name, run, feed, (*fixed, *passed))
        with graph.inserting_before(at):
            results = splice(module, traced, ports)
        kept: list[tuple[str, Node]] = []
        if not planned.observes:
            tokens, kept = results[0], [(f"kept.{planned.name}", results[1])]
            kept += zip(planes, results[2 : len(fixed)], strict=True)
            tokens.meta["layer"] = value.meta.get("layer")
            for user in after:
                user.replace_input_with(value, tokens)
            if inside:
                for node in graph.find_nodes(op="call_function", target=ops.attention):
                    if (layer_index(node, self.paths.layers) or 0) >= (planned.site.layer or 0):
                        check_attention(node, ("bias",), f"choosing tokens at {planned.site}")
                _shorten(graph, order, value, cls + planned.length_in, cls + planned.length_out, self.paths)
        return self._update_outputs(program, module, kept, dict(zip(passed, results[len(fixed) :], strict=True)))

    def _results(
        self, stage: StageFunction, thin: Thinned, cls: Tensor, planes: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        left = tuple(thin.state.values())
        if stage.planned.observes:
            return left
        keep = thin.kept
        offset = torch.arange(keep.shape[0] // self.batch)[:, None] * stage.planned.length_in
        row = (keep.reshape(self.batch, -1, keep.shape[1]) + offset).reshape(self.batch, -1)
        tokens = torch.cat([cls, thin.tokens], 1) if cls.shape[1] else thin.tokens
        return tokens, row, *planes, *left

    def _planes(self, graph: fx.Graph) -> dict[str, Node]:
        values = zip(self.outputs, args_of(graph.output_node())[0][2:], strict=True)
        return {name: node for name, node in values if is_plane_output(name)}

    def _state(self, graph: fx.Graph, stage: StageFunction, tracked: Sequence[str]) -> dict[str, Node]:
        values = dict(zip(self.outputs, args_of(graph.output_node())[0][2:], strict=True))
        return {n: v for n, v in values.items() if n in stage.signals or n in tracked}

    def _update_outputs(
        self, program: Program, module: fx.GraphModule, kept: Sequence[tuple[str, Node]], state: Mapping[str, Node]
    ) -> Program:
        output = module.graph.output_node()
        features, tower, *rest = args_of(output)[0]
        values = dict(zip(self.outputs, rest, strict=True)) | dict(kept) | dict(state)
        self.outputs = list(values)
        output.args = ((features, tower, *values.values()),)
        return program.with_module(module, ("features", "tower", *self.outputs))

    def _site_value(self, graph: fx.Graph, stage: StageFunction) -> Node:
        """The tensor a stage reduces: what a tower layer reads, what the projector reads, or what it returns."""
        kind = stage.planned.site.kind
        if kind in ("projector.out", "audio.out"):
            features: Node = args_of(graph.output_node())[0][0]
            return features
        if kind == "vision.layer":
            return _entering(graph, f"{self.paths.layers}.{stage.planned.site.layer}", str(stage.planned.site))
        return _entering(graph, self.paths.entry, kind)

    def _readers(self, graph: fx.Graph, value: Node, stage: StageFunction, order: Mapping[Node, int]) -> list[Node]:
        """Who shall read the shorter stream: at an inner site everything behind it, after the tower what leads to the
        features (signals of later stages and the tower's own end keep the whole)."""
        if stage.planned.site.kind == "vision.layer":
            first = min(order[n] for n in _inside(graph, f"{self.paths.layers}.{stage.planned.site.layer}"))
            return [n for n in value.users if order[n] >= first and n.op != "output"]
        features = args_of(graph.output_node())[0][0]
        return [n for n in value.users if n.op == "output" or _leads_to(n, features)]

    def _attention(self, graph: fx.Graph, layer: int, where: str) -> Node:
        found = [
            n for n in graph.nodes
            if is_call(n, ops.attention) and layer_index(n, self.paths.layers) == layer
        ]  # fmt: skip
        if len(found) != 1:
            raise UserError(f"tower layer {layer} has {len(found)} attention nodes", where=where)
        return found[0]

    def _extra(self, module: fx.GraphModule, stage: StageFunction, at: Node) -> dict[str, Node]:
        """Rows the projector reads, and the projected probes around them."""
        if not {"projector_inputs", "probe_slopes"} & set(stage.signals):
            return {}
        graph = module.graph
        rows = _entering(graph, self.paths.entry, "projector")
        found: dict[str, Node] = {}
        if "projector_inputs" in stage.signals:
            found["projector_inputs"] = rows
        if "probe_slopes" in stage.signals:
            options = stage.signal_options["probe_slopes"]
            traced = trace_function(
                f"{stage.planned.name}.probes",
                lambda rows: make_probes(rows, options["directions"], options["step"], options["seed"]),
                {"rows": _zeros_like(rows)}, ("probes",),
            )  # fmt: skip
            inside = _inside(graph, self.paths.projector)
            (leaving,) = {n for n in inside if any(u not in inside for u in n.users)}
            with graph.inserting_before(at):
                (probes,) = splice(module, traced, {"rows": rows})
                (found["probes"],) = clone_slice([leaving], {rows: probes}, layer="")
            shape = shape_of(leaving)
            found["probes"].meta["val"] = leaving.meta["val"].new_empty(
                (2 * options["directions"] * shape[0], *shape[1:])
            )
        return found


def _inside(graph: fx.Graph, path: str) -> set[Node]:
    """The nodes of the module at ``path``."""
    return {n for n in graph.nodes if f"{n.meta.get('layer') or ''}.".startswith(f"{path}.")}


def _entering(graph: fx.Graph, path: str, where: str) -> Node:
    """The one computed value that the module at ``path`` reads."""
    inside = _inside(graph, path)
    entering = {
        a for n in inside for a in n.all_input_nodes if a not in inside and a.op not in ("get_attr", "placeholder")
    }
    if len(entering) != 1:
        names = sorted(n.name for n in entering)
        raise UserError(f"{path} reads {len(names)} values", where=f"site {where}", available=names)
    return entering.pop()


def _leads_to(user: Node, target: Node) -> bool:
    """Whether ``target`` follows from ``user``."""
    stack, seen = [user], set()
    while stack:
        node = stack.pop()
        if node is target:
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return False


def _shorten(graph: fx.Graph, order: Mapping[Node, int], value: Node, before: int, after: int, paths: Tower) -> None:
    """Put the new number of rows where the tower's later layers have it as a constant: dimension 1 of a shape."""
    for node in graph.nodes:
        if order.get(node, -1) <= order[value] or not is_call(node, *_SHAPED):
            continue
        shape = list(args_of(node)[1])
        if layer_index(node, paths.layers) is not None and len(shape) > 1 and shape[1] == before:
            node.args = (args_of(node)[0], [shape[0], after, *shape[2:]], *args_of(node)[2:])


_SHAPED = (aten.view.default, aten.reshape.default, aten.expand.default)


def _first_after(order: Mapping[Node, int], nodes: Any, users: Sequence[Node]) -> Node:
    """The node behind the last of ``nodes`` in graph order."""
    last = max(order[n] for n in nodes)
    found = next(n for n, i in order.items() if i == last + 1)
    assert all(order[u] > last for u in users), "a stage stands before everything that reads what it leaves"
    return found


def _reshape(graph: fx.Graph, output: Node, value: Node, shape: list[int]) -> Node:
    with graph.inserting_before(output):
        joined = graph.call_function(aten.reshape.default, (value, shape))
    joined.meta["val"] = value.meta["val"].new_empty(shape)
    return joined


def _zeros_like(node: Node) -> Tensor:
    """What the stage is traced with: the site's own dtype, so that its casts to float32 stay in the graph."""
    return torch.zeros(shape_of(node), dtype=node.meta["val"].dtype)
