"""Options of the first functions that no row of the table uses, against slow loops."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from secateur.compiler.plan_recipe import PlannedStage, plan_recipe
from secateur.passes.methods.merge import nearest_target
from secateur.passes.methods.score import cls_attention_mean, last_query_attention_mean
from secateur.passes.methods.select import Selection, max_min
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import stage_function

from .reference_methods import keep_most_attended, merge_into_targets

HEADS, WIDTH, KEY_WIDTH = 3, 12, 5


def random_signals(groups: int, count: int, seed: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(groups, count, WIDTH, generator=source),
        "keys": torch.randn(groups, HEADS, count, KEY_WIDTH, generator=source),
        "cls_attention": torch.rand(groups, HEADS, count, generator=source).softmax(-1),
        "last_query_attention": torch.rand(groups, HEADS, count, generator=source).softmax(-1),
    }


def planned_stages(name: str, count: int, keep: float | None) -> tuple[PlannedStage, ...]:
    recipe = RECIPES[name]
    plan = plan_recipe(recipe, keep=keep, images=1, tokens_per_image=count, vision_layers=24, decoder_layers=32)
    return plan.stages


def test_random_row_is_a_seeded_shuffle() -> None:
    (planned,) = planned_stages("random", 20, 0.4)
    signals = random_signals(3, 20, seed=1)
    kept = stage_function(planned)(signals).keep
    source = random.Random(0)
    draws = [source.random() for _ in range(20)]
    shuffled = sorted(range(20), key=lambda token: draws[token])
    assert kept[0].tolist() == [token for token in range(20) if shuffled[token] >= 20 - 8]
    assert (kept == kept[0]).all(), "what an image loses depends on its place in the batch"


@pytest.mark.parametrize("heads", ["mean", "sum", "max"])
def test_head_reductions(heads: str) -> None:
    attention = random_signals(2, 11, seed=3)["cls_attention"]
    for score in (cls_attention_mean(attention, heads=heads), last_query_attention_mean(attention, heads=heads)):
        for group in range(2):
            kept = sorted(score[group].topk(4).indices.tolist())
            assert kept == keep_most_attended(attention[group].numpy(), 4, heads)


@pytest.mark.parametrize("average", ["assigned", "all"])
def test_merge_without_marked_targets_folds_into_every_survivor(average: str) -> None:
    signals = random_signals(2, 17, seed=4)
    keep = torch.tensor([[0, 5, 16], [2, 3, 9]])
    mix = nearest_target(Selection(keep), signals["keys"], average=average)
    for group in range(2):
        tokens, keys = signals["tokens"][group], signals["keys"][group].numpy()
        rows = merge_into_targets(tokens.numpy(), keys, [], keep[group].tolist(), average)
        np.testing.assert_allclose((mix[group] @ tokens).numpy(), rows, atol=1e-5)


def test_max_min_may_start_from_the_first_token() -> None:
    tokens = random_signals(2, 15, seed=5)["tokens"]
    assert (max_min(tokens, 1, first="first_token").keep == 0).all()
    second = max_min(tokens, 2, first="first_token").keep[:, 1]
    for group in range(2):
        unit = torch.nn.functional.normalize(tokens[group], dim=-1)
        assert second[group] == (1 - unit @ unit[0]).argmax()


def test_max_min_never_takes_a_token_twice() -> None:
    """Only two different tokens: after both are taken every distance is zero up to rounding."""
    pair = random_signals(1, 2, seed=6)["tokens"]
    tokens = pair[:, [0, 1, 0, 1, 1, 0, 0, 1]]
    kept = max_min(tokens, 5).keep[0].tolist()
    assert len(set(kept)) == 5
