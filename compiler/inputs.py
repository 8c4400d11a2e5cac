"""What two runs are compared on: rows of ids and pixels, drawn at random or read from a file of questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from secateur.runtime.errors import UserError
from secateur.runtime.manifest import Manifest
from secateur.runtime.processing import Processor, RowMedia
from secateur.runtime.sizes import size_text

ROOM = 4 << 30
"""Bytes of random rows that are held at once."""


class Asked(Protocol):
    """A question about images; ``where`` is for error messages."""

    @property
    def images(self) -> Sequence[Any]: ...
    @property
    def text(self) -> str: ...
    @property
    def where(self) -> str: ...


@dataclass(frozen=True)
class RowInput:
    """One row: unpadded ids with P placeholders an image, ``pixel_values [n,3,H,W]`` or what the tower reads, tokens to
    force on decode, ``input_features`` of its sound."""

    input_ids: Sequence[int]
    pixel_values: np.ndarray[Any, Any]
    forced_tokens: Sequence[int] = ()
    input_features: np.ndarray[Any, Any] | None = None


def random_rows(manifest: Manifest, rows: int, new_tokens: int, seed: int) -> list[RowInput]:
    """Seeded rows of different length: random text around the images' placeholders, noise for pixels.

    Raises UserError for more rows than :data:`ROOM` holds.
    """
    sizes, model = manifest.geometry, manifest.model
    rng = np.random.default_rng(seed)
    special = {model.image_token_id, model.pad_token_id, *model.eos_token_ids}
    special |= {token for item in list_placed(manifest) for token in item}
    if manifest.media is not None:  # transformers would take them for media of their own
        special |= {token for token in (model.video_token_id, model.audio_token_id) if token is not None}
    shapes: dict[str, tuple[int, ...]] = {"pixel_values": (sizes.images, 3, sizes.image_height, sizes.image_width)}
    if "vision" in manifest.programs:
        inputs = manifest.programs["vision"].inputs
        shapes = {port.name: (port.shape[0] // sizes.batch, *port.shape[1:]) for port in inputs}
    if (taken := rows * sum(4 * math.prod(shape) for shape in shapes.values())) > ROOM:
        raise UserError(f"{rows} random rows take {size_text(taken)} of memory", fix=f"ask for {ROOM * rows // taken}")
    words = np.array([t for t in range(model.vocab_size) if t not in special])
    items = []
    for _ in range(rows):
        room = sizes.text_tokens - sum(t != model.image_token_id for item in list_placed(manifest) for t in item)
        count = int(rng.integers(min(2, room), room + 1))
        text = rng.choice(words, count).tolist()
        # An image may stand anywhere but last: the model answers the text behind it.
        placed = list_placed(manifest)
        cuts = sorted(int(rng.integers(0, count)) for _ in placed)
        ids = text[: cuts[0]]
        for item, start, end in zip(placed, cuts, [*cuts[1:], count], strict=True):
            ids = ids + item + text[start:end]
        read = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        forced = rng.choice(words, min(new_tokens, sizes.new_tokens)).tolist()
        items.append(RowInput(ids, read["pixel_values"], forced, read.get("input_features")))
    return items


def list_placed(manifest: Manifest) -> list[list[int]]:
    """The tokens of every item of a row's media, with the marks around it that position ids depend on."""
    token, sizes, media = manifest.model.image_token_id, manifest.geometry, manifest.media
    if media is None:
        return [sizes.place(token, [], []) for _ in range(sizes.images)]
    found = []
    for item in media.items:
        before, behind = media.around.get(item.kind, ([], []))
        if item.kind == "video with sound":
            before, behind = [*before, *media.sound_before], [*media.sound_behind, *behind]
        found.append([*before, *[token] * item.tokens, *behind])
    return found


def question_rows(processor: Processor, images: int, questions: Sequence[Asked]) -> list[RowInput]:
    """Questions as a bundle with this processor takes them; each must show ``images`` images."""
    items = []
    for question in questions:
        if len(question.images) != images:
            raise UserError(
                f"{len(question.images)} image(s), the comparison is for {images} per row",
                where=question.where,
                fix=f"give --images {len(question.images)} if every question has as many",
            )
        try:
            read = processor.tower_input(RowMedia(question.images))
            items.append(RowInput(processor.encode(question.text), read.pixel_values))
        except UserError as error:
            raise UserError(str(error), where=question.where) from None
    return items


def respace(item: RowInput, image_token: int, before: Sequence[int], after: Sequence[int]) -> RowInput:
    """The row with ``after`` placeholders an image instead of ``before``: for a run that prunes otherwise. There are
    as many numbers as images, or one for all of them."""
    ids: list[int] = []
    at = image = 0
    while at < len(item.input_ids):
        if item.input_ids[at] != image_token:
            ids.append(item.input_ids[at])
            at += 1
            continue
        place = image % len(before)
        ids += [image_token] * after[place]
        at, image = at + before[place], image + 1
    return replace(item, input_ids=ids)


def batches(items: Sequence[RowInput], size: int) -> Iterable[list[RowInput]]:
    """Batches of exactly ``size``; the last one is filled up with the first rows."""
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        while len(chunk) < size:
            chunk += items[: size - len(chunk)]
        yield chunk
