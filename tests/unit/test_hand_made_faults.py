"""Faults that once survived, put in by hand: the nearest tests fail. So these tests are seen to be able to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.compiler import score_ops
from secateur.compiler.program import Segment
from secateur.passes import signals, sites
from secateur.passes.insert_decoder_stages import split_segments
from secateur.passes.join_phases import number_blocks
from secateur.passes.tile_rows import TileMap

from . import test_shared_readings_rows as rows
from . import test_shared_readings_signals as readings

Patch = pytest.MonkeyPatch
next_state = sites._next_state


def state_of(change: Callable[..., Any]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(sites, "_next_state", change)


def keep_stale(
    tracked: Sequence[str], state: Mapping[str, Tensor], carry: Tensor | None, chosen: Any, *rest: Any
) -> dict[str, Tensor]:
    """The first score that was carried is carried for good."""
    return next_state(tracked, state, None if "carried" in state else carry, chosen, *rest)


def forget_survivors(
    tracked: Sequence[str], state: Mapping[str, Tensor], carry: Tensor | None, chosen: Any, *rest: Any
) -> dict[str, Tensor]:
    """What is carried is that of the first tokens, not of those that stay."""
    found, count = next_state(tracked, state, carry, chosen, *rest), chosen.keep.shape[1]
    told = carry if carry is not None else state.get("carried")
    if told is not None:
        told = told.reshape(chosen.keep.shape[0], -1)[:, :count]
        found["carried"] = told.reshape(found["carried"].shape)
    return found


def forget_merged(
    tracked: Sequence[str], state: Mapping[str, Tensor], carry: Tensor | None, chosen: Any, *rest: Any
) -> dict[str, Tensor]:
    """A merged token is as large as its own place was."""
    return next_state(tracked, state, carry, chosen._replace(mix=None), *rest)


def count_merged(
    tracked: Sequence[str], state: Mapping[str, Tensor], carry: Tensor | None, chosen: Any, *rest: Any
) -> dict[str, Tensor]:
    """It counts those that went into it, whatever they stood for."""
    ones = {name: torch.ones_like(told) if name == "size" else told for name, told in state.items()}
    return next_state(tracked, ones, carry, chosen, *rest)


def weigh_merged(
    tracked: Sequence[str], state: Mapping[str, Tensor], carry: Tensor | None, chosen: Any, *rest: Any
) -> dict[str, Tensor]:
    """Sizes are mixed by the weights that rows are mixed by."""
    found = next_state(tracked, state, carry, chosen, *rest)
    if chosen.mix is not None:
        size = state["size"].reshape(chosen.mix.shape[0], -1, 1)
        found["size"] = (chosen.mix @ size).reshape(found["size"].shape)
    return found


def merged_rows() -> None:
    rows.test_rows_of_a_batch_are_left_as_one_by_one(True, True, True, 2)


def merged_images() -> None:
    rows.test_images_are_left_as_one_by_one(True, False, True)


def joint_heads() -> None:
    readings.test_signals_of_the_tower_are_what_the_table_says("patches", 1, 0)


def windows() -> None:
    readings.test_signals_in_the_decoder_are_what_the_table_says("windows")


def windows_over_positions() -> None:
    readings.test_signals_in_the_decoder_are_what_the_table_says("windows over positions")


def plain_rows() -> None:
    readings.test_signals_in_the_decoder_are_what_the_table_says("one image and text")


def blocks_of_images() -> None:
    readings.test_signals_in_the_decoder_are_what_the_table_says("blocks")


def segments() -> None:
    rows.test_every_layer_is_in_a_segment_of_the_rows_it_sees("twice", "shrink")


def runs_of_images() -> None:
    rows.test_blocks_are_runs_of_image_tokens("vvttvvvtv", [0, 0, -1, -1, 1, 1, 1, -1, 2])


def tiles() -> None:
    rows.test_what_tiles_have_becomes_the_images(True)


def attend_by_the_heads_scale(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """All heads as one, and their width's scale as if each were alone."""
    return score_ops.attend_rows(query, key, scale * 2**0.5 if query.shape[1] == 1 else scale)


def see_one_further(slots: Tensor, window: int, seen: Any, outside: Any = signals._outside) -> Tensor:
    made: Tensor = outside(slots, window + 1, seen)
    return made


def see_one_behind(query: Tensor, key: Tensor, scale: float, slots: Tensor, block_ids: Tensor | None = None) -> Tensor:
    return score_ops.score_rows(query, key, scale, slots + 1, block_ids)


def forget_blocks(query: Tensor, key: Tensor, scale: float, slots: Tensor, block_ids: Tensor | None = None) -> Tensor:
    return score_ops.score_rows(query, key, scale, slots)


def count_one_group(stages: Sequence[Any], *rest: Any) -> tuple[Segment, ...]:
    """What an image loses is taken for what the row loses."""
    alone = [type(stage)(**{**vars(stage), "groups": 1}) for stage in stages]
    return split_segments(alone, *rest)


def begin_late(stages: Sequence[Any], *rest: Any) -> tuple[Segment, ...]:
    """A segment begins behind the layer it should begin with."""
    found = split_segments(stages, *rest)
    ends = [segment.last_layer + (segment is not found[-1]) for segment in found]
    starts = [0, *ends[:-1]]
    return tuple(replace(s, first_layer=a, last_layer=b) for s, a, b in zip(found, starts, ends, strict=True))


def count_from_one(image: Tensor) -> Tensor:
    return number_blocks(image) + number_blocks(image).ge(0).long()


def pay_the_mean(self: TileMap, values: Tensor, dim: int, paid: bool, join: Any = TileMap.join) -> Tensor:
    made: Tensor = join(self, values, dim, False)
    return made


FAULTS: dict[str, tuple[Callable[[Patch], None], Callable[[], None]]] = {
    "a carried score that is never replaced": (state_of(keep_stale), merged_rows),
    "a carried score of other tokens": (state_of(forget_survivors), merged_rows),
    "a carried score of other tokens, in the tower": (state_of(forget_survivors), merged_images),
    "sizes that no merge changes": (state_of(forget_merged), merged_images),
    "sizes that a second merge forgets": (state_of(count_merged), merged_rows),
    "sizes that are weighed": (state_of(weigh_merged), merged_images),
    "the scale of joint heads": (lambda p: p.setattr(signals, "attend_rows", attend_by_the_heads_scale), joint_heads),
    "a window that is one longer": (lambda p: p.setattr(signals, "_outside", see_one_further), windows),
    "a window that is one longer, over positions": (
        lambda p: p.setattr(signals, "_outside", see_one_further), windows_over_positions,
    ),
    "a query that sees the slot behind it": (lambda p: p.setattr(signals, "score_rows", see_one_behind), plain_rows),
    "images that are no blocks": (lambda p: p.setattr(signals, "score_rows", forget_blocks), blocks_of_images),
    "segments of one image's length": (lambda p: p.setattr(rows, "split_segments", count_one_group), segments),
    "segments that begin one layer late": (lambda p: p.setattr(rows, "split_segments", begin_late), segments),
    "blocks that count from one": (lambda p: p.setattr(rows, "number_blocks", count_from_one), runs_of_images),
    "tiles that are paid a mean": (lambda p: p.setattr(TileMap, "join", pay_the_mean), tiles),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_nearest_test_sees_it(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in, nearest = FAULTS[fault]
    nearest()
    put_in(monkeypatch)
    with pytest.raises(AssertionError):
        nearest()
