"""Rows of images of several sizes: each size is encoded by itself, and what comes out is laid in the prompt's order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from secateur.compiler.families.family import VisionFacts
from secateur.compiler.pruned import Job


def lay_images(facts: VisionFacts, parts: Sequence[Tensor]) -> Tensor:
    """``[m*K,...]`` of the m images of each size -> ``[F,...]`` of all images in the order of the prompt."""
    images = [part.reshape(size.frames, -1, *part.shape[1:]) for part, size in zip(parts, facts.sizes, strict=True)]
    return torch.cat([images[size][place] for size, place in facts.image_places])


def join_kept(job: Job, stage: int, parts: Sequence[Tensor]) -> Tensor:
    """What vision stage ``stage`` kept of each size's images -> indices into the tokens of all images."""
    facts, counts = job.source.vision, _entering(job, stage)
    own = [part - torch.arange(len(part)) // (len(part) // size.frames) * counts[number]
           for number, (part, size) in enumerate(zip(parts, facts.sizes, strict=True))]  # fmt: skip
    laid = [part.reshape(size.frames, -1) for part, size in zip(own, facts.sizes, strict=True)]
    starts = accumulate((counts[size] for size in facts.size_of), initial=0)
    return torch.cat([laid[s][place] + start for (s, place), start in zip(facts.image_places, starts, strict=False)])


def split_kept(job: Job, stage: int, kept: Tensor) -> list[Tensor]:
    """The other way round: one of each size."""
    facts, counts = job.source.vision, _entering(job, stage)
    starts = list(accumulate((counts[size] for size in facts.size_of), initial=0))
    found: list[list[Tensor]] = [[] for _ in facts.sizes]
    for image, (size, place) in enumerate(facts.image_places):
        own = kept[(kept >= starts[image]) & (kept < starts[image + 1])]
        found[size].append(own - starts[image] + place * counts[size])
    return [torch.cat(each) for each in found]


def _entering(job: Job, stage: int) -> list[int]:
    """Tokens of an image of each size that enter a stage."""
    return [size.vision_stages[stage].planned.length_in for size in job.sizes]
