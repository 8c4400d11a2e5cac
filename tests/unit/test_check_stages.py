"""Stages that do not fit the tower, each other or their budget are refused before anything is traced."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.compiler.families.family import VisionFacts
from secateur.compiler.plan_recipe import plan_recipe
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.passes.check_stages import check_stages, tower_layers
from secateur.passes.stage import stage_function
from secateur.runtime.errors import UserError

CLIP = VisionFacts(image_size=(32, 32), grid=(4, 4), layers=6, feature_layer=4, has_cls=True)
SIGLIP = VisionFacts(image_size=(32, 32), grid=(4, 4), layers=6, feature_layer=5, has_cls=False)
RANDOM, TOP = Term("seeded_random"), Term("top_k")
CLS = Term("cls_attention_mean")


def stages_of(*stages: Stage, facts: VisionFacts = CLIP) -> list[Any]:
    plan = plan_recipe(
        Recipe("mine", "", "", stages), keep=None, images=1, tokens_per_image=16, vision_layers=facts.layers,
        decoder_layers=4, grid=(4, 4),
    )  # fmt: skip
    return [stage_function(s) for s in plan.stages]


@pytest.mark.parametrize(
    ("stages", "facts", "message"),
    [
        ([Stage(Site("decoder.layer", 2), TOP, RANDOM, share=0.0)], CLIP, "stage0: this budget leaves no token"),
        (
            [Stage(Site("decoder.layer", 2), Term("nothing"), share=0.5)], CLIP,
            "stage0: selector 'nothing' keeps no token, but the stage shall leave 8; give it share 0",
        ),
        (
            [Stage(Site("vision.out"), Term("nothing"), share=0.0)], CLIP,
            "stage0: no token would be left at vision.out for the decoder; put the selector",
        ),
        (
            [Stage(Site("vision.layer", 5), TOP, RANDOM)], CLIP,
            "stage0: nothing reads the tower at vision.layer[5]: the projector takes the output of layer 4",
        ),
        ([Stage(Site("vision.out"), TOP, CLS)], SIGLIP, "stage0: signal 'cls_attention' needs a CLS token"),
        (
            [Stage(Site("vision.out"), TOP, CLS, signals={"cls_attention": {"layer": "6"}})], CLIP,
            "stage0.signals.cls_attention: the vision tower has no layer 6 to read",
        ),
        (
            [Stage(Site("vision.layer", 2), TOP, RANDOM), Stage(Site("vision.out"), TOP, CLS, share=0.2,
             signals={"cls_attention": {"layer": "1"}})], CLIP,
            "stage1: signal 'cls_attention' at vision.out still counts the tokens that stage0 removed",
        ),
        (
            [Stage(Site("vision.out"), TOP, RANDOM), Stage(Site("projector.out"), TOP, CLS, share=0.2)], CLIP,
            "stage1: signal 'cls_attention' at projector.out still counts the tokens that stage0 removed",
        ),
        (
            [Stage(Site("decoder.layer", 1), TOP, Term("carried_score"))], CLIP,
            "stage0: signal 'carried' is what an earlier stage's score leaves, and no earlier stage has one",
        ),
    ],
)  # fmt: skip
def test_misfits_are_named(stages: list[Stage], facts: VisionFacts, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_stages(stages_of(*stages, facts=facts), facts)
    assert str(error.value).startswith(message)


def test_layers_scale_and_count_once() -> None:
    several = Term("cls_attention_layers_mean")
    (stage,) = stages_of(
        Stage(
            Site("vision.out"),
            TOP,
            several,
            signals={"cls_attention_layers": {"layers": ["8/24", "9/24", "22/24", "read"]}},
        )
    )
    # 8/24 and 9/24 of six layers are both 2; 22/24 would be behind the layer the projector reads.
    assert tower_layers(stage, CLIP) == {"cls_attention_layers": (2, 4)}


def test_an_inner_site_reads_the_layer_before_it() -> None:
    (stage,) = stages_of(Stage(Site("vision.layer", 3), TOP, CLS))
    assert tower_layers(stage, CLIP) == {"cls_attention": (2,)}
    check_stages([stage], CLIP)


def test_a_layer_behind_an_inner_site_may_be_read_again() -> None:
    check_stages(
        stages_of(Stage(Site("vision.layer", 2), TOP, CLS), Stage(Site("vision.out"), TOP, CLS, share=0.2)), CLIP
    )


def test_what_only_scores_removes_nothing() -> None:
    check_stages(
        stages_of(Stage(Site("vision.out"), None, CLS, share=1.0), Stage(Site("projector.out"), TOP, CLS, share=0.2)),
        CLIP,
    )
