"""What stages of the vision side keep, counted as a bundle with sound counts it, and the other way round."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.compiler.pruned import Job


def to_prompt(job: Job, index: int, kept: Tensor) -> Tensor:
    """What vision stage ``index`` kept, counted as a bundle with sound counts it (passes/join_encoders.py)."""
    if job.source.audio is None or job.source.media is None or job.vision_stages[index].planned.observes:
        return kept
    before, after = _orders(job, index)
    seen = len(before) - job.source.audio_tokens
    left = len(kept)
    return torch.tensor([before.index(int(kept[token]) if token < left else seen + token - left) for token in after])


def from_prompt(job: Job, index: int, kept: Tensor) -> Tensor:
    """The other way round."""
    if job.source.audio is None or job.source.media is None:
        return kept
    before, _ = _orders(job, index)
    seen = len(before) - job.source.audio_tokens
    return torch.tensor([token for token in (before[int(place)] for place in kept) if token < seen])


def _orders(job: Job, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    planned, media = job.vision_stages[index].planned, job.source.media
    assert media is not None
    whole = job.source.vision.tokens_per_image
    return media.order(whole, planned.length_in), media.order(whole, planned.length_out)
