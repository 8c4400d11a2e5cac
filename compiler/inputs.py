"""What two runs are compared on: rows of ids and pixels, drawn at random or read from a file of questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from secateur.runtime.errors import UserError
from secateur.runtime.manifest import Manifest
from secateur.runtime.processing import Processor


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
    """One row: unpadded ids with P placeholders an image, ``pixel_values [n,3,H,W]``, tokens to force on decode."""

    input_ids: Sequence[int]
    pixel_values: np.ndarray[Any, Any]
    forced_tokens: Sequence[int] = ()


def random_rows(manifest: Manifest, rows: int, new_tokens: int, seed: int) -> list[RowInput]:
    """Seeded rows of different length: random text around the images' placeholders, noise for pixels."""
    sizes, model = manifest.geometry, manifest.model
    rng = np.random.default_rng(seed)
    special = {model.image_token_id, model.pad_token_id, *model.eos_token_ids}
    words = np.array([t for t in range(model.vocab_size) if t not in special])
    items = []
    for _ in range(rows):
        count = int(rng.integers(min(2, sizes.text_tokens), sizes.text_tokens + 1))
        text = rng.choice(words, count).tolist()
        # An image may stand anywhere but last: the model answers the text behind it.
        cuts = sorted(int(rng.integers(0, count)) for _ in range(sizes.images))
        image = [model.image_token_id] * sizes.features_per_image
        ids = text[: cuts[0]]
        for start, end in zip(cuts, [*cuts[1:], count], strict=True):
            ids = ids + image + text[start:end]
        shape = (sizes.images, 3, sizes.image_height, sizes.image_width)
        steps = min(new_tokens, sizes.new_tokens)
        items.append(RowInput(ids, rng.standard_normal(shape).astype(np.float32), rng.choice(words, steps).tolist()))
    return items


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
            pixels = np.stack([processor.pixel_values(image) for image in question.images])
            items.append(RowInput(processor.encode(question.text), pixels))
        except UserError as error:
            raise UserError(str(error), where=question.where) from None
    return items


def respace(item: RowInput, image_token: int, before: int, after: int) -> RowInput:
    """The row with ``after`` placeholders an image instead of ``before``: for a run that prunes otherwise."""
    ids: list[int] = []
    at = 0
    while at < len(item.input_ids):
        image = item.input_ids[at] == image_token
        ids += [image_token] * after if image else [item.input_ids[at]]
        at += before if image else 1
    return replace(item, input_ids=ids)


def batches(items: Sequence[RowInput], size: int) -> Iterable[list[RowInput]]:
    """Batches of exactly ``size``; the last one is filled up with the first rows."""
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        while len(chunk) < size:
            chunk += items[: size - len(chunk)]
        yield chunk
