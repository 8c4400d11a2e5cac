"""Planning a recipe for a model: layers scale, lengths shrink, and what cannot be is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from secateur.compiler.plan_recipe import NothingLeftError, PlannedRecipe, PlannedStage, plan_recipe
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError

WORD = Term("top_k")


def plan(recipe: Recipe, **changes: Any) -> PlannedRecipe:
    model: dict[str, Any] = {"images": 1, "tokens_per_image": 576, "vision_layers": 24, "decoder_layers": 32}
    return plan_recipe(recipe, **{"keep": None, **model, **changes})


def make_recipe(*stages: tuple[str, float] | tuple[str, float, str]) -> Recipe:
    built = [Stage(Site.parse(stage[0]), WORD, share=stage[1], scope=(*stage, "image")[2]) for stage in stages]
    return Recipe("mine", "", "", tuple(built))


def leaves_none(stage: PlannedStage) -> bool:
    return stage.select is not None and stage.select.name == "nothing"


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("random", [288]),
        ("fastv", [288]),
        ("pyramiddrop", [288, 144, 72]),
        ("fastervlm", [144]),
        ("divprune", [56]),
        ("visionzip", [192]),
        ("none", []),
    ],
)
def test_default_keep_gives_the_published_numbers(name: str, lengths: list[int]) -> None:
    """LLaVA-1.5: 576 tokens, 32 layers."""
    planned = plan(RECIPES[name])
    assert [stage.length_out for stage in planned.stages] == lengths
    assert [stage.site.layer for stage in planned.stages] == [stage.site.layer for stage in RECIPES[name].stages], (
        "published layers moved at the published depth"
    )


@given(
    name=st.sampled_from(sorted(RECIPES)),
    keep=st.floats(0.001, 1.0),
    images=st.integers(1, 4),
    tokens=st.integers(1, 300),
    layers=st.integers(4, 80),
)
def test_lengths_never_grow_and_layers_always_do(name: str, keep: float, images: int, tokens: int, layers: int) -> None:
    assume(keep * tokens >= 0.5)
    planned = plan(RECIPES[name], keep=keep, images=images, tokens_per_image=tokens, decoder_layers=layers)
    stages, rows = planned.stages, planned.recipe.stages
    total = images * tokens
    for before, stage in zip((None, *stages), stages, strict=False):
        assert (0 if leaves_none(stage) else 1) <= stage.length_out <= stage.length_in
        assert stage.groups * stage.length_in == (before.groups * before.length_out if before else total)
        if before and before.site.kind == stage.site.kind:
            assert stage.site.layer is not None
            assert before.site.layer is not None
            assert stage.site.layer > before.site.layer
        depth = 24 if stage.site.kind == "vision.layer" else layers
        assert stage.site.layer is None or stage.site.layer < depth
    pruning = [stage for stage in stages if rows[stage.index].prunes]
    if pruning and rows[pruning[-1].index].count is None:
        last = pruning[-1]
        wanted = keep * total / last.groups
        over = last.length_out - wanted
        fits = {
            "nearest": abs(over) <= 0.5 + 1e-6,
            "down": -1 < over < 1e-6 or last.length_out == 1,
            "up": -1e-6 < over < 1,
            # What the stages before it rounded adds up.
            "removed down": -1e-6 < over < len(pruning),
        }[rows[last.index].rounds]
        # Stages before it may have rounded to fewer than the last one wants.
        assert fits or last.length_out == last.length_in < wanted


@given(name=st.sampled_from(sorted(RECIPES)), images=st.integers(1, 4), tokens=st.integers(1, 300))
def test_keep_one_keeps_everything(name: str, images: int, tokens: int) -> None:
    for stage in plan(RECIPES[name], keep=1.0, images=images, tokens_per_image=tokens).stages:
        if leaves_none(stage) or RECIPES[name].stages[stage.index].count is not None:
            break
        assert stage.groups * stage.length_out == images * tokens


@given(keep=st.floats(0.01, 1.0), more=st.floats(0.0, 1.0), name=st.sampled_from(sorted(RECIPES)))
def test_more_keep_is_never_fewer_tokens(keep: float, more: float, name: str) -> None:
    fewer = plan(RECIPES[name], keep=keep).stages
    greater = plan(RECIPES[name], keep=keep + more * (1.0 - keep)).stages
    assert all(a.length_out <= b.length_out for a, b in zip(fewer, greater, strict=True))


@pytest.mark.parametrize("name", ["fastv", "divprune", "pyramiddrop"])
def test_a_ratio_that_leaves_no_token_is_refused(name: str) -> None:
    message = rf"^recipe {name}: stage \d would leave 0\.1 of 100 tokens; the smallest --keep is 0\.005$"
    with pytest.raises(NothingLeftError, match=message):
        plan(RECIPES[name], keep=0.001, tokens_per_image=100)
    assert plan(RECIPES[name], keep=0.005, tokens_per_image=100).stages[-1].length_out == 1


def test_published_proportions_hold_between_stages() -> None:
    lengths = [stage.length_out for stage in plan(RECIPES["pyramiddrop"], keep=0.001, tokens_per_image=10**6).stages]
    assert [math.log10(length / 10**6) for length in lengths] == pytest.approx([-1, -2, -3], abs=1e-3)


@pytest.mark.parametrize(
    ("layers", "expected"), [(32, [8, 16, 24]), (24, [6, 12, 18]), (28, [7, 14, 21]), (5, [1, 3, 4]), (4, [1, 2, 3])]
)
def test_published_layers_scale_with_depth(layers: int, expected: list[int]) -> None:
    stages = plan(RECIPES["pyramiddrop"], decoder_layers=layers).stages
    assert [stage.site.layer for stage in stages] == expected


def test_late_published_layers_move_down_to_fit() -> None:
    late = make_recipe(("decoder.layer[29/32]", 0.5), ("decoder.layer[30/32]", 0.4), ("decoder.layer[31/32]", 0.3))
    assert [stage.site.layer for stage in plan(late, decoder_layers=4).stages] == [1, 2, 3]


def test_a_published_layer_after_the_first_never_becomes_the_first() -> None:
    (stage,) = plan(RECIPES["fastv"], decoder_layers=4).stages
    assert stage.site == Site("decoder.layer", 1)


def test_a_users_layer_is_taken_as_it_is() -> None:
    stages = plan(make_recipe(("decoder.layer[3]", 0.5), ("decoder.layer[31]", 0.5))).stages
    assert [stage.site.layer for stage in stages] == [3, 31]


def test_scope_whole_pools_the_images_of_a_row() -> None:
    (stage,) = plan(RECIPES["fastv"], images=3, tokens_per_image=100, keep=0.1).stages
    assert (stage.groups, stage.length_in, stage.length_out) == (1, 300, 30)
    (stage,) = plan(RECIPES["divprune"], images=3, tokens_per_image=100, keep=0.1).stages
    assert (stage.groups, stage.length_in, stage.length_out) == (3, 100, 10)
    mixed = make_recipe(("vision.out", 0.5), ("decoder.layer[2]", 0.25, "whole"))
    first, second = plan(mixed, images=3, tokens_per_image=100).stages
    assert (first.groups, first.length_out) == (3, 50)
    assert (second.groups, second.length_in, second.length_out) == (1, 150, 75)


def test_a_share_of_one_everywhere_leaves_the_ratio_to_the_user() -> None:
    (stage,) = plan(make_recipe(("vision.out", 1.0)), keep=0.25).stages
    assert stage.length_out == 144


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_keep_out_of_range_is_refused(keep: float) -> None:
    with pytest.raises(UserError, match=r"--keep: keep ratio .* is out of \(0, 1\]; 1 keeps every visual token"):
        plan(RECIPES["fastv"], keep=keep)


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        (
            [("decoder.layer[32]", 0.5)],
            {},
            "recipe: site decoder.layer[32] is beyond the last layer "
            "(available: decoder.layer[0] to decoder.layer[31])",
        ),
        (
            [("decoder.layer[2]", 0.5), ("vision.out", 0.25)],
            {},
            "recipe mine: stage 1 at vision.out does not come after the stage before it; "
            "list stages in the order a token meets them, one per site",
        ),
        (
            [("vision.out", 0.5), ("vision.out", 0.25)],
            {},
            "recipe mine: stage 1 at vision.out does not come after the stage before it; "
            "list stages in the order a token meets them, one per site",
        ),
        (
            [("decoder.layer[8/32]", 0.5), ("decoder.layer[16/32]", 0.4), ("decoder.layer[24/32]", 0.3)],
            {"decoder_layers": 3},
            "recipe mine: 3 layers are too few for the stages at decoder.layer; "
            "use a deeper model, or a recipe file with fewer stages",
        ),
        (
            [("projector.out", 0.5, "whole")],
            {"images": 2},
            "recipe mine: scope 'whole' at projector.out would leave a different number of tokens per image; "
            "use scope 'image', or a decoder.layer[k] site",
        ),
        (
            [("decoder.layer[2]", 0.5, "whole"), ("decoder.layer[3]", 0.4, "image")],
            {"images": 2},
            "recipe mine: stage 1 has scope 'image', but the stage before left a different number of tokens "
            "per image; use scope 'whole' from the first stage with it on",
        ),
    ],
)
def test_impossible_plans_are_refused(stages: list[Any], changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(make_recipe(*stages), **changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([-0.5], "recipe mine: stages[0].share: share -0.5 is out of [0, 1]"),
        ([1.5], "recipe mine: stages[0].share: share 1.5 is out of [0, 1]"),
        (
            [0.0, 0.0],
            "recipe mine: stages[1].share: no token is left for this stage; a stage of share 0 must be the last",
        ),
        (
            [0.25, 0.5],
            "recipe mine: stages[1].share: share 0.5 is more than the 0.25 the stage before leaves; "
            "a share is a fraction of the original tokens, so it cannot grow",
        ),
    ],
)
def test_shares_that_make_no_sense_are_refused(shares: list[float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_recipe(*((f"decoder.layer[{index + 1}]", share) for index, share in enumerate(shares)))
    assert str(caught.value) == message


FORMS = "(available: vision.layer[i], vision.out, projector.out, audio.out, decoder.layer[k])"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decoder", f"site: no site 'decoder' {FORMS}"),
        ("decoder.layer[-1]", f"site: no site 'decoder.layer[-1]' {FORMS}"),
        ("decoder.layer", f"site: site 'decoder.layer' is malformed {FORMS}"),
        ("vision.out[3]", f"site: site 'vision.out[3]' is malformed {FORMS}"),
        (
            "decoder.layer[32/32]",
            "site: site 'decoder.layer[32/32]' is beyond the last layer of its published depth; "
            "the layer must be below 32",
        ),
        (
            "decoder.layer[0/0]",
            "site: site 'decoder.layer[0/0]' is beyond the last layer of its published depth; "
            "the depth must be at least 1",
        ),
    ],
)
def test_bad_sites_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Site.parse(text)
    assert str(caught.value) == message


def test_sites_read_with_spaces() -> None:
    assert Site.parse(" decoder.layer[ 2 / 32 ] ") == Site("decoder.layer", 2, 32)


def test_a_plan_prints_as_stable_text() -> None:
    assert str(plan(RECIPES["fastv"], keep=0.25)) == (
        "recipe fastv keep=0.25\n"
        "  stage0 decoder.layer[2] score=last_query_attention_mean(heads='mean') select=top_k() "
        "signals=last_query_attention.projections=previous scope=whole positions=original tokens=1x576->1x144"
    )
