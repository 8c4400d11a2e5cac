"""One program that encodes what is seen and what is heard, its tokens in the order in which the prompt has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from secateur.compiler.deepstack import is_plane_output
from secateur.compiler.function import trace_function
from secateur.compiler.program import Module, Program, splice
from secateur.passes.edit import Node, aten, shape_of
from secateur.passes.refresh_shapes import refresh_shapes


def join_encoders(
    vision: Program, audio: Program, orders: Sequence[Sequence[int]], carries: bool, stages: Sequence[str]
) -> Program:
    """``pixel_values``, ``input_features`` -> ``features [B,F,D]`` and, where the two have them, ``carried [B,F]``,
    ``deepstack.<i> [B,F,D]``, which are zero for what is heard, and ``kept.<stage> [B,K]``.

    ``orders[i]`` lists, for the tokens left after i stages of the vision side, where each token of the prompt lies
    among all that are seen, followed by all that are heard. ``kept`` of a stage counts the tokens that entered it in
    the prompt's order, those that are heard, all of which stay, counted in.
    """
    module = Module(nn.Module(), fx.Graph())
    graph = module.graph
    found: dict[str, dict[str, Node]] = {}
    for program in (vision, audio):
        ports = {name: graph.placeholder(name) for name in program.inputs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                ports[node.name].meta = dict(node.meta)
        found[program.name] = dict(zip(program.outputs, splice(module, program, ports), strict=True))
    seen, heard = found[vision.name], found[audio.name]

    def join(name: str, order: Sequence[int]) -> Node:
        whole = graph.call_function(aten.cat.default, ([seen[name], heard[name]], 1))
        if list(order) == list(range(len(order))):
            return whole
        index = trace_function("order", lambda: torch.tensor(list(order)), {}, ("order",))
        (places,) = splice(module, index, {})
        return graph.call_function(aten.index_select.default, (whole, 1, places))

    outputs = {"features": join("features", orders[-1])}
    if carries:
        outputs["carried"] = join("carried", orders[-1])
    for name in filter(is_plane_output, vision.outputs):
        heard[name] = graph.call_function(aten.zeros_like.default, (heard["features"],))
        outputs[name] = join(name, orders[-1])
    for index, stage in enumerate(stages):
        name = f"kept.{stage}"
        before, after = list(orders[index]), list(orders[index + 1])
        left = shape_of(seen[name])[1]
        batch = shape_of(seen[name])[0]
        place = [0] * len(before)
        for at, token in enumerate(before):
            place[token] = at
        count = len(before) - (len(after) - left)

        def follow(
            kept: Tensor, place: list[int] = place, after: list[int] = after, count: int = count, batch: int = batch
        ) -> Tensor:
            table = torch.tensor(place)
            sounds = table[count:].expand(batch, len(place) - count)
            whole = torch.cat((table[:count].expand(batch, count).gather(1, kept), sounds), 1)
            return whole.index_select(1, torch.tensor(after))

        feed = {"kept": torch.zeros(batch, left, dtype=torch.int64)}
        (outputs[name],) = splice(module, trace_function("follow", follow, feed, ("kept",)), {"kept": seen[name]})
    graph.output(tuple(outputs.values()))
    return refresh_shapes(Program("vision", module, tuple(outputs)))
