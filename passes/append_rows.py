"""Put the rows a family adds behind or between each item's features, after every stage of the vision side."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.compiler import ops
from secateur.compiler.families.family import Tiles
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program, args_of, splice
from secateur.passes.edit import shape_of
from secateur.passes.tile_rows import count_in_images, place_survivors


def append_rows(vision: Program, rows: Program, items: int, tiles: Tiles | None = None) -> Program:
    """``features [B,n*P,D]`` and a program that returns ``rows [E,D]`` -> ``features [B,n*(P+E),D]``, n ``items``.

    With ``tiles`` the features of an item are put in the order those say, which may leave some out. Where stages chose
    among them, the rows stand between those that are left as they stood between all.
    """
    module = vision.edit()
    output = module.graph.output_node()
    features, *rest = args_of(output)[0]
    batch, count, width = shape_of(features)
    extra = shape_of(rows.results[0])[0]

    chosen = {}
    if tiles is not None:
        left = [node for name, node in zip(vision.outputs[1:], rest, strict=True) if name.startswith("kept.")]
        chosen = {f"kept_{index}": node for index, node in enumerate(left)}

    def join(features: Tensor, rows: Tensor, *kept: Tensor) -> Tensor:
        split = features.reshape(batch, items, count // items, width)
        behind = rows.expand(batch, items, extra, width)
        whole = torch.cat((split, behind), 2)
        if kept:
            assert tiles is not None
            left = kept[0]
            for chosen in kept[1:]:
                left = left.gather(1, chosen)
            source = place_survivors(count_in_images(left, items, tiles.tokens), tiles).source
            whole = ops.take_rows(whole.reshape(batch * items, -1, width), source)
        elif tiles is not None:
            last = count // items
            order = torch.tensor([place if place >= 0 else last for place in tiles.order])
            whole = whole.index_select(2, order)
        return whole.reshape(batch, -1, width)

    kind = features.meta["val"].dtype
    feed = {"features": torch.zeros(batch, count, width, dtype=kind), "rows": torch.zeros(extra, width, dtype=kind)}
    feed |= {name: torch.arange(shape_of(node)[1]).expand(batch, -1).contiguous() for name, node in chosen.items()}
    joined = trace_function("append_rows", join, feed, ("features",))
    with module.graph.inserting_before(output):
        (appended,) = splice(module, rows, {})
        (whole,) = splice(module, joined, {"features": features, "rows": appended, **chosen})
    output.args = ((whole, *rest),)
    return vision.with_module(module)
