"""Which slots of an image that was cut into tiles are left, counted one by one: for the eager oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.compiler.families.family import VisionFacts


def slots_left(facts: VisionFacts, kept: Tensor) -> list[list[int]]:
    """Of each image of a row, the slots of its unpruned tokens and rows behind lines that are left, ascending.

    ``kept [V]`` are the row's tokens that are left, counted in the row. Rows behind lines always stay.
    """
    assert facts.tiles is not None
    rows = [slot for slot, place in enumerate(facts.tiles.order) if place < 0]
    own = [slot for slot, place in enumerate(facts.tiles.order) if place >= 0]
    found = [list(rows) for _ in range(facts.items)]
    for token in kept.tolist():
        image, place = divmod(token, facts.tokens_per_item)
        found[image].append(own[place])
    return [sorted(slots) for slots in found]


def lay_out_rows(facts: VisionFacts, kept: Tensor, features: Tensor, row: Tensor) -> Tensor:
    """``features [n,K,D]`` of the tokens left of each image, with ``row [D]`` behind every line: ``[n,R,D]``."""
    assert facts.tiles is not None
    images = []
    for slots, own in zip(slots_left(facts, kept), features, strict=True):
        rest = iter(own)
        images.append(torch.stack([row if facts.tiles.order[slot] < 0 else next(rest) for slot in slots]))
    return torch.stack(images)


def follow_kept(facts: VisionFacts, kept: dict[str, Tensor]) -> Tensor:
    """The row's tokens ``[V]`` that stages, in this order, have left: each counts among what the one before left."""
    tokens = torch.arange(facts.tokens_per_row)
    for chosen in kept.values():
        tokens = tokens[chosen]
    return tokens
