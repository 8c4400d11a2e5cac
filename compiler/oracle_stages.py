"""What a stage leaves, as the eager oracle reads it: group by group and token by token, of one row.

``passes/sites.py`` says the same in tensors of fixed shapes, for graphs. The two share the stage's own function, which
chooses, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.compiler.token_map import TokenMap

State = Mapping[str, Tensor]
"""What earlier stages tell of each token: "size" and "source", and "carried" from the first score on, ``[G,N]``."""


class Thinned(NamedTuple):
    """What a stage at a tower leaves: ``tokens [M,K,D]``, the ``map`` that chose them, and ``state [M,K]`` for later
    stages."""

    tokens: Tensor
    map: TokenMap
    state: dict[str, Tensor]


class Shortened(NamedTuple):
    """What a stage in the decoder leaves of a row of ``L`` slots: ``slots [L']`` of them, ``hidden [L',D]``,
    ``prunable [L']`` bool, and ``kept [V']`` of its prunable tokens."""

    slots: Tensor
    hidden: Tensor
    prunable: Tensor
    kept: Tensor


def begin_state(groups: int, length: int) -> dict[str, Tensor]:
    """Before any stage every token stands for itself alone: ``[groups,length]`` of each."""
    return {"size": torch.ones(groups, length), "source": torch.arange(length).repeat(groups, 1)}


def tell_later(state: State, carry: Tensor | None, chosen: TokenMap) -> dict[str, Tensor]:
    """The state of the tokens that stay ``[G,K]``. A token is as large as all that went into it; a stage that scores
    carries its own score (``carry [G,N]``), and any other what it was told."""
    groups = range(len(chosen.keep))
    told = {name: values.reshape(len(chosen.keep), -1) for name, values in state.items()}
    if carry is not None:
        told["carried"] = carry
    left = {name: torch.stack([values[g][chosen.keep[g]] for g in groups]) for name, values in told.items()}
    if chosen.mix is not None and "size" in told:
        left["size"] = torch.stack([
            torch.stack([told["size"][g][weights > 0].sum() for weights in chosen.mix[g]]) for g in groups
        ])  # fmt: skip
    return left


def thin_rows(rows: Tensor, chosen: TokenMap) -> Tensor:
    """Survivors of ``rows [G,N,D]``, each as it was, or mixed from the rows of its group: ``[G,K,D]``."""
    return torch.stack([
        own[keep] if chosen.mix is None else chosen.mix[group] @ own
        for group, (own, keep) in enumerate(zip(rows, chosen.keep, strict=True))
    ])  # fmt: skip


def count_in_row(keep: Tensor, length: int) -> Tensor:
    """``keep [G,K]``, counted in groups of ``length``, counted in all of them one after the other ``[G*K]``."""
    return torch.cat([own + group * length for group, own in enumerate(keep)])


def find_slots(prunable: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of a row's prunable tokens, and of all others, both ascending. ``prunable [L]`` bool."""
    return prunable.nonzero()[:, 0], (~prunable).nonzero()[:, 0]


def shorten(hidden: Tensor, prunable: Tensor, chosen: TokenMap) -> Shortened:
    """A row ``hidden [L,D]`` without the prunable tokens that were not chosen. Of a survivor that was mixed the slot
    is its own."""
    visual, _ = find_slots(prunable)
    groups = len(chosen.keep)
    kept = count_in_row(chosen.keep, len(visual) // groups)
    left = thin_rows(hidden[visual].reshape(groups, -1, hidden.shape[1]), chosen).reshape(-1, hidden.shape[1])
    made = dict(zip(visual[kept].tolist(), left, strict=True))
    slots = [slot for slot, goes in enumerate(prunable.tolist()) if slot in made or not goes]
    rows = torch.stack([made[slot] if slot in made else hidden[slot] for slot in slots])
    return Shortened(torch.tensor(slots), rows, torch.tensor([slot in made for slot in slots]), kept)


def number_blocks(image: Tensor) -> Tensor:
    """Of each slot ``[N]`` the number of the run of image tokens it is in, counted from 0; -1 in none."""
    numbers: list[int] = []
    run = -1
    for slot, inside in enumerate(image.tolist()):
        if inside and (slot == 0 or not image[slot - 1]):
            run += 1
        numbers.append(run if inside else -1)
    return torch.tensor(numbers)
