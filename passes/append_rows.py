"""Put the rows a family adds behind or between each item's features, after every stage of the vision side."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.compiler.families.family import Tiles
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program, args_of, splice
from secateur.passes.edit import shape_of


def append_rows(vision: Program, rows: Program, items: int, tiles: Tiles | None = None) -> Program:
    """``features [B,n*P,D]`` and a program that returns ``rows [E,D]`` -> ``features [B,n*(P+E),D]``, n ``items``.

    With ``tiles`` the features of an item are put in the order those say, which may leave some out.
    """
    module = vision.edit()
    output = module.graph.output_node()
    features, *rest = args_of(output)[0]
    batch, count, width = shape_of(features)
    extra = shape_of(rows.results[0])[0]

    def join(features: Tensor, rows: Tensor) -> Tensor:
        split = features.reshape(batch, items, count // items, width)
        behind = rows.expand(batch, items, extra, width)
        whole = torch.cat((split, behind), 2)
        if tiles is not None:
            last = count // items
            order = torch.tensor([place if place >= 0 else last for place in tiles.order])
            whole = whole.index_select(2, order)
        return whole.reshape(batch, -1, width)

    kind = features.meta["val"].dtype
    feed = {"features": torch.zeros(batch, count, width, dtype=kind), "rows": torch.zeros(extra, width, dtype=kind)}
    joined = trace_function("append_rows", join, feed, ("features",))
    with module.graph.inserting_before(output):
        (appended,) = splice(module, rows, {})
        (whole,) = splice(module, joined, {"features": features, "rows": appended})
    output.args = ((whole, *rest),)
    return vision.with_module(module)
