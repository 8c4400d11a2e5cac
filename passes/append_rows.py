"""Put the rows a family adds behind each item's features, after every stage of the vision side."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.compiler.function import trace_function
from secateur.compiler.program import Program, args_of, splice
from secateur.passes.edit import shape_of


def append_rows(vision: Program, rows: Program, items: int) -> Program:
    """``features [B,n*P,D]`` and a program that returns ``rows [E,D]`` -> ``features [B,n*(P+E),D]``, n ``items``."""
    module = vision.edit()
    output = module.graph.output_node()
    features, *rest = args_of(output)[0]
    batch, count, width = shape_of(features)
    extra = shape_of(rows.results[0])[0]

    def join(features: Tensor, rows: Tensor) -> Tensor:
        split = features.reshape(batch, items, count // items, width)
        behind = rows.expand(batch, items, extra, width)
        return torch.cat((split, behind), 2).reshape(batch, count + items * extra, width)

    kind = features.meta["val"].dtype
    feed = {"features": torch.zeros(batch, count, width, dtype=kind), "rows": torch.zeros(extra, width, dtype=kind)}
    joined = trace_function("append_rows", join, feed, ("features",))
    with module.graph.inserting_before(output):
        (appended,) = splice(module, rows, {})
        (whole,) = splice(module, joined, {"features": features, "rows": appended})
    output.args = ((whole, *rest),)
    return vision.with_module(module)
