"""How the media of a row lie in its prompt, where position ids have several axes (M-RoPE) or sound is heard.

A row's *places* are the tokens of all its media in the order of the prompt, before anything is pruned. What is seen and
what is heard are encoded apart; ``runs`` say how the two are laid together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from secateur.compiler.layout import Layout
from secateur.runtime.errors import UserError

Axes = tuple[int, int, int]
"""Offsets in time, height and width."""


@dataclass(frozen=True)
class Item:
    """What one placeholder of a prompt stands for: ``tokens`` places, and ``span`` position ids before the text behind
    it goes on. ``reach`` is one more than the largest offset of a place: longer than ``span`` in families where text
    goes on before the end of a long video."""

    kind: str
    tokens: int
    span: int
    reach: int


@dataclass(frozen=True)
class MediaLayout:
    """All places of a row: offsets from the first position id of their item, moment and kind of each."""

    items: tuple[Item, ...]
    runs: tuple[tuple[int, int], ...]
    """(0 for what is seen or 1 for what is heard, number of tokens), one after the other."""
    offsets: tuple[Axes, ...]
    layout: Layout
    around: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Kind of item -> configuration keys of the tokens around it that transformers numbers it by."""
    sound_marks: tuple[str, str] = ("", "")
    """Configuration keys of the tokens before and behind sound that a video brings along. The tokens around the video
    itself have the same position ids, but for ``sound_marks_count``. Empty where there is none."""
    sound_marks_count: bool = False
    """Whether the marks of sound have position ids of their own, as words do."""
    sound_padding: Literal["max_length", "longest"] = "max_length"
    """As in the manifest."""
    timestamp: str = ""
    """As in the manifest."""

    def order(self, before: int = 1, after: int = 1) -> tuple[int, ...]:
        """Where each token that enters the decoder lies among all that are seen, followed by all that are heard.

        Of every ``before`` tokens that are seen one after the other ``after`` are left. Raises UserError where sound
        parts tokens that were chosen together.
        """
        seen = sum(count for heard, count in self.runs if not heard)
        next_seen, next_heard = 0, seen * after // before
        found: list[int] = []
        for heard, count in self.runs:
            if heard:
                found += range(next_heard, next_heard + count)
                next_heard += count
                continue
            if count * after % before:
                raise UserError(
                    f"stages before the decoder choose among {before} tokens, but sound comes after every {count}",
                    where="geometry",
                    fix="use a recipe with scope 'image', or compile without audio in the video",
                )
            found += range(next_seen, next_seen + count * after // before)
            next_seen += count * after // before
        return tuple(found)

    @cached_property
    def places_seen(self) -> tuple[int, ...]:
        """Places of what is seen, in the tower's order."""
        order = self.order()
        seen = sum(count for heard, count in self.runs if not heard)
        return tuple(place for place, index in enumerate(order) if index < seen)

    def layout_of(self, left: Sequence[int]) -> Layout:
        """Moment and kind of the tokens that enter the decoder, where every image has ``left`` of them."""
        seen, heard = Layout.of_counts(left), [at for at, kind in enumerate(self.layout.modalities) if kind]
        frames = (*seen.frames, *(self.layout.frames[at] for at in heard))
        return Layout(frames, (*seen.modalities, *(1 for _ in heard)))

    def layout_after(self, before: int, after: int) -> Layout:
        """The same where of every ``before`` tokens of what is seen ``after`` are left."""
        frames: list[int] = []
        kinds: list[int] = []
        at = 0
        whole = self.layout.frames
        for heard, count in self.runs:
            kept = count if heard else count * after // before
            # Survivors of a grid lie where its tokens lay.
            frames += [whole[at + i * count // kept] for i in range(kept)]
            kinds += [heard] * kept
            at += count
        return Layout(tuple(frames), tuple(kinds))


def grid_axes(times: Sequence[int], rows: int, columns: int) -> list[Axes]:
    """Offsets of the tokens of grids at ``times``, grid by grid and row by row."""
    return [(time, row, column) for time in times for row in range(rows) for column in range(columns)]


def moments_beside(seen: Sequence[int], count: int) -> list[int]:
    """Moments for ``count`` tokens of a sound beside images, whose vision tokens have the moments ``seen``.

    Images have no time of their own: the sound is spread over them in proportion to their tokens, so that a window of
    any of them holds both kinds as the whole prompt does, and budgets of both kinds can be met.
    """
    return [seen[i * len(seen) // count] for i in range(count)]
