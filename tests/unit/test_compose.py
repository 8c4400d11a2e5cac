"""Recipes stacked on the command line: exact counts, and one line for what does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.compiler.plan_recipe import NothingLeftError, PlannedRecipe, plan_recipe
from secateur.passes.recipe_file import load_recipe, recipe_to_data
from secateur.runtime.errors import UserError

BOTH = "divprune:keep=0.5+fastv:keep=0.5"


def plan(text: str, keep: float | None = None, **changes: Any) -> PlannedRecipe:
    model: dict[str, Any] = {"images": 1, "tokens_per_image": 576, "vision_layers": 24, "decoder_layers": 32}
    return plan_recipe(load_recipe(text), keep=keep, **{**model, **changes})


def lengths(planned: PlannedRecipe) -> list[int]:
    return [stage.length_out for stage in planned.stages]


def test_parts_are_stacked_under_the_name_the_user_wrote() -> None:
    recipe = load_recipe(BOTH)
    assert recipe.name == BOTH
    assert [str(stage.site) for stage in recipe.stages] == ["projector.out", "decoder.layer[2]"]
    assert recipe.default_keep == 0.25
    assert [stage.positions for stage in plan(BOTH).stages] == ["compact", "original"]
    assert [part["keep"] for part in recipe_to_data(recipe)["parts"]] == [0.5, 0.5]


def round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


@given(tokens=st.integers(1, 700), first=st.floats(0.01, 1.0), second=st.floats(0.01, 1.0))
def test_each_part_keeps_a_fraction_of_what_enters_it(tokens: int, first: float, second: float) -> None:
    """15 tokens, half of half: 8, then 4. Half of half of 15 at once would be 4 as well, but 5 * 0.5 * 0.5 is not."""
    text = f"divprune:keep={first}+fastv:keep={second}"
    outer = round_half_up(first * tokens)
    inner = round_half_up(second * outer)
    if inner == 0:
        with pytest.raises(NothingLeftError, match=r"would leave .* keep more with --keep"):
            plan(text, tokens_per_image=tokens)
    else:
        assert lengths(plan(text, tokens_per_image=tokens)) == [outer, inner]


def test_rounding_happens_part_by_part() -> None:
    assert lengths(plan(BOTH, tokens_per_image=5)) == [3, 2]


def test_a_part_without_keep_takes_its_published_one() -> None:
    assert lengths(plan("divprune:keep=0.5+pyramiddrop")) == [288, 144, 72, 36]


def test_one_part_may_have_a_keep_as_well() -> None:
    assert lengths(plan("fastv:keep=0.25")) == [144]


def test_a_keep_for_the_whole_is_shared_in_the_parts_proportions() -> None:
    assert lengths(plan(BOTH, keep=1 / 16)) == [144, 36]
    assert lengths(plan("divprune:keep=0.5+fastv:keep=1", keep=0.1)) == [58, 58]
    assert lengths(plan("divprune:keep=1+fastv:keep=1", keep=0.25)) == [288, 144]


def test_several_images_become_one_group_in_the_decoder() -> None:
    planned = plan(BOTH, images=3, tokens_per_image=5)
    assert [(s.groups, s.length_in, s.length_out) for s in planned.stages] == [(3, 5, 3), (1, 9, 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv+divprune", "divprune acts at projector.out, before fastv at decoder.layer[2]; list parts in the order "
                           "a token meets them"),
        ("fastv+fastv", "fastv and fastv both have a stage at decoder.layer[2]; one stage per site"),
        ("fastv+pyramiddrop", "fastv numbers survivors 'original', pyramiddrop 'compact', both inside the decoder; "
                              "stack parts that agree, or write a recipe file"),
        ("none+fastv", "none has no stage to stack; leave it out"),
        ("divprune:keep=2+fastv", "keep=2 of divprune is out of (0, 1]; it is the fraction of the tokens entering this "
                                  "part that it leaves"),
        ("divprune:keep=0+fastv", "keep=0 of divprune is out of (0, 1]; it is the fraction of the tokens entering this "
                                  "part that it leaves"),
        ("divprune:keep=x+fastv", "':keep=x' has no number; write it as fastv:keep=0.5"),
        ("divprune:keep+fastv", "':keep' has no number; write it as fastv:keep=0.5"),
        ("divprune++fastv", "a part has no name; write it as divprune:keep=0.5+fastv"),
        ("visual_exit+fastv", "visual_exit leaves no token for fastv; put visual_exit last"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(text)
    assert str(caught.value) == f"--recipe {text}: {message}"


def test_an_unknown_part_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"^--recipe: no recipe 'fastq' \(available: .*fastv"):
        load_recipe("divprune+fastq")


def test_a_scope_that_does_not_fit_names_stage_and_recipe(tmp_path: Path) -> None:
    file = tmp_path / "per_image.yaml"
    file.write_text(
        "name: per_image\nstages:\n  - {site: 'decoder.layer[9/32]', score: last_query_attention_mean, select: top_k, "
        "share: 0.5}\n"
    )
    with pytest.raises(UserError, match="stage 1 has scope 'image', but the stage before left a different number"):
        plan(f"fastv+{file}", images=2)
    assert lengths(plan(f"fastv+{file}")) == [288, 144]


@pytest.mark.slow
def test_a_composed_recipe_compiles_with_exact_lengths(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    import secateur
    from secateur.runtime.manifest import read_manifest

    geometry = secateur.Geometry(text_tokens=24, new_tokens=4)
    secateur.compile(model_dir(), tmp_path / "bundle", recipe=BOTH, geometry=geometry)
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.recipe.name == BOTH
    assert [s.length for s in manifest.segments] == [24 + 8, 24 + 4]
