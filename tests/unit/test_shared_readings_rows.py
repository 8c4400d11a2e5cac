"""What a stage leaves, what it tells later ones, and how layers fall into segments: the graph's reading and the eager
oracle's, each held against plain loops over single tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.compiler import oracle_stages
from secateur.compiler.pooled import Picture
from secateur.compiler.recipe import Site
from secateur.compiler.token_map import TokenMap
from secateur.passes.insert_decoder_stages import split_segments
from secateur.passes.join_phases import number_blocks
from secateur.passes.signals import PatchView, SequenceView
from secateur.passes.sites import locate, reduce_patches, reduce_sequence
from secateur.passes.stage import StageResult
from secateur.passes.tile_rows import TileMap

from .signal_readings import Array, resized_weights

STATE = ("carried", "size", "source")


class Choice(NamedTuple):
    """A stage's ``keep [G,K]``, ``mix [G,K,N]`` or None, and ``carry [G,N]`` or None."""

    keep: Array
    mix: Array | None
    carry: Array | None


# -- one token after the other ----------------------------------------------------------------------------


def tell(state: Mapping[str, Array], choice: Choice, group: int) -> dict[str, list[float]]:
    """State ``[N]`` of a group's tokens -> of its survivors."""
    found: dict[str, list[float]] = {name: [] for name in state}
    if choice.carry is not None:
        found["carried"] = []
    for place, token in enumerate(choice.keep[group]):
        for name, told in found.items():
            if name == "size" and choice.mix is not None:  # as large as all that went into it
                weights = choice.mix[group, place]
                told.append(sum(size for size, weight in zip(state["size"], weights, strict=True) if weight > 0))
            elif name == "carried" and choice.carry is not None:
                told.append(choice.carry[group, token])
            else:
                told.append(state[name][token])
    return found


def mixed(rows: Array, choice: Choice, group: int) -> list[Array]:
    """Survivors of a group's rows ``[N,D]``."""
    if choice.mix is None:
        return [rows[token] for token in choice.keep[group]]
    return [sum(weight * row for weight, row in zip(own, rows, strict=True)) for own in choice.mix[group]]


class Left(NamedTuple):
    slots: list[int]
    hidden: Array
    prunable: list[bool]
    kept: list[int]
    state: dict[str, list[float]]


def leave(hidden: Array, prunable: Array, state: Mapping[str, Array], choice: Choice) -> Left:
    """A row ``hidden [L,D]`` behind a stage; its groups lie one after the other."""
    visual = [slot for slot, goes in enumerate(prunable) if goes]
    groups, count = len(choice.keep), len(visual) // len(choice.keep)
    kept, rows, told = [], {}, {}  # type: ignore[var-annotated]
    for group in range(groups):
        first = group * count
        own = {name: values[first : first + count] for name, values in state.items()}
        left = mixed(hidden[visual[first : first + count]], choice, group)
        for token, row in zip(choice.keep[group], left, strict=True):
            kept.append(first + int(token))
            rows[visual[first + int(token)]] = row
        for name, values in tell(own, choice, group).items():
            told.setdefault(name, []).extend(values)
    slots = [slot for slot, goes in enumerate(prunable) if not goes or slot in rows]
    return Left(
        slots, np.stack([rows.get(slot, hidden[slot]) for slot in slots]), [slot in rows for slot in slots], kept, told
    )


# -- drawn stages -----------------------------------------------------------------------------------------


def draw_choice(draw: Any, groups: int, count: int, left: int, merges: bool, scores: bool) -> Choice:
    """Merges weigh sources unevenly, and leave some out."""
    keep = np.stack([np.sort(draw.choice(count, left, replace=False)) for _ in range(groups)])
    mix = None
    if merges:
        mix = draw.random((groups, left, count)) * (draw.random((groups, left, count)) < 0.5)
        for group in range(groups):
            mix[group, np.arange(left), keep[group]] = 0.3 + draw.random(left)
    return Choice(keep, mix, draw.normal(size=(groups, count)) if scores else None)


def draw_state(draw: Any, count: int, carried: bool) -> dict[str, Array]:
    state = {"size": draw.integers(1, 6, count).astype(float), "source": np.sort(draw.choice(3 * count, count, False))}
    return state | ({"carried": draw.normal(size=count)} if carried else {})


def tensor(values: Any) -> Tensor:
    found = torch.from_numpy(np.asarray(values))
    return found.float() if found.is_floating_point() else found


def stage_of(choices: Sequence[Choice], count: int, observes: bool = False) -> Any:
    """A stage that chooses what was drawn for each row of a batch; nobody asks it for signals."""
    keep = np.concatenate([choice.keep for choice in choices])
    told = [choice.carry for choice in choices if choice.carry is not None]
    mixes = [choice.mix for choice in choices if choice.mix is not None]
    result = StageResult(
        TokenMap(tensor(keep), tensor(np.concatenate(mixes)) if mixes else None),
        tensor(np.concatenate(told)) if told else None,
    )
    planned = SimpleNamespace(groups=len(choices[0].keep), length_in=count, length_out=keep.shape[1], observes=observes)
    return SimpleNamespace(planned=planned, signals=(), signal_options={}, run=lambda signals: result)


def near(found: Tensor, want: Any) -> None:
    np.testing.assert_allclose(found.numpy(), np.asarray(want), rtol=1e-5, atol=1e-6)


SHAPES = [(merges, scores, carried, groups) for merges in (False, True) for scores in (False, True)
          for carried in (False, True) for groups in (1, 2)]  # fmt: skip
FLAGS = ("tvvvtvvvtt", "vvvttttvvv")


@pytest.mark.parametrize(("merges", "scores", "carried", "groups"), SHAPES)
def test_rows_of_a_batch_are_left_as_one_by_one(merges: bool, scores: bool, carried: bool, groups: int) -> None:
    draw = np.random.default_rng(11)
    rows = [draw.normal(size=(len(flags), 5)) for flags in FLAGS]
    prunable = [np.array([flag == "v" for flag in flags]) for flags in FLAGS]
    states = [draw_state(draw, 6, carried) for _ in FLAGS]
    choices = [draw_choice(draw, groups, 6 // groups, 4 // groups, merges, scores) for _ in FLAGS]
    want = [leave(*each) for each in zip(rows, prunable, states, choices, strict=True)]
    hidden, flags = tensor(np.stack(rows)), torch.tensor(np.stack(prunable))
    columns, texts = locate(flags, 6)
    assert columns.tolist() == [[i for i, f in enumerate(own) if f == "v"] for own in FLAGS]
    assert texts.tolist() == [[i for i, f in enumerate(own) if f != "v"] for own in FLAGS]
    state = {name: tensor(np.stack([own[name] for own in states])) for name in states[0]}
    seen = SequenceView(hidden, torch.tensor([9, 9]), columns, texts, {}, {}, state, 6)
    found = reduce_sequence(stage_of(choices, 6 // groups), seen, flags, STATE)
    assert set(found.state) == set(want[0].state)
    for at, left in enumerate(want):
        assert found.rows[at].tolist() == left.slots
        assert found.kept[at].tolist() == left.kept
        assert found.prunable[at].tolist() == left.prunable
        near(found.hidden[at], left.hidden)
        for name, told in left.state.items():
            near(found.state[name][at], told)
        # The oracle's own reading of the same row.
        chosen = stage_of(choices[at : at + 1], 6 // groups).run({})
        own = oracle_stages.shorten(hidden[at], flags[at], chosen.map)
        assert (own.slots.tolist(), own.kept.tolist(), own.prunable.tolist()) == (left.slots, left.kept, left.prunable)
        near(own.hidden, left.hidden)
        single = {name: values[at : at + 1] for name, values in state.items()}
        later = oracle_stages.tell_later(single, chosen.carry, chosen.map)
        assert {name: told.flatten().tolist() for name, told in later.items()} == {
            name: pytest.approx(told) for name, told in left.state.items()
        }


@pytest.mark.parametrize(("merges", "scores", "carried"), [shape[:3] for shape in SHAPES[::2]])
def test_images_are_left_as_one_by_one(merges: bool, scores: bool, carried: bool) -> None:
    draw = np.random.default_rng(12)
    tokens = draw.normal(size=(3, 6, 5))
    states = [draw_state(draw, 6, carried) for _ in tokens]
    choice = draw_choice(draw, 3, 6, 4, merges, scores)
    state = {name: tensor(np.stack([own[name] for own in states])) for name in states[0]}
    stage = stage_of([choice], 6)
    seen = PatchView(tensor(tokens), {}, 1.0, False, state, {}, (2, 3))
    found = reduce_patches(stage, seen, {}, STATE)
    chosen = stage.run({})
    later = oracle_stages.tell_later(state, chosen.carry, chosen.map)
    plane = draw.normal(size=(3, 6, 2))
    for image in range(3):
        want = tell(states[image], choice, image)
        assert set(found.state) == set(later) == set(want)
        for name, told in want.items():
            near(found.state[name][image], told)
            near(later[name][image], told)
        for rows, ours in ((tokens, found.tokens), (plane, found.thin(tensor(plane)))):
            near(ours[image], np.stack(mixed(rows[image], choice, image)))
            near(oracle_stages.thin_rows(tensor(rows), chosen.map)[image], np.stack(mixed(rows[image], choice, image)))
    assert found.kept.tolist() == choice.keep.tolist()
    row = [image * 6 + int(token) for image in range(3) for token in choice.keep[image]]
    assert oracle_stages.count_in_row(chosen.map.keep, 6).tolist() == row


def test_sizes_add_up_over_stages_that_merge() -> None:
    """Six tokens become three, then two: by hand."""
    first = Choice(
        np.array([[0, 2, 5]]), np.array([[[0.9, 0.1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0.2, 0.3, 0.5]]]), None
    )
    second = Choice(np.array([[0, 2]]), np.array([[[0.7, 0.3, 0], [0, 0, 1.0]]]), None)
    state: Any = oracle_stages.begin_state(1, 6)
    view = PatchView(torch.zeros(1, 6, 2), {}, 1.0, False, state, {}, (2, 3))
    ours = reduce_patches(stage_of([first], 6), view, {}, STATE).state
    theirs = oracle_stages.tell_later(state, None, stage_of([first], 6).run({}).map)
    for told in (ours, theirs):
        assert (told["size"].tolist(), told["source"].tolist()) == ([[2, 1, 3]], [[0, 2, 5]])
    view = PatchView(torch.zeros(1, 3, 2), {}, 1.0, False, ours, {}, (2, 3))
    ours = reduce_patches(stage_of([second], 3), view, {}, STATE).state
    theirs = oracle_stages.tell_later(theirs, None, stage_of([second], 3).run({}).map)
    for told in (ours, theirs):
        assert (told["size"].tolist(), told["source"].tolist()) == ([[3, 3]], [[0, 5]])


def test_a_stage_that_only_scores_carries_for_all() -> None:
    carry = np.array([[3.0, 1.0, 2.0]])
    choice = Choice(np.array([[0, 1, 2]]), None, carry)
    flags = torch.tensor([[False, True, True, True]])
    seen = SequenceView(
        torch.arange(8.0).reshape(1, 4, 2), torch.tensor([3]), torch.tensor([[1, 2, 3]]), torch.tensor([[0]]), {}, {},
        {"carried": torch.zeros(1, 3)}, 3,
    )  # fmt: skip
    found = reduce_sequence(stage_of([choice], 3, observes=True), seen, flags, ["carried"])
    assert found.state["carried"].tolist() == carry.tolist()
    assert torch.equal(found.hidden, seen.hidden)


# -- segments, blocks, tiles ------------------------------------------------------------------------------


def planned(layer: int, groups: int, count: int, left: int, observes: bool = False) -> Any:
    return SimpleNamespace(
        site=Site("decoder.layer", layer), groups=groups, length_in=count, length_out=left, observes=observes
    )


STAGES: dict[str, list[Any]] = {
    "none": [],
    "before the first layer": [planned(0, 2, 8, 5)],
    "twice": [planned(2, 2, 8, 5), planned(3, 1, 10, 4)],
    "all gone in the end": [planned(1, 1, 16, 6), planned(4, 1, 6, 0)],
    "one that only scores": [planned(1, 2, 8, 8, True), planned(2, 2, 8, 3)],
    "before the first layer and behind": [planned(0, 1, 16, 9), planned(2, 1, 9, 4), planned(5, 1, 4, 2)],
}


@pytest.mark.parametrize("cache", ["ragged", "shrink"])
@pytest.mark.parametrize("case", STAGES)
def test_every_layer_is_in_a_segment_of_the_rows_it_sees(case: str, cache: Any) -> None:
    layers, sequence, new = 6, 30, 5
    found = split_segments(STAGES[case], layers, sequence, new, cache)
    seen = [
        sequence - sum(s.groups * (s.length_in - s.length_out) for s in STAGES[case] if s.site.layer <= layer)
        for layer in range(layers)
    ]
    assert [segment.name for segment in found] == [f"s{at}" for at in range(len(found))]
    assert [layer for segment in found for layer in range(segment.first_layer, segment.last_layer)] == list(range(6))
    for segment in found:
        for layer in range(segment.first_layer, segment.last_layer):
            # A cache that shrinks ends with the rows that the last layers saw.
            held = min(seen) if cache == "shrink" else seen[layer]
            assert segment.length == seen[layer]
            assert segment.removed == sequence - seen[layer]
            assert segment.evicted == seen[layer] - held
            assert segment.capacity == held + new
    # As few as there are lengths: layers of one length are one segment.
    assert len(found) == len(set(seen))


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        ("tvvtv", [-1, 0, 0, -1, 1]),
        ("vvttvvvtv", [0, 0, -1, -1, 1, 1, 1, -1, 2]),
        ("ttt", [-1, -1, -1]),
        ("v", [0]),
    ],
)
def test_blocks_are_runs_of_image_tokens(flags: str, numbers: list[int]) -> None:
    image = torch.tensor([flag == "v" for flag in flags])
    assert number_blocks(image[None]).tolist() == [numbers]
    assert oracle_stages.number_blocks(image).tolist() == numbers


@pytest.mark.parametrize("paid", [False, True])
def test_what_tiles_have_becomes_the_images(paid: bool) -> None:
    """Two images of three tiles of four tokens: without a picture a choice of places, with one it is resized; what is
    paid to its tokens is shared out, so that none is lost."""
    draw = np.random.default_rng(4)
    values = draw.random((6, 2, 4))
    places = (0, 1, 2, 3, 5, 4, 9, 8, 7)
    whole = values.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3).reshape(2, 2, 12)
    near(TileMap(3, places).join(tensor(values), 2, paid), np.stack([whole[:, :, place] for place in places], 2))
    # The four of the first tile stay, and a picture of two by four becomes one of two by three.
    picture = Picture((4, 5, 8, 9, 6, 7, 10, 11), (2, 4), (2, 3))
    tiles = TileMap(3, (*range(4), *picture.places), 4, picture)
    weights = resized_weights((2, 4), (2, 3))
    if paid:
        weights = weights / weights.sum(0)
    found = tiles.join(tensor(values), 2, paid)
    near(found[:, :, :4], whole[:, :, :4])
    near(found[:, :, 4:], whole[:, :, list(picture.places)] @ weights.T)
    if paid:
        near(found.sum(-1), whole.sum(-1))
