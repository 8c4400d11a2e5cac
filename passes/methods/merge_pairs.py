"""Token merging: selectors that pair tokens with survivors, and the merges that average what was paired.

The selectors return :class:`Selection` with ``assigned [G,N]``, which any of the merges reads. Survivors stay in
their original order; the authors put the unmerged sources first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from secateur.passes.methods.rows import unit_rows
from secateur.passes.methods.select import Selection
from secateur.runtime.errors import UserError

Side = Literal["even", "odd", "tower"]
"""Whose places the sources have. "tower" is settled when a recipe is planned: "odd" where the tower's row opens with
CLS, "even" where it does not."""


def bipartite_keys(keys: Tensor, k: int, sources: Side = "odd") -> Selection:
    """Bipartite soft matching (ToMe) by the cosine of ``keys [G,H,N,d]`` averaged over heads.

    Every other token is a source, the rest are destinations. Each source looks for its most similar destination (the
    first of equals); the N - k sources that found the most similar one join it. Destinations and the remaining
    sources survive. ``sources="odd"`` is ToMe's split of a sequence that opens with CLS, as the patches see it;
    ``"even"`` is the split of a sequence of patches alone, ``"tower"`` the one of the tower at hand.

    At most half of the tokens can go in one round. A smaller k takes several rounds of at most half each, in which
    the survivors so far are split anew and a survivor's metric is the mean over the tokens it stands for.
    """
    return _match_bipartite(keys.mean(dim=1), k, sources)


def bipartite_tokens(tokens: Tensor, k: int, sources: Side = "even") -> Selection:
    """The matching of :func:`bipartite_keys` by the cosine of ``tokens [G,N,D]`` themselves.

    So AIM merges the tokens of a frame before the decoder, in one round to N/2 and in another to N/4.
    """
    return _match_bipartite(tokens, k, sources)


def complete_graph_keys(keys: Tensor, score: Tensor, k: int) -> Selection:
    """Complete-graph soft matching (CrossGET) by the cosine of ``keys [G,H,N,d]`` averaged over heads.

    Any token may join any other. Tokens are ranked by their highest similarity, and each considers only those ranked
    behind it, so that no two wait for each other. The N - k tokens with the lowest ``score [G,N]`` (importance) minus
    highest similarity considered become sources; each joins its most similar token that is not a source.

    Two tokens nearest to each other always tie in rank: the lower index then comes first. The rank is counted, not
    sorted, because a sort may break ties as it likes.
    """
    groups, count = score.shape
    position = torch.arange(count, device=score.device)
    if k == count:
        everything = position.unsqueeze(0).expand(groups, count)
        return Selection(everything, assigned=everything)
    metric = unit_rows(keys.mean(dim=1))
    product = metric @ metric.transpose(1, 2)
    # Rounding may tell the two halves of the product apart, and the ties above depend on their being equal.
    alike = torch.where(position.unsqueeze(1) < position, product, product.transpose(1, 2))
    alike = torch.where(position.unsqueeze(1) == position, -math.inf, alike)
    highest = alike.amax(dim=2)
    mine, other = highest.unsqueeze(2), highest.unsqueeze(1)
    behind = (mine > other) | ((mine == other) & (position.unsqueeze(1) < position))
    considered = torch.where(behind, alike, -math.inf).amax(dim=2)
    sources = (considered - score).topk(count - k, dim=1).indices
    merged = torch.zeros_like(score).scatter(1, sources, 1.0)
    nearest = torch.where(merged.unsqueeze(1) > 0, -math.inf, alike).argmax(dim=2)
    keep, place = _close_ranks(merged, k)
    return Selection(keep, assigned=torch.where(merged > 0, place.gather(1, nearest), place))


def merge_assigned(selection: Selection, size: Tensor, average: Literal["size", "mean"] = "size") -> Tensor:
    """Each survivor becomes the average of itself and the tokens assigned to it, ``mix [G,k,N]``; rows sum to one.

    ``average="size"`` weighs every token by ``size [G,N]``, the number of patches it stands for (ToMe); ``"mean"``
    counts every token once (AIM, which keeps no sizes).
    """
    weighted = _read_pairs(selection) * (size if average == "size" else torch.ones_like(size)).unsqueeze(1)
    return weighted / weighted.sum(dim=2, keepdim=True)


def merge_by_importance(selection: Selection, size: Tensor, score: Tensor) -> Tensor:
    """CrossGET's average of a survivor d and the tokens s assigned to it, weighted by importance, ``mix [G,k,N]``.

    With p the softmax of ``score [G,N]`` over each pair (s, d), token s counts 2 p_s times and d counts
    1 + sum (2 p_d - 1) times, both times ``size [G,N]``; the whole is divided by the sizes' sum. Rows sum to one
    where the sizes are equal.
    """
    member = _read_pairs(selection)
    stays = (torch.arange(score.shape[1], device=score.device) == selection.keep.unsqueeze(-1)).to(torch.float32)
    own = (stays * score.unsqueeze(1)).sum(dim=2, keepdim=True)
    pull = member * 2.0 * torch.sigmoid(score.unsqueeze(1) - own)  # 1 for the survivor itself
    back = (member - pull).sum(dim=2, keepdim=True)
    sizes = size.unsqueeze(1)
    return (pull + stays * back) * sizes / (member * sizes).sum(dim=2, keepdim=True)


def _match_bipartite(metric: Tensor, k: int, sources: Side) -> Selection:
    """``metric [G,N,D]``; see :func:`bipartite_keys`."""
    groups, count, _ = metric.shape
    everything = torch.arange(count, device=metric.device).unsqueeze(0).expand(groups, count)
    keep, assigned, rows = everything, everything, metric
    while (length := keep.shape[1]) > k:
        survivors, place = _match_once(rows, max(k, length - length // 2), sources)
        keep, assigned = keep.gather(1, survivors), place.gather(1, assigned)
        if keep.shape[1] > k:
            member = _members(assigned, keep.shape[1])
            rows = (member @ metric) / member.sum(dim=2, keepdim=True)
    return Selection(keep, assigned=assigned)


def _match_once(metric: Tensor, k: int, sources: Side) -> tuple[Tensor, Tensor]:
    """One round: the survivors ``[G,k]`` of ``metric [G,N,D]`` and the place among them of every token ``[G,N]``."""
    groups, count, _ = metric.shape
    position = torch.arange(count, device=metric.device)
    first = 0 if sources == "even" else 1
    units = unit_rows(metric)
    alike = units[:, first::2] @ units[:, 1 - first :: 2].transpose(1, 2)
    closest = alike.amax(dim=2).topk(count - k, dim=1).indices
    merged = torch.zeros(groups, count, device=metric.device).scatter(1, closest * 2 + first, 1.0)
    source = position[first::2].unsqueeze(0).expand(groups, -1)
    destination = alike.argmax(dim=2) * 2 + 1 - first
    nearest = position.unsqueeze(0).expand(groups, count).scatter(1, source, destination)
    keep, place = _close_ranks(merged, k)
    return keep, torch.where(merged > 0, place.gather(1, nearest), place)


def _close_ranks(merged: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k tokens that are not ``merged [G,N]`` (1 or 0) in order, and the place each has among them, ``[G,N]``.

    The place of a merged token means nothing.
    """
    count = merged.shape[1]
    position = torch.arange(count, device=merged.device)
    keep = torch.where(merged > 0, count, position).topk(k, dim=1, largest=False, sorted=True).values
    place = (1.0 - merged).cumsum(dim=1) - 1.0
    return keep, place.clamp_min(0.0).to(torch.int64)


def _members(assigned: Tensor, k: int) -> Tensor:
    """``[G,k,N]`` float32: 1 where a token is assigned to the survivor."""
    survivor = torch.arange(k, device=assigned.device).unsqueeze(-1)
    return (assigned.unsqueeze(1) == survivor).to(torch.float32)


def _read_pairs(selection: Selection) -> Tensor:
    """``[G,k,N]``: which tokens each survivor stands for; refuses a selector that pairs nothing."""
    if selection.assigned is None:
        raise UserError("this merge needs a selector that pairs tokens", where="merge", available=sorted(SELECTORS))
    return _members(selection.assigned, selection.keep.shape[1])


SELECTORS: dict[str, Callable[..., Selection]] = {
    "bipartite_keys": bipartite_keys,
    "bipartite_tokens": bipartite_tokens,
    "complete_graph_keys": complete_graph_keys,
}
MERGES: dict[str, Callable[..., Tensor]] = {
    "merge_assigned": merge_assigned,
    "merge_by_importance": merge_by_importance,
}
