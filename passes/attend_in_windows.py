"""Layers that attend through a sliding window: which windows hide anything, and what they are counted in.

A token at position p sees those at positions above p - window. Where a segment's slots lie as their tokens' positions
do, slots are compared. Where tokens were removed or let go of, positions are: every stage takes theirs along, and
prefill hands those of the cached rows to decode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from secateur.compiler import ops
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program, Segment, arrange_operands, operands_of, splice
from secateur.passes.edit import Node, is_call, layer_index
from secateur.runtime.errors import UserError


def attend_in_windows(
    program: Program, layers: str, segments: Sequence[Segment], uneven: Sequence[str], span: int
) -> Program:
    """The decoder with windows where they hide something, and ``position_ids`` given to them in ``uneven`` segments.

    ``span`` is the number of positions from a row's first to its last token. Raises UserError where such a window meets
    position ids of several axes: transformers counts its windows in none of them.
    """
    module = program.edit()
    root = position_input(module.graph)
    for node in module.graph.nodes:
        if not is_call(node, ops.attention) or (window := window_of(node)) is None:
            continue
        layer = layer_index(node, layers)
        segment = next(s for s in segments if layer is not None and s.first_layer <= layer < s.last_layer)
        hides = window < span
        if hides and root.meta["val"].dim() > 2:
            raise UserError(
                f"layer {layer} attends through a window of {window}, shorter than a row of {span} slots",
                where="attend_in_windows",
                fix="choose a geometry of fewer tokens; windows are not supported with position ids of several axes",
            )
        counted = root if hides and segment.name in uneven else None
        operands = operands_of(node) | {"window": window if hides else None, "positions": counted}
        node.args, node.kwargs = arrange_operands(ops.attention, operands), {}
    return program.with_module(module)


def list_uneven(segments: Sequence[Segment], starts_uneven: bool, compact: bool) -> list[str]:
    """Segments whose cached slots do not lie as their tokens' positions do. ``starts_uneven``: tokens that were removed
    before the decoder left gaps; ``compact``: stages inside it number what is left afresh."""
    return [s.name for s in segments if s.evicted or (not (compact and s.removed) and (starts_uneven or s.removed))]


def position_input(graph: fx.Graph) -> Node:
    return next(n for n in graph.find_nodes(op="placeholder") if n.name == "position_ids")


def window_of(attention: Node) -> int | None:
    """The window of a ``secateur::attention`` node, if it hides anything."""
    found: int | None = operands_of(attention)["window"]
    return found


def has_windows(graph: fx.Graph) -> bool:
    return any(is_call(n, ops.attention) and window_of(n) is not None for n in graph.nodes)


def lay_out_positions(
    module: fx.GraphModule, segment: Segment, positions: Node, rows: Node | None, last: Node, batch: int
) -> Node:
    """Positions of a segment's cache slots after prefill ``[B,C]``, ``ops.BEHIND`` in those the prompt leaves empty.

    ``positions [B,L]`` of the rows its layers saw, ``rows [B,K]`` those the cache keeps if not all, ``last [B]`` slot
    of the last real token as prefill receives it.
    """
    filled = segment.length - segment.evicted
    given = {"positions": torch.zeros(batch, segment.length, dtype=torch.int64)}
    feed = {"positions": positions, "last": last}
    if rows is not None:
        given["rows"], feed["rows"] = torch.zeros(batch, filled, dtype=torch.int64), rows
    given["last"] = torch.zeros(batch, dtype=torch.int64)

    def run(positions: Tensor, *rest: Tensor) -> Tensor:
        kept = ops.take_rows(positions, rest[0]) if rows is not None else positions
        empty = torch.full((batch, segment.capacity - filled), ops.BEHIND)
        real = torch.arange(segment.capacity) <= (rest[-1] - segment.removed - segment.evicted)[:, None]
        return torch.where(real, torch.cat((kept, empty), 1), ops.BEHIND)

    (made,) = splice(module, trace_function("positions", run, given, ("positions",)), feed)
    return made
