"""An image that was cut into tiles and put together again: what each of its tokens has, and where the rows between
lines stand among the tokens that are left.

A row behind a line has no token of its own, so no stage can score it: it always stays. How many rows an image has is
then known beforehand, whichever of its tokens are chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.compiler.families.family import Tiles, VisionFacts
from secateur.compiler.pooled import Picture, Pooled
from secateur.passes.signals import find_prunable
from secateur.passes.units import mean_units, sum_units


class TileMap(NamedTuple):
    """From numbers per token of each grid to numbers per token of the image that ``tiles`` grids show. ``places`` are
    the image's tokens, in the order of the prompt, among those of its grids; padding is none of them. Where the
    ``picture`` behind its ``first`` tokens is resized, these are what they were before."""

    tiles: int
    places: tuple[int, ...]
    first: int = 0
    picture: Picture | None = None

    @classmethod
    def of(cls, facts: VisionFacts) -> TileMap | None:
        """None where a grid stays a grid."""
        if facts.tiles is None:
            return None
        first, picture = facts.tokens_per_image, facts.tiles.picture
        if picture is not None:
            return cls(facts.grids_per_item, (*range(first), *picture.places), first, picture)
        return cls(facts.grids_per_item, tuple(place for place in facts.tiles.order if place >= 0))

    def join(self, values: Tensor, dim: int, paid: bool = False) -> Tensor:
        """``[n*tiles,...,P,...]`` with a grid's tokens at ``dim`` -> ``[n,...,N,...]``. What is ``paid`` to the
        tokens of a picture that is resized is shared out, anything else becomes a mean."""
        split = values.reshape(values.shape[0] // self.tiles, self.tiles, *values.shape[1:])
        beside = split.permute(0, *range(2, dim + 1), 1, *range(dim + 1, split.dim()))
        whole = beside.reshape(*beside.shape[:dim], -1, *beside.shape[dim + 2 :])
        picked = whole.index_select(dim, torch.tensor(self.places))
        if self.picture is None:
            return picked
        before, after = self.picture.before, self.picture.after
        small, large = picked.split((self.first, before[0] * before[1]), dim)
        resize = sum_units if paid else mean_units
        return torch.cat((small, resize(large, after, Pooled(before), dim)), dim)


class Placed(NamedTuple):
    """The rows of an image in the order of the prompt: ``slots [G,R]`` among those of the whole image, ``source [G,R]``
    which of its K tokens each is, or K for the row behind a line, and ``tokens [G,R]`` bool, which are tokens."""

    slots: Tensor
    source: Tensor
    tokens: Tensor


def place_survivors(kept: Tensor, tiles: Tiles) -> Placed:
    """``kept [G,K]``: the tokens left of each image, ascending, counted in the image."""
    groups, count = kept.shape
    total = len(tiles.order)
    own = torch.tensor([slot for slot, place in enumerate(tiles.order) if place >= 0])
    line_ends = torch.tensor([int(place < 0) for place in tiles.order])
    at = own.index_select(0, kept.reshape(-1)).reshape(groups, count)
    stays = line_ends.expand(groups, total).scatter(1, at, 1) > 0
    slots = find_prunable(stays, count + total - own.shape[0])
    tokens = line_ends.index_select(0, slots.reshape(-1)).reshape(slots.shape) == 0
    rank = torch.cumsum(tokens.to(torch.int64), 1) - 1
    return Placed(slots, torch.where(tokens, rank, count), tokens)


def count_in_images(kept: Tensor, images: int, tokens: int) -> Tensor:
    """``kept [B,n*K]``, counted in the row, of images of ``tokens`` each -> ``[B*n,K]``, counted in the image."""
    split = kept.reshape(kept.shape[0], images, -1) - torch.arange(images)[:, None] * tokens
    return split.reshape(kept.shape[0] * images, -1)
