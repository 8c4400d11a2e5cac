"""How the prunable tokens of a group lie, known before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Grid(NamedTuple):
    """How the tokens of a group lie while all of them are there: ``N = frames * rows * columns``, frame by frame and
    row by row. Images of a prompt are frames."""

    frames: int
    rows: int
    columns: int


class Layout(NamedTuple):
    """Of every prunable token of a group that enters its program: its moment and its kind. The signal ``source``
    points into it, so that it serves stages as well that come after others have removed tokens.

    ``frames`` counts moments from 0 on: images of a prompt, temporal grids of a video; of a sound the temporal grid it
    is heard with, or the image it is put beside. ``modalities`` is 0 for vision tokens and 1 for audio tokens.
    """

    frames: tuple[int, ...]
    modalities: tuple[int, ...]

    @classmethod
    def of_images(cls, images: int, tokens_per_image: int) -> Layout:
        return cls.of_counts([tokens_per_image] * images)

    @classmethod
    def of_counts(cls, counts: Sequence[int]) -> Layout:
        """Of images with so many tokens each."""
        frames = tuple(image for image, count in enumerate(counts) for _ in range(count))
        return cls(frames, (0,) * len(frames))

    def cells(self, frames: int) -> tuple[tuple[int, ...], int]:
        """Of every token, ``window * kinds + modality``, where ``frames`` moments one after the other are a window;
        and the number of kinds."""
        kinds = max(self.modalities) + 1
        return tuple(f // frames * kinds + m for f, m in zip(self.frames, self.modalities, strict=True)), kinds


def share_out(weights: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """``total`` in whole parts in proportion to ``weights`` (positive), none above ``most``, which sum to ``total`` at
    least: by largest remainder, ties by place. No part is 0 while another can spare one."""
    full: dict[int, int] = {}
    while True:
        left = total - sum(full.values())
        whole = sum(weight for i, weight in enumerate(weights) if i not in full)
        due = {i: left * weight / whole for i, weight in enumerate(weights) if i not in full}
        if not (over := [i for i, part in due.items() if part > most[i]]):
            break
        full |= {i: most[i] for i in over}
    parts = [full[i] if i in full else int(due[i]) for i in range(len(weights))]
    by_remainder = sorted(due, key=lambda i: parts[i] - due[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    for i in range(len(parts)):
        if parts[i] == 0 < most[i] and max(parts) > 1:
            parts[parts.index(max(parts))] -= 1
            parts[i] = 1
    return parts
