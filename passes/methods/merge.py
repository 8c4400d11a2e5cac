"""Merges: how the tokens that go are folded into the ones that stay, ``mix [G,k,N]`` float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from secateur.passes.methods.rows import take_rows, unit_rows
from secateur.passes.methods.select import Selection


def nearest_target(selection: Selection, keys: Tensor, average: Literal["assigned", "all"] = "assigned") -> Tensor:
    """Fold each dropped token into the target whose key is most similar, ``mix [G,k,N]``.

    Similarity is the cosine of ``keys [G,H,N,d]`` averaged over heads. Of equally similar targets the first wins.

    ``average="assigned"`` is VisionZip's published code: target + mean of the tokens assigned to it, so the row sums
    to two. ``"all"`` is the mean of target and assigned tokens, so every row sums to one. Survivors that are no
    targets, and targets to which nothing is assigned, stay as they are (their row is one-hot).
    """
    count = keys.shape[2]
    keep = selection.keep
    metric = unit_rows(keys.mean(dim=1))
    alike = take_rows(metric, keep) @ metric.transpose(1, 2)
    if selection.targets is None:
        target = torch.ones_like(alike[:, :, :1])
    else:
        target = selection.targets.unsqueeze(-1).to(alike.dtype)
        alike = torch.where(selection.targets.unsqueeze(-1), alike, -2.0)  # below any cosine
    nearest = alike.argmax(dim=1)

    source = torch.arange(count, device=keys.device)
    survivor = torch.arange(keep.shape[1], device=keys.device).unsqueeze(-1)
    stays = (source == keep.unsqueeze(-1)).to(alike.dtype)
    dropped = 1.0 - stays.sum(dim=1, keepdim=True)
    # ``target`` matters when no survivor is one: argmax then names the first row, which must stay as it is.
    assigned = (survivor == nearest.unsqueeze(1)).to(alike.dtype) * dropped * target
    number = assigned.sum(dim=-1, keepdim=True)
    if average == "all":
        return (stays + assigned) / (1.0 + number)
    return stays + assigned / number.clamp_min(1.0)


MERGES: dict[str, Callable[..., Tensor]] = {"nearest_target": nearest_target}
