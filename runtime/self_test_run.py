"""What a machine makes of a self-test's rows: levels, pixels and sound by the processor files, then the programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.processing import Processor
from secateur.runtime.request import Request
from secateur.runtime.row_media import RowMedia
from secateur.runtime.schema_self_test import MediaFiles, Row
from secateur.runtime.tower_inputs import TowerInput

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """What the vision program reads of all rows, and the levels that ``pixel_values`` are made of. ``times`` are each
    row's, of the frames of a video."""

    levels: NDArray[np.uint8]
    pixel_values: Floats
    input_features: Floats | None
    times: list[Sequence[float]]


@dataclass(frozen=True)
class Ran:
    """What the programs gave. ``tokens [B][T]`` are the likeliest of every step's ``logits [B, vocab]``."""

    features: Floats
    survivors: dict[str, Ints]
    tokens: list[list[int]]
    logits: list[Floats]


def see(processor: Processor, rows: Sequence[MediaFiles], directory: Path) -> Seen:
    """Media of all rows through the processor files. Raises :class:`UserError` for what those refuse."""
    levels, read = [], list[TowerInput]()
    quiet, bare = processor.tower_inputs.quiet(), processor.tower_inputs.unnormalized()
    for number, row in enumerate(rows):
        media = RowMedia(
            [directory / file for file in row.images],
            [[directory / file for file in row.video]] if row.video else [],
            [directory / file for file in row.audio],
            row.video_fps,
        )
        processor.expect(media.kinds, f"row {number}")
        read.append(quiet(media))
        levels.append(bare(media).pixel_values.astype(np.uint8))
    heard = [one.input_features for one in read if one.input_features is not None]
    return Seen(
        np.concatenate(levels),
        np.concatenate([one.pixel_values for one in read]),
        np.concatenate(heard) if heard else None,
        [one.times for one in read],
    )


def run_programs(request: Request, rows: Sequence[Row], seen: Seen, forced: Sequence[Sequence[int]] | int) -> Ran:
    """Vision, prefill and decode of ``forced`` tokens ``[B][T]``, or of as many as it says, each the likeliest.

    The last token is not decoded. The ids are the rows' own.
    """
    sizes = request.manifest.geometry
    ids = np.full((sizes.batch, sizes.sequence), request.manifest.model.pad_token_id, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
    features = request.encode(seen.pixel_values, seen.input_features)
    logits = [request.prefill(ids, np.array([len(row.ids) for row in rows], dtype=np.int64))]
    survivors = request.kept
    steps = forced if isinstance(forced, int) else len(forced[0])
    for step in range(steps - 1):
        chosen = logits[-1].argmax(axis=-1) if isinstance(forced, int) else np.array([row[step] for row in forced])
        logits.append(request.decode(chosen.astype(np.int64)))
    tokens = np.stack([each.argmax(axis=-1) for each in logits], axis=1)
    return Ran(features, survivors, tokens.tolist(), logits)
