"""Budgets over layers and FLOPs: met as nearly as whole tokens allow, or refused with the range."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compiler.budget import Budget, PrefillCost, solve_budget, visual_lengths
from secateur.compiler.plan_recipe import PlannedRecipe, plan_recipe
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.compiler.schedule import Exponential
from secateur.passes.recipe_file import load_recipe, recipe_from_yaml, recipe_to_yaml
from secateur.runtime.errors import UserError

TOKENS, LAYERS = 576, 32
COST = PrefillCost(per_token=405_000_000, per_pair=16_384, head=262_000_000, fixed=64)


def plan(recipe: Recipe, keep: float | None, layers: int = LAYERS) -> PlannedRecipe:
    return plan_recipe(
        recipe, keep=keep, images=1, tokens_per_image=TOKENS, vision_layers=24, decoder_layers=layers
    )  # fmt: skip


def solve(recipe: Recipe, layers: int = LAYERS, **asked: float) -> float:
    keep = solve_budget(Budget(**asked), lambda ratio: plan(recipe, ratio, layers), TOKENS, layers, COST)
    assert keep is not None
    return keep


def mean(recipe: Recipe, keep: float, layers: int = LAYERS) -> float:
    return sum(visual_lengths(plan(recipe, keep, layers), TOKENS, layers)) / (TOKENS * layers)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "divprune", "divprune:keep=0.5+fastv:keep=0.5"])
@settings(max_examples=25, deadline=None)
@given(target=st.floats(0.3, 1.0))
def test_the_mean_over_layers_is_met_to_half_a_step(name: str, target: float) -> None:
    recipe = load_recipe(name)
    keep = solve(recipe, mean_keep=target)
    assert 0.0 < keep <= 1.0
    # One token more after every stage is the coarsest step there is.
    assert abs(mean(recipe, keep) - target) <= len(recipe.stages) / TOKENS


def test_fastv_solves_as_by_hand() -> None:
    """Layers 0 and 1 hold everything: r = (mean * L - 2) / (L - 2)."""
    keep = solve(load_recipe("fastv"), mean_keep=0.5)
    assert plan(load_recipe("fastv"), keep).stages[0].length_out == round(576 * (0.5 * 32 - 2) / 30)
    assert len(f"{keep:g}") <= 8, "short enough to write down"


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("fastv", {"mean_keep": 0.05}, "--mean-keep: 0.05 cannot be reached with fastv (available: 0.0642 to 1)"),
        ("visual_exit", {"mean_keep": 0.999}, "cannot be reached with visual_exit (available: "),
        ("none", {"mean_keep": 0.5}, "--mean-keep: 0.5 cannot be reached with none (available: 1 to 1)"),
        ("fastv", {"flops_keep": 0.01}, "--flops-keep: 0.01 cannot be reached with fastv (available: "),
    ],
)
def test_what_cannot_be_reached_comes_with_what_can(name: str, asked: dict[str, float], message: str) -> None:
    recipe = load_recipe(name)
    with pytest.raises(UserError) as caught:
        solve_budget(
            Budget(**asked), lambda ratio: plan(recipe, ratio if recipe.stages else None), TOKENS, LAYERS, COST
        )
    assert message in str(caught.value)
    if "to 1)" in message and name == "fastv":
        solve(recipe, mean_keep=0.0642 + 1e-4)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_budgets_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=rf"--mean-keep: {value:g} is out of \(0, 1\]"):
        Budget(mean_keep=value)


def test_one_budget_at_a_time() -> None:
    with pytest.raises(UserError, match=r"^--keep and --flops-keep are given together; each of them alone fixes"):
        Budget(keep=0.5, flops_keep=0.5)


@settings(max_examples=25, deadline=None)
@given(target=st.floats(0.2, 1.0))
def test_the_share_of_flops_is_met(target: float) -> None:
    recipe = load_recipe("fastv")
    lengths = visual_lengths(plan(recipe, solve(recipe, flops_keep=target)), TOKENS, LAYERS)
    assert COST.flops(lengths) / COST.flops([TOKENS] * LAYERS) == pytest.approx(target, abs=0.002)


def test_the_estimate_is_the_exact_count_without_stages(pruned: Callable[..., Any]) -> None:
    """Of the unpruned model to the last operation; with FastV but for its one row of scores."""
    from secateur.compiler.flops import count_flops

    whole, half = pruned("none"), pruned("fastv", 0.5)
    source, geometry = whole.job.source, whole.job.geometry
    cost = PrefillCost.of(source.text, geometry.text_tokens)
    tokens = source.vision.tokens_per_image
    assert cost.flops([tokens] * source.decoder_layers) == count_flops(whole.programs["prefill"])
    lengths = visual_lengths(half.job.plan, tokens, source.decoder_layers)
    assert [s.length - geometry.text_tokens for s in half.programs.segments] == sorted(set(lengths), reverse=True)
    exact = count_flops(half.programs["prefill"])
    assert 0 <= exact - cost.flops(lengths) < 0.02 * exact


def test_explain_meets_a_budget_and_prints_the_lengths(model_dir: Callable[..., Path]) -> None:
    import secateur

    found = secateur.explain("fastv", model_dir(), mean_keep=0.625)
    assert found.visual_tokens == (16, 8, 8, 8)
    assert found.mean_keep == 0.625
    assert "layers 1-3: 8 visual" in str(found)
    exact = secateur.explain("fastv", model_dir(), flops_keep=0.9).flops["prefill"].ratio
    assert exact == pytest.approx(0.9, abs=0.02)


# SEATS' schedule (arXiv 2605.20035), by the numbers its code arrives at.


def seats(layers: tuple[int, ...], end: int, depth: int, entry: float | None = 1.4) -> Recipe:
    word, last = Term("top_k"), Term("nothing")
    stages = [Stage(Site("projector.out"), word, share=0.14)] if entry else []
    stages += [Stage(Site("decoder.layer", layer, depth), word, share=0.03, scope="whole") for layer in layers]
    stages += [Stage(Site("decoder.layer", end, depth), last, share=0.0, scope="whole")]
    return Recipe("seats", "", "", tuple(stages), schedule=Exponential(entry))


@pytest.mark.parametrize(
    ("layers", "end", "depth", "drop", "steps"),
    [
        ((16, 18, 20), 23, 28, 0.7793, (0.9298, 0.7949, 0.2986)),
        ((27, 31, 35), 39, 48, 0.8272, (0.9255, 0.7813, 0.2390)),
    ],
)
def test_the_exponential_schedule_gives_the_published_steps(
    layers: tuple[int, ...], end: int, depth: int, drop: float, steps: tuple[float, ...]
) -> None:
    enter, shares = Exponential(1.4).shares(0.14 * (1 - drop), layers, depth, end, "")
    assert enter == pytest.approx(0.14, rel=1e-3)
    assert 1 - shares[-1] / enter == pytest.approx(drop, abs=1e-4)
    assert [after / before for before, after in pairwise([enter, *shares])] == pytest.approx(steps, abs=2e-4)
    lost = [before - after for before, after in pairwise([enter, *shares])]
    assert [b / a for a, b in pairwise(lost)] == pytest.approx([2.718281828] * 2)


@settings(max_examples=25, deadline=None)
@given(target=st.floats(0.1, 0.8))
def test_the_schedule_meets_a_mean(target: float) -> None:
    recipe = seats((16, 18, 20), 23, 28)
    keep = solve(recipe, layers=28, mean_keep=target)
    assert mean(recipe, keep, 28) == pytest.approx(target, abs=0.005)
    if target * 1.4 <= 1:
        assert plan(recipe, keep, 28).stages[0].length_out == pytest.approx(1.4 * target * TOKENS, abs=2)


def test_a_schedule_without_a_stage_before_the_decoder() -> None:
    recipe = seats((16, 18, 20), 23, 28, entry=None)
    assert [s.length_out for s in plan(recipe, 0.5, 28).stages] == [550, 480, 288, 0]
    assert [s.length_out for s in plan(recipe, 1.0, 28).stages] == [576, 576, 576, 0]


def test_a_schedule_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="recipe seats: no exponential schedule over decoder layers 1, 2, 3 of 28 has"):
        plan(seats((1, 2, 3), 4, 28), 0.1, 28)
    with pytest.raises(UserError, match="recipe seats: schedule: 0 stages prune before the decoder; give entry for"):
        Recipe("seats", "", "", seats((1,), 4, 28, None).stages, schedule=Exponential(1.4))
    with pytest.raises(UserError, match="recipe seats: schedule: no stage prunes inside the decoder"):
        Recipe("seats", "", "", seats((1,), 4, 28).stages[:1], schedule=Exponential(1.4))


@pytest.mark.parametrize("schedule", [Exponential(), Exponential(None, 0.5)])
def test_a_schedule_is_written_and_read(schedule: Exponential) -> None:
    scheduled = Recipe("mine", "", "", load_recipe("fastv").stages, schedule=schedule)
    assert recipe_from_yaml(recipe_to_yaml(scheduled)).schedule == schedule


def test_a_shallow_model_drops_the_given_part() -> None:
    """Where the stages stand too late for the mean: of 8 layers all tokens run through 5, none through the last."""
    enter, shares = Exponential(1.4, drop=0.75).shares(0.05, [5, 6], 8, 7, "")
    assert (enter, shares[-1]) == (pytest.approx(0.2), pytest.approx(0.05))
    assert shares[0] == pytest.approx(0.2 * (1 - 0.75 / (1 + 2.718281828)))
