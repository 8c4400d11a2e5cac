"""Numbers of the plan that the compiled graph and the eager oracle both read, each counted one by one."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.compiler.families.family import Tiles, VisionFacts
from secateur.compiler.layout import Layout
from secateur.compiler.media import Item, MediaLayout
from secateur.compiler.pooled import Picture
from secateur.compiler.pruned import Job
from secateur.compiler.site import Site


def stage(
    site: str, *, left: int = 4, observes: bool = False, part: int = 0, scores: bool = True, asks: bool = False,
    positions: str = "original",
) -> Any:  # fmt: skip
    planned = SimpleNamespace(site=Site.parse(site), observes=observes, length_out=left, part=part, positions=positions)
    signals = ("carried",) if asks else ()
    return SimpleNamespace(planned=planned, signals=signals, bound=SimpleNamespace(score=scores or None))


def job_of(facts: VisionFacts, *stages: Any, media: MediaLayout | None = None, heard: int = 0) -> Job:
    source: Any = SimpleNamespace(vision=facts, media=media, audio_tokens=heard)
    nothing: Any = None
    return Job(source, nothing, nothing, stages)


def facts_of(**changes: Any) -> VisionFacts:
    return VisionFacts(**{"image_size": (8, 8), "grid": (3, 4), "layers": 3, "feature_layer": 1, "has_cls": False,
                          "frames": 2, **changes})  # fmt: skip


# -- what an earlier program tells the decoder ------------------------------------------------------------


def hands_over(stages: list[Any]) -> bool:
    """Stage by stage: whether the decoder asks for a score that was given before it, in the same part."""
    told = ""
    part = stages[0].planned.part if stages else 0
    for one in stages:
        inside = one.planned.site.kind == "decoder.layer"
        if one.planned.part != part:
            told, part = "", one.planned.part
        if inside and "carried" in one.signals and told == "before":
            return True
        if one.bound.score is not None:
            told = "inside" if inside else "before"
    return False


def test_the_decoder_is_handed_what_its_part_asks_for() -> None:
    draw, found = random.Random(4), set()
    for _ in range(400):
        parts = sorted(draw.choices(range(3), k=4))
        before = draw.choice([0, 1, 2])
        sites = [*["vision.out", "audio.out"][:before], *(f"decoder.layer[{i}]" for i in range(4 - before))]
        stages = [
            stage(site, part=part, scores=draw.random() < 0.6, asks=draw.random() < 0.5)
            for site, part in zip(sites, parts, strict=True)
        ]
        want = hands_over(stages)
        assert job_of(facts_of(), *stages).carries == want, [str(one) for one in stages]
        found.add(want)
    assert found == {True, False}


def test_stages_are_told_apart_by_where_they_stand() -> None:
    kinds = ["vision.layer[1]", "vision.out", "audio.out", "projector.out", "decoder.layer[0]", "decoder.layer[2]"]
    job = job_of(facts_of(), *(stage(kind) for kind in kinds))
    found = [
        [str(one.planned.site) for one in side] for side in (job.vision_stages, job.audio_stages, job.decoder_stages)
    ]
    assert found == [["vision.layer[1]", "vision.out", "projector.out"], ["audio.out"], kinds[4:]]


# -- how many tokens --------------------------------------------------------------------------------------


COUNTS: dict[str, tuple[VisionFacts, list[Any], tuple[int, int, int, bool]]] = {
    "nothing removed": (facts_of(), [stage("decoder.layer[1]")], (12, 12, 0, False)),
    "one that only scores": (facts_of(), [stage("vision.out", left=12, observes=True)], (12, 12, 0, True)),
    "images": (facts_of(), [stage("vision.layer[1]", left=9), stage("vision.out", left=5)], (5, 5, 14, True)),
    "numbered anew": (facts_of(), [stage("vision.out", left=5, positions="compact")], (5, 5, 0, False)),
    "a row behind each image": (facts_of(extra_rows=1), [stage("vision.out", left=5)], (5, 6, 14, True)),
    "one video": (
        facts_of(frames=4, grids_per_item=4, extra_rows=1), [stage("projector.out", left=5)], (20, 21, 28, True),
    ),
    "tiles": (
        facts_of(frames=4, grids_per_item=2, extra_rows=2, tiles=Tiles((8, 16), (*range(16), -1, *range(16, 20), -1))),
        [stage("projector.out", left=7)], (7, 9, 26, True),
    ),
}  # fmt: skip
"""Facts, stages, and of each item the tokens that are left and its rows; how far positions run ahead of slots; whether
they leave gaps."""


@pytest.mark.parametrize("case", COUNTS)
def test_tokens_that_reach_the_decoder_are_counted(case: str) -> None:
    facts, stages, (kept, rows, ahead, gaps) = COUNTS[case]
    job = job_of(facts, *stages)
    assert (job.kept_per_item, job.features_per_item, job.position_offset) == (kept, rows, ahead)
    assert job.original_positions == gaps
    assert job.removes_before_decoder == any(
        one.planned.site.kind != "decoder.layer" and not one.planned.observes for one in stages
    )
    assert job.items_left == [rows] * facts.items
    assert job.media_order == tuple(range(rows * facts.items))


def test_grids_items_and_tokens() -> None:
    tiled = facts_of(frames=6, grids_per_item=3, tiles=Tiles((8, 16), (*range(12), -1, 14, 13, -1)))
    smaller = Tiles((8, 16), (*range(20), -1), Picture((0,), (1, 1), (1, 1)))
    resized = facts_of(frames=6, grids_per_item=3, tiles=smaller)
    video = facts_of(frames=4, grids_per_item=4)
    found = [
        (
            *(f.tokens_per_image, f.items, f.tokens_per_item, f.tokens_per_row),
            *(f.groups, f.resizes_picture, f.projector_merges),
        )
        for f in (facts_of(), video, tiled, resized, facts_of(packed=True))
    ]
    assert found == [
        (12, 2, 12, 24, 2, False, False),
        (12, 1, 48, 48, 4, False, False),
        (12, 2, 14, 28, 6, False, False),
        (12, 2, 20, 40, 2, True, True),
        (12, 2, 12, 24, 2, False, True),
    ]


def test_images_of_several_sizes_are_found_in_the_order_of_the_prompt() -> None:
    small, large = facts_of(grid=(1, 2)), facts_of(grid=(2, 4))
    facts = facts_of(frames=1, sizes=(small, large), size_of=(0, 1, 0, 0, 1))
    assert facts.image_places == ((0, 0), (1, 0), (0, 1), (0, 2), (1, 1))
    assert facts.images == (small, large, small, small, large)
    assert facts_of(frames=3).images == (facts_of(frames=3),) * 3


# -- media ------------------------------------------------------------------------------------------------


MEDIA: dict[str, tuple[list[tuple[str, int]], list[tuple[int, int]]]] = {
    "images": ([("image", 12), ("image", 12)], [(0, 24)]),
    "sound between the frames": ([("video with sound", 34)], [(0, 12), (1, 5), (0, 12), (1, 5)]),
    "sound behind, an image before": ([("image", 12), ("video", 24), ("audio", 7)], [(0, 36), (1, 7)]),
    "sound first": ([("audio", 7), ("image", 12)], [(1, 7), (0, 12)]),
}


@pytest.mark.parametrize("left", [12, 5, 1])
@pytest.mark.parametrize("case", MEDIA)
def test_media_are_laid_token_by_token(case: str, left: int) -> None:
    items, runs = MEDIA[case]
    kinds = [kind for kind, count in runs for _ in range(count)]
    # Of each image or frame of twelve tokens the first are left: which ones does not matter here.
    seen = itertools.count()
    stays = [bool(kind) or next(seen) % 12 < left for kind in kinds]
    total = sum(stay and not kind for stay, kind in zip(stays, kinds, strict=True))
    numbers = {0: itertools.count(), 1: itertools.count(total)}
    want = tuple(next(numbers[kind]) for kind, stay in zip(kinds, stays, strict=True) if stay)
    ends = list(itertools.accumulate(count for _, count in items))
    kept = [sum(stays[end - count : end]) for (_, count), end in zip(items, ends, strict=True)]

    layout = MediaLayout(
        tuple(Item(kind, count, count, count) for kind, count in items), tuple(runs), ((0, 0, 0),) * len(kinds),
        Layout((0,) * len(kinds), tuple(kinds)),
    )  # fmt: skip
    facts = facts_of(frames=kinds.count(0) // 12)
    job = job_of(facts, stage("projector.out", left=left), media=layout, heard=sum(kinds))
    assert layout.order(12, left) == job.media_order == want
    assert job.items_left == kept
