"""Which of a bundle's geometries a prompt runs in: the smallest that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from secateur.runtime.errors import MisfitError, UserError
from secateur.runtime.pictures import measure_picture
from secateur.runtime.row_media import KINDS, Prompt, count_kinds
from secateur.runtime.schema import Manifest

T = TypeVar("T")


class Asked(NamedTuple):
    """What a call wants. ``given`` holds, for each of ``KINDS``, every row's."""

    prompts: Sequence[Prompt]
    given: Sequence[Sequence[Sequence[Any]]]
    new_tokens: int | None

    def media(self, kind: str) -> Sequence[Sequence[Any]]:
        """Every row's of a kind."""
        return self.given[KINDS.index(kind)]

    def __str__(self) -> str:
        rows = [[kind for kind, each in zip(KINDS, row, strict=True) for _ in each]
                for row in zip(*self.given, strict=True)]  # fmt: skip
        held = " or ".join(dict.fromkeys(count_kinds(row) for row in rows))
        text = f"{len(self.prompts)} prompt(s) with {held or 'nothing'}"
        return text if self.new_tokens is None else f"{text} and {self.new_tokens} new tokens"


def pick(geometries: Sequence[Manifest], order: Sequence[int], fit: Callable[[int], T], asked: Asked) -> T:
    """What ``fit`` makes of the first geometry of ``order`` that it takes; for others it raises UserError.

    Raises an error that is no matter of geometry, or one that lists the geometries with the reason why each does not
    fit what was ``asked``.
    """
    refused: dict[int, UserError] = {}
    for index in order:
        try:
            return fit(index)
        except UserError as error:
            refused[index] = error
    other = next((error for error in refused.values() if not isinstance(error, MisfitError)), None)
    if other is not None:
        raise other
    raise MisfitError(
        f"no compiled geometry fits {asked}",
        available=(f"{geometries[index].words}: {refused[index]}" for index in sorted(refused)),
    )


def order_by_size(geometries: Sequence[Manifest], asked: Asked) -> list[int]:
    """Indices of the geometries, those with the fewest FLOPs up to the first token first.

    Where they differ in the size of images, those come first that lose nothing of any image ``asked`` about, of equals
    the one nearest to their shape; behind them the others, the largest first.
    """
    sizes = [one.geometry.sizes_seen for one in geometries]
    differ = any(each != sizes[0] for each in sizes)
    rows = [[measure_picture(image) for image in row] for row in asked.media("image")] if differ else []

    def key(index: int) -> tuple[bool, int, int, float, int]:
        own = sizes[index]
        # Of several sizes each image has its own; of another number of images nothing fits anyway.
        pairs = [(*size, *own[place % len(own)]) for row in rows for place, size in enumerate(row) if size is not None]
        smaller = any(h * w > height * width for h, w, height, width in pairs)
        programs = geometries[index].programs
        flops = programs["vision"].flops + programs["prefill"].flops
        stretch = sum(abs(math.log(h / w * width / height)) for h, w, height, width in pairs)
        return smaller, -sum(h * w for h, w in own) if smaller else 0, flops, stretch, index

    return sorted(range(len(geometries)), key=key)
