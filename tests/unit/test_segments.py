"""The runs of decoder layers, counted token by token: several images, stages that only look, caches that shrink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from secateur.compiler.plan_recipe import PlannedStage, plan_recipe
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.passes.insert_decoder_stages import split_segments

LAYERS, TEXT, NEW, TOKENS = 6, 5, 3, 8
SCORE = Term("last_query_attention_mean")


def planned(*stages: Stage, images: int) -> list[PlannedStage]:
    plan = plan_recipe(
        Recipe("counted", "counted", "", stages), keep=None, images=images, tokens_per_image=TOKENS, vision_layers=4,
        decoder_layers=LAYERS, grid=(2, 4),
    )  # fmt: skip
    return list(plan.stages)


def cut(layer: int, share: float, scope: Any = "image", **more: Any) -> Stage:
    return Stage(Site("decoder.layer", layer), score=SCORE, select=Term("top_k"), share=share, scope=scope, **more)


def count_tokens(stages: list[PlannedStage], images: int) -> list[int]:
    """Rows every layer sees: each image's tokens one by one, and the text."""
    left = [list(range(TOKENS)) for _ in range(images)]
    found = []
    for layer in range(LAYERS):
        for stage in stages:
            if stage.site.layer == layer and not stage.observes:
                if stage.scope == "image":
                    assert stage.groups == images
                    left = [tokens[: stage.length_out] for tokens in left]
                else:
                    assert stage.groups == 1
                    every = [(image, token) for image, tokens in enumerate(left) for token in tokens]
                    stays = every[: stage.length_out]
                    left = [[token for own, token in stays if own == image] for image in range(images)]
        found.append(TEXT + sum(map(len, left)))
    return found


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize(
    "stages",
    [
        (cut(0, 0.5),),
        (cut(2, 0.5),),
        (cut(0, 0.75), cut(2, 0.5), cut(4, 0.25)),
        (cut(1, 0.5), cut(3, 0.25, "whole")),
        (cut(0, 0.5, "whole"), Stage(Site("decoder.layer", 3), select=Term("nothing"), share=0.0, scope="whole")),
        (Stage(Site("decoder.layer", 1), score=SCORE, select=None), cut(2, 0.5)),
    ],
)
def test_a_segment_is_as_long_as_its_layers_see_rows(stages: tuple[Stage, ...], images: int) -> None:
    made = planned(*stages, images=images)
    rows, whole = count_tokens(made, images), TEXT + images * TOKENS
    for cache in ("ragged", "shrink"):
        segments = split_segments(made, LAYERS, whole, NEW, cache)  # type: ignore[arg-type]
        assert [layer for s in segments for layer in range(s.first_layer, s.last_layer)] == list(range(LAYERS))
        lengths = [s.length for s in segments for _ in range(s.first_layer, s.last_layer)]
        assert lengths == rows
        for segment in segments:
            held = segment.length if cache == "ragged" else rows[-1]
            assert segment.removed == whole - segment.length
            assert segment.evicted == segment.length - held
            assert segment.capacity == held + NEW
        sites = {s.site.layer for s in made if not s.observes}
        assert {s.first_layer for s in segments} == sites | {0}


def test_tokens_that_no_stage_takes_make_one_segment() -> None:
    (only,) = split_segments([], LAYERS, 21, NEW)
    assert (only.first_layer, only.last_layer, only.length, only.capacity, only.removed) == (0, LAYERS, 21, 24, 0)
    stage = replace(planned(cut(1, 0.5), images=2)[0], select=None)
    assert split_segments([stage], LAYERS, 21, NEW) == (only,)
