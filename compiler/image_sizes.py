"""Rows of images of several sizes: each size is encoded by itself, and what comes out is laid in the prompt's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.compiler.families.family import VisionFacts
from secateur.compiler.prompt_order import from_prompt, to_prompt
from secateur.compiler.pruned import Job
from secateur.compiler.recording import Record

if TYPE_CHECKING:
    from secateur.compiler.oracle import Oracle, RowRun


def encode_sizes(
    oracle: Oracle, pixel_values: Tensor, row: RowRun, forced: Mapping[str, Tensor], record: Record
) -> Tensor:
    """The oracle's features ``[F,D]`` of a row, images of one size at a time; what is seen goes to ``row``."""
    job, facts = oracle.job, oracle.job.source.vision
    entering = pixel_values.split([image.input_shape[0] // image.frames for image in facts.images])
    given = {
        name: split_kept(job, index, from_prompt(job, index, forced[name]))
        for index, name in enumerate(stage.planned.name for stage in job.vision_stages) if name in forced
    }  # fmt: skip
    carried, features = [], []
    for size, one in enumerate(job.sizes):
        part, found = type(oracle)(one, oracle.model), type(row)()
        part.keep_signals, part.carries = oracle.keep_signals, oracle.carries
        pixels = torch.cat([image for image, own in zip(entering, facts.size_of, strict=True) if own == size])
        features.append(part.encode(pixels, found, {name: kept[size] for name, kept in given.items()}, record))
        carried.append(part.carried)
        row.sizes.append(found)
    for index, stage in enumerate(job.vision_stages):
        name = stage.planned.name
        if not stage.planned.observes:
            kept = join_kept(job, index, [found.kept[name] for found in row.sizes])
            row.kept[name] = to_prompt(job, index, kept)
    row.planes = [lay_images(facts, planes) for planes in zip(*(found.planes for found in row.sizes), strict=True)]
    if oracle.carries:
        oracle.carried = lay_images(facts, [told[0] for told in carried if told is not None])[None]
    return lay_images(facts, features)


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
