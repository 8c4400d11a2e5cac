"""Insert the stages that stand after the vision tower: before the projector or after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.compiler import ops
from secateur.compiler.families.family import Family, VisionFacts
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program, args_of, splice
from secateur.passes.edit import Node, ancestors, aten, is_call, layer_index, shape_of
from secateur.passes.refresh_shapes import refresh_shapes
from secateur.passes.sites import reduce_features
from secateur.passes.stage import StageFunction
from secateur.runtime.errors import UserError


def insert_vision_stages(
    program: Program, stages: Sequence[StageFunction], family: Family, facts: VisionFacts, images: int
) -> Program:
    """``vision`` with its stages; outputs ``features [B,F,D]`` and ``kept.stage<i> [B,K]`` per stage.

    ``kept`` counts within the row: image j's tokens are offset by ``j * length_in``.
    """
    kept: list[str] = []
    batch = shape_of(program.results[0])[0] // images
    program = program.with_module(program.edit(), ("features",))
    program.graph.output_node().args = ((program.results[0],),)
    for stage in stages:
        # Shapes anew after each stage: the next one is traced at what this one leaves.
        program = refresh_shapes(_insert_stage(program, stage, family, facts, batch))
        kept.append(f"kept.{stage.planned.name}")
    module = program.edit()
    output = module.graph.output_node()
    features, *rest = args_of(output)[0]
    width = shape_of(features)[-1]
    count = (stages[-1].planned.length_out if stages else facts.tokens_per_image) * images
    with module.graph.inserting_before(output):
        joined = module.graph.call_function(aten.reshape.default, (features, [batch, count, width]))
    joined.meta["val"] = features.meta["val"].new_empty((batch, count, width))
    output.args = ((joined, *rest),)
    return program.with_module(module, ("features", *kept))


def check_vision_stages(stages: Sequence[StageFunction]) -> None:
    """Refuse, before anything is traced, what this pass cannot insert."""
    for index, stage in enumerate(stages):
        planned = stage.planned
        if planned.site.kind not in ("vision.out", "projector.out"):
            raise UserError(
                f"site {planned.site} is not supported yet",
                where=planned.name,
                available=["vision.out", "projector.out", "decoder.layer[k]"],
            )
        wanted = [s for s in stage.signals if s != "tokens"]
        if index and wanted:
            raise UserError(
                f"signal {wanted[0]} at {planned.site} still counts the tokens that {stages[index - 1].planned.name} "
                "removed",
                where=planned.name,
                fix="let the first stage after the tower use it, or choose by tokens there",
            )


def _insert_stage(program: Program, stage: StageFunction, family: Family, facts: VisionFacts, batch: int) -> Program:
    module = program.edit()
    graph = module.graph
    value = _site_value(graph, stage, family)
    taps = _taps(graph, stage, family, facts)
    after = [n for n in value.users if n.op == "output" or _leads_to_features(n)]
    feed = {"tokens": _zeros_like(value)} | {
        f"{name}_{role}": _zeros_like(node)
        for name, attention in taps.items()
        for role, node in zip(("query", "key"), args_of(attention)[:2], strict=True)
    }
    scales = {name: float(args_of(attention)[3]) for name, attention in taps.items()}

    def run(*values: torch.Tensor) -> object:
        pairs = {n: (values[1 + 2 * i], values[2 + 2 * i], s) for i, (n, s) in enumerate(scales.items())}
        tokens, keep = reduce_features(stage, values[0], pairs)
        offset = torch.arange(keep.shape[0] // batch)[:, None] * stage.planned.length_in
        return tokens, (keep.reshape(batch, -1, keep.shape[1]) + offset).reshape(batch, -1)

    traced = trace_function(stage.planned.name, run, feed, ("tokens", "kept"))
    with graph.inserting_before(_first_after(graph, [value, *taps.values()])):
        ports = dict(zip(feed, [value, *(n for a in taps.values() for n in args_of(a)[:2])], strict=True))
        tokens, row = splice(module, traced, ports)
    tokens.meta["layer"] = value.meta.get("layer")
    for user in after:
        user.replace_input_with(value, tokens)
    output = graph.output_node()
    output.args = ((*args_of(output)[0], row),)
    return program.with_module(module, (*program.outputs, f"kept.{stage.planned.name}"))


def _zeros_like(node: Node) -> torch.Tensor:
    """What the stage is traced with: the site's own dtype, so that its casts to float32 stay in the graph."""
    return torch.zeros(shape_of(node), dtype=node.meta["val"].dtype)


def _site_value(graph: torch.fx.Graph, stage: StageFunction, family: Family) -> Node:
    """The tensor a stage reduces: what the projector reads, or what it returns."""
    kind = stage.planned.site.kind
    if kind == "projector.out":
        features: Node = args_of(graph.output_node())[0][0]
        return features
    if kind == "vision.out":
        inside = {n for n in graph.nodes if str(n.meta.get("layer", "")).startswith(family.projector)}
        entering = {
            a for n in inside for a in n.all_input_nodes if a not in inside and a.op not in ("get_attr", "placeholder")
        }
        if len(entering) == 1:
            return entering.pop()
        names = sorted(n.name for n in entering)
        raise UserError(f"the projector reads {len(names)} values", where=f"site {kind}", available=names)
    raise AssertionError(f"check_vision_stages let {stage.planned.site} through")


def _taps(graph: torch.fx.Graph, stage: StageFunction, family: Family, facts: VisionFacts) -> dict[str, Node]:
    wanted = [s for s in stage.signals if s != "tokens"]
    if not wanted:
        return {}
    if not facts.has_cls:
        raise UserError(
            "the tower has no CLS token", where=f"{stage.planned.name}: signal {wanted[0]}", available=["tokens"]
        )
    found = [
        n for n in graph.nodes
        if is_call(n, ops.attention) and layer_index(n, family.vision_layers) == facts.feature_layer
    ]  # fmt: skip
    assert len(found) == 1, "one attention node per tower layer"
    return dict.fromkeys(wanted, found[0])


def _leads_to_features(user: Node) -> bool:
    """Whether ``user`` stands on the way to the features: what else reads it keeps the whole."""
    return user in ancestors([args_of(user.graph.output_node())[0][0]])


def _first_after(graph: torch.fx.Graph, nodes: Sequence[Node]) -> Node:
    """The node behind the last of ``nodes`` in graph order."""
    order = list(graph.nodes)
    return order[max(order.index(n) for n in nodes) + 1]
