"""Which of a bundle's geometries a prompt runs in: the smallest that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from secateur.runtime.errors import MisfitError, UserError
from secateur.runtime.processing import Prompt, images_in_messages
from secateur.runtime.schema import Manifest

T = TypeVar("T")


def pick(
    geometries: Sequence[Manifest], order: Sequence[int], fit: Callable[[int], T], asked: Callable[[], str]
) -> tuple[int, T]:
    """The first geometry of ``order`` that ``fit`` takes, and what ``fit`` made of it.

    ``fit`` raises UserError for what a geometry does not take; ``asked`` says in words what was asked.
    Raises the error of the only geometry, an error that is no matter of geometry, or one that lists the geometries
    with the reason why each does not fit.
    """
    refused: dict[int, UserError] = {}
    for index in order:
        try:
            return index, fit(index)
        except UserError as error:
            refused[index] = error
    other = next((error for error in refused.values() if not isinstance(error, MisfitError)), None)
    if other is not None or len(refused) == 1:
        raise other or refused[order[0]]
    raise MisfitError(
        f"no compiled geometry fits {asked()}",
        available=(f"{geometries[index].geometry.words}: {refused[index]}" for index in sorted(refused)),
    )


def order_by_size(geometries: Sequence[Manifest], rows: Iterable[Sequence[Any]]) -> list[int]:
    """Indices of the geometries, those with the fewest FLOPs up to the first token first.

    Where they differ in the size of images, those come first that lose nothing of any image of ``rows``, of equals the
    one nearest to their shape; behind them the others, the largest first.
    """
    sizes = [(one.geometry.image_height, one.geometry.image_width) for one in geometries]
    seen = [size for row in rows for image in row if (size := _size(image)) is not None] if len(set(sizes)) > 1 else []

    def key(index: int) -> tuple[bool, int, int, float, int]:
        height, width = sizes[index]
        smaller = any(h * w > height * width for h, w in seen)
        programs = geometries[index].programs
        flops = programs["vision"].flops + programs["prefill"].flops
        stretch = sum(abs(math.log(h / w * width / height)) for h, w in seen)
        return smaller, -height * width if smaller else 0, flops, stretch, index

    return sorted(range(len(geometries)), key=key)


def images_of(prompts: Sequence[Prompt], images: Sequence[Sequence[Any]] | None) -> list[list[Any]]:
    """The images of every row: those given, or those that messages carry."""
    if images is not None:
        return [list(row) for row in images]
    return [images_in_messages(prompt) if isinstance(prompt, (list, tuple)) else [] for prompt in prompts]


def describe_asked(prompts: Sequence[Prompt], images: Sequence[Sequence[Any]] | None, new_tokens: int | None) -> str:
    """What was asked, for an error's text."""
    rows = images_of(prompts, images)
    counts = sorted({len(row) for row in rows})
    text = f"{len(prompts)} prompt(s) with {' or '.join(map(str, counts)) or 'no'} image(s)"
    return text if new_tokens is None else f"{text} and {new_tokens} new tokens"


def _size(image: Any) -> tuple[int, int] | None:
    """Height and width without decoding; None for what is no image, which the processor will say."""
    try:
        if isinstance(image, Image.Image):
            return image.height, image.width
        if isinstance(image, np.ndarray):
            return int(image.shape[0]), int(image.shape[1])
        with Image.open(image) as opened:
            return opened.height, opened.width
    except (OSError, ValueError, TypeError, AttributeError, IndexError, Image.DecompressionBombError):
        return None
