"""Quotas made static: scores that put the tokens a quota picks before all others, and selectors of two parts.

A paper that gives every window, chunk or tile its own number of tokens ends with a total the data decides. Here the
picks are lifted above the rest of the ranking instead, and one top-k of exactly k tokens follows: when the quotas come
to fewer than k, the best of the others fill up. Windows, chunks and quotas that do not depend on the data are fixed
when the function is traced, from the grid and k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from secateur.compiler.layout import Grid
from secateur.passes.methods.rows import prefer, take_rows, unit_rows
from secateur.passes.methods.select import Selection

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


def top_mask(score: Tensor, count: int) -> Tensor:
    """1 for the ``count`` highest of ``score [G,N]``, else 0; float32."""
    mask = torch.zeros_like(score)
    return mask if count == 0 else mask.scatter(1, score.topk(count, dim=1).indices, 1.0)


def rank_within(score: Tensor, part: Sequence[int]) -> Tensor:
    """How many tokens of the same ``part`` (N numbers) go before each of ``score [G,N]``; ties by index. float32.

    Tokens are compared within their part alone, so many small parts cost less than one large one.
    """
    parts = Parts(part)
    inside = parts.gather(score.unsqueeze(-1)).squeeze(-1)
    inside = torch.where(parts.there, inside, -torch.inf)
    behind, ahead = inside.unsqueeze(-1), inside.unsqueeze(-2)
    place = torch.arange(inside.shape[-1], device=score.device)
    before = (ahead > behind) | ((ahead == behind) & (place < place.unsqueeze(1)))
    return before.to(torch.float32).sum(dim=-1).flatten(1).index_select(1, parts.back)


def windows_first(scores: tuple[Tensor, ...], k: int, grid: Grid, side: Count = 6, share: Share = 0.5) -> Tensor:
    """VScan: equally many tokens of every window by the first of ``scores`` (each [G,N]), the others by the second.

    Of W windows each gives floor(floor(share * k) / W). A grid of R rows has round(R / side) rows of windows (halves
    up, at least one), as even as they come; columns likewise.
    """
    local, everywhere = scores
    part = grid_parts(grid, *(max(1, int(length / side + 0.5)) for length in (grid.rows, grid.columns)))
    quota = int(share * k) // len(set(part))
    return prefer(everywhere, (rank_within(local, part) < quota).to(everywhere.dtype))


def tiles_first(
    scores: tuple[Tensor, ...], k: int, grid: Grid, alpha: Share = 0.5, rows: Count = 2, columns: Count = 2
) -> Tensor:
    """HiRED: floor(alpha * k) of all tokens by the second of ``scores`` (each [G,N]), the others spread over tiles.

    The k - floor(alpha * k) others are shared out to ``rows`` x ``columns`` tiles in proportion to how many of the
    floor((1 - alpha) * N) tokens highest in the first of ``scores`` lie in each, rounded down; a tile gives those of
    its tokens, not chosen yet, that are highest in the second.
    """
    spread, content = scores
    whole = int(alpha * k)
    part = grid_parts(grid, min(rows, grid.rows), min(columns, grid.columns))
    chosen = top_mask(content, whole)
    members = _members(part, content)
    counted = max(1, int((1.0 - alpha) * content.shape[1]))
    quota = top_mask(spread, counted) @ members * (k - whole) / counted
    # Converting to integers rounds towards zero.
    quota = quota.to(torch.int64).to(content.dtype) @ members.transpose(0, 1)
    others = torch.where(chosen > 0, -torch.inf, content)
    fresh = (rank_within(others, part) < quota).to(content.dtype) * (1.0 - chosen)
    return prefer(content, chosen + fresh)


def anchors_first(scores: tuple[Tensor, ...], k: int, grid: Grid, alpha: Share = 0.1) -> Tensor:
    """HiPrune: round(k * alpha / 5) anchors by the first of ``scores`` (each [G,N]) and the four tokens around each
    come before all others; every group is ordered by the second.

    Python rounds halves to even. As in the authors' code the tokens around are those one place and one row of the grid
    before and behind: they run on over the ends of a row, and what falls off the grid is its first or last token.
    """
    objects, content = scores
    number = round(k * alpha / 5)
    mask = torch.zeros_like(content)
    if number > 0:
        anchors = objects.topk(number, dim=1).indices
        for step in (0, -1, 1, -grid.columns, grid.columns):
            mask = mask.scatter(1, (anchors + step).clamp(0, content.shape[1] - 1), 1.0)
    return prefer(content, mask)


def chunks_first(score: Tensor, tokens: Tensor, k: int, chunks: Count = 16, variance: float = 0.09) -> Tensor:
    """HoloV: shares k out to contiguous chunks of the sequence; a chunk gives its tokens highest in ``score [G,N]``.

    A chunk's weight is the mean over its tokens of 1000 * score + variance * s * v. Of a token, v is the mean square
    deviation of its cosines to the chunk's other ``tokens [G,N,D]`` from their mean, counting its own as zero and
    dividing by the number of others; s makes both terms equally large in the chunk. Of k, a chunk gets its part in
    proportion to its weight, rounded down, and the heaviest chunks get one more each until all are given out.

    The first N mod ``chunks`` chunks are one token longer. In a chunk of one token v is zero.
    """
    count = score.shape[1]
    chunks = min(chunks, count)
    sizes = [count // chunks + (index < count % chunks) for index in range(chunks)]
    part = [index for index, size in enumerate(sizes) for _ in range(size)]
    members, parts = _members(part, score), Parts(part)
    unit = parts.gather(unit_rows(tokens))
    place = torch.arange(unit.shape[2], device=score.device)
    pairs = parts.there.unsqueeze(1) & parts.there.unsqueeze(2) & (place == place.unsqueeze(1)).logical_not()
    alike = unit @ unit.transpose(2, 3) * pairs.to(score.dtype)
    others = (members.sum(dim=0) - 1.0).clamp_min(1.0).unsqueeze(1)
    mean = alike.sum(dim=3) / others
    deviation = (alike - mean.unsqueeze(3)) * parts.there.unsqueeze(1).to(score.dtype)
    spread = ((deviation * deviation).sum(dim=3) / others).flatten(1).index_select(1, parts.back)
    attention = 1000.0 * score

    # The two 1e-6 are the authors'.
    average = members / members.sum(dim=0)
    mean_spread = spread @ average
    scale = (attention.abs() @ average) / (mean_spread + 1e-6)
    weight = attention @ average + variance * mean_spread * scale
    part_of_k = weight / (weight.sum(dim=1, keepdim=True) + 1e-6)
    given = (part_of_k * k).to(torch.int64).to(score.dtype)  # rounds towards zero
    left = k - given.sum(dim=1, keepdim=True)
    given = given + (rank_within(part_of_k, [0] * chunks) < left).to(score.dtype)
    quota = given @ members.transpose(0, 1)
    return prefer(score, (rank_within(score, part) < quota).to(score.dtype))


def grid_first(score: Tensor, k: int, attention: Share = 0.25) -> Tensor:
    """PruMerge+: a part of the k - 1 places goes to the highest of ``score [G,N]``, the others to an even grid.

    a = round(attention * (k - 1)), halves up, of ``score`` come first; the c = k - 1 - a tokens floor(i * N / c) come
    next; a place whose token has been chosen by score goes to the next by score.
    """
    count = score.shape[1]
    ranked = int(attention * (k - 1) + 0.5)
    places = k - 1 - ranked
    spread = {index * count // places for index in range(places)}
    even = [float(index in spread) for index in range(count)]
    chosen = top_mask(score, ranked)
    return prefer(score, 2.0 * chosen + torch.tensor(even, device=score.device) * (1.0 - chosen))


def distinct(score: Tensor, tokens: Tensor, k: int, important: Share = 0.5, step: Count = 8) -> Selection:
    """VisPruner: the floor(important * k) highest of ``score [G,N]``, and of the rest what is left after pruning the
    tokens most similar to others, ``step`` at a time.

    The rest starts in descending order of score. A round compares each token at an even place with all at odd places
    (cosine of ``tokens [G,N,D]``) and drops the ``step`` whose greatest similarity is highest, fewer where that would
    be too many. The even ones left, most similar first, then the odd ones, are the order of the next round.

    How many are left after each round is known when the function is traced; so is which place of a round's order the
    next round's places are taken from. All rounds are one scan over these places.
    """
    groups, count = score.shape
    first = int(important * k)
    order = score.argsort(dim=1, descending=True, stable=True)
    rest, left = order[:, first:], k - first
    if left == 0 or left == count - first:
        kept = order[:, :first] if left == 0 else order
        return Selection(kept.sort(dim=1).values)
    lengths, places = _plan_rounds(count - first, left, step)
    unit = take_rows(unit_rows(tokens.detach()), rest)
    size = count - first
    evens = (size + 1) // 2
    rows = (unit @ unit.transpose(1, 2)).reshape(groups * size, size)
    offset = (torch.arange(groups, device=score.device) * size).unsqueeze(1)
    start = torch.arange(size, device=score.device).unsqueeze(0).expand(groups, size).clone()

    def drop_similar(
        state: Tensor, length: Tensor, places: Tensor, rows: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        even, odd = state[:, ::2], state[:, 1::2]
        there = (torch.arange(size, device=state.device) < length).unsqueeze(0).expand(groups, size)
        # Only tokens at odd places may be the nearest: all others are put infinitely far.
        far = torch.full((groups, size), -torch.inf, device=state.device)
        far = far.scatter(1, odd, torch.where(there[:, 1::2], 0.0, -torch.inf))
        alike = rows.index_select(0, (even + offset).reshape(groups * evens)).reshape(groups, evens, size)
        nearest = torch.where(there[:, ::2], (alike + far.unsqueeze(1)).amax(dim=2), -torch.inf)
        ranked = even.gather(1, nearest.argsort(dim=1, descending=True, stable=True))
        after = torch.cat([ranked, odd], dim=1).gather(1, places.unsqueeze(0).expand(groups, size))
        return after, length.clone()

    steps = [torch.tensor(lengths, device=score.device).unsqueeze(1), torch.tensor(places, device=score.device)]
    state, _ = scan_op(drop_similar, [start], steps, additional_inputs=(rows, offset))
    kept = torch.cat([order[:, :first], rest.gather(1, state[:, :left])], dim=1)
    return Selection(kept.sort(dim=1).values)


def _plan_rounds(size: int, left: int, step: int) -> tuple[list[int], list[list[int]]]:
    """Of every round: how many tokens enter it, and for each of ``size`` places afterwards the place it is taken from
    in [even places by similarity, odd places]. The tokens that are dropped follow the ones that are left."""
    lengths, places, length, evens = [], [], size, (size + 1) // 2
    while length > left:
        drop = min(step, length - left, length // 2)
        there = list(range(drop, (length + 1) // 2)) + list(range(evens, evens + length // 2))
        lengths.append(length)
        places.append(there + sorted(set(range(size)) - set(there)))
        length -= drop
    return lengths, places


def grid_parts(grid: Grid, rows: int, columns: int) -> list[int]:
    """For every token of ``grid`` which of ``rows`` x ``columns`` windows of its frame it lies in."""
    return [
        (frame * rows + row * rows // grid.rows) * columns + column * columns // grid.columns
        for frame in range(grid.frames)
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]


class Parts:
    """Tokens by part, ``[P,S]`` for P parts of at most S tokens: to compare those of a part with each other alone.

    ``there [P,S]`` bool marks real places, ``tokens [P,S]`` says whose they are, ``back [N]`` is each token's place in
    the flattened layout.
    """

    def __init__(self, part: Sequence[int]) -> None:
        inside: list[list[int]] = [[] for _ in range(max(part) + 1)]
        for token, number in enumerate(part):
            inside[number].append(token)
        size = max(map(len, inside))
        place = {token: number * size + at for number, row in enumerate(inside) for at, token in enumerate(row)}
        self._shape = (len(inside), size)
        self.tokens = torch.tensor([row + [0] * (size - len(row)) for row in inside])
        self.there = torch.tensor([[at < len(row) for at in range(size)] for row in inside])
        self.back = torch.tensor([place[token] for token in range(len(part))])

    def gather(self, rows: Tensor) -> Tensor:
        """``rows [G,N,D]`` as ``[G,P,S,D]``; places that are not real hold token 0."""
        return rows.index_select(1, self.tokens.flatten()).reshape(rows.shape[0], *self._shape, rows.shape[2])


def _members(part: Sequence[int], like: Tensor) -> Tensor:
    """``[N,P]``: 1 where a token belongs to a part."""
    numbers = torch.arange(max(part) + 1, device=like.device)
    return (torch.tensor(part, device=like.device).unsqueeze(1) == numbers).to(like.dtype)


SCORES: dict[str, Callable[..., Tensor]] = {
    "anchors_first": anchors_first,
    "chunks_first": chunks_first,
    "grid_first": grid_first,
    "tiles_first": tiles_first,
    "windows_first": windows_first,
}
SELECTORS: dict[str, Callable[..., Selection]] = {"distinct": distinct}
