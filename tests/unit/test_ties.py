"""A tie excuses only the choices that interchanging equal scores leads to."""

from __future__ import annotations

import pytest
import torch

from secateur.compiler.plan_recipe import plan_recipe
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.compiler.ties import is_tied
from secateur.passes.stage import StageFunction, stage_function

N, K = 12, 4


def plan(select: str, score: str | None, images: int = 1) -> StageFunction:
    stage = Stage(Site("vision.out"), Term(select), Term(score) if score else None, share=K / N)
    planned = plan_recipe(
        Recipe("r", "t", "l", (stage,)), keep=None, images=images, tokens_per_image=N, vision_layers=2, decoder_layers=2
    )
    return stage_function(planned.stages[0])


@pytest.fixture
def ranked() -> torch.Tensor:
    """Scores 12, 11, …, 1 in which the fourth and the fifth token are equal."""
    score = torch.arange(N, 0, -1).float()[None]
    score[0, 4] = score[0, 3]
    return score


def test_either_of_two_equal_scores_may_stay(ranked: torch.Tensor) -> None:
    stage = plan("top_k", "cls_attention_mean")
    tokens = torch.zeros(1, N, 1)
    assert is_tied(stage, torch.tensor([0, 1, 2, 4]), ranked, {"tokens": tokens})
    assert is_tied(stage, torch.tensor([0, 1, 2, 3]), ranked, {"tokens": tokens})


@pytest.mark.parametrize("wrong", [[0, 1, 2, 5], [1, 2, 3, 4], [8, 9, 10, 11]])
def test_a_tie_at_the_cut_excuses_no_other_choice(ranked: torch.Tensor, wrong: list[int]) -> None:
    assert not is_tied(plan("top_k", "cls_attention_mean"), torch.tensor(wrong), ranked, {})


def test_tokens_of_score_zero_are_alike_and_worse_than_others() -> None:
    """Outside a sliding window nothing is attended to: 30 tokens, of which more choices are as good than are tried."""
    stage = Stage(Site("vision.out"), Term("top_k"), Term("cls_attention_mean"), share=K / 30)
    planned = plan_recipe(
        Recipe("r", "t", "l", (stage,)), keep=None, images=1, tokens_per_image=30, vision_layers=2, decoder_layers=2
    )
    function, score = stage_function(planned.stages[0]), torch.zeros(1, 30)
    score[0, :2] = torch.tensor([3.0, 2.0])
    assert is_tied(function, torch.tensor([0, 1, 17, 29]), score, {})
    assert not is_tied(function, torch.tensor([0, 2, 17, 29]), score, {})
    assert not is_tied(function, torch.tensor([3, 5, 17, 29]), torch.zeros(1, 30), {}), "a constant is no score"


def test_every_image_must_be_explained(ranked: torch.Tensor) -> None:
    stage, clear = plan("top_k", "cls_attention_mean", images=2), torch.arange(N, 0, -1).float()[None]
    score, tokens = torch.cat([ranked, clear]), torch.zeros(2, N, 1)
    assert is_tied(stage, torch.tensor([0, 1, 2, 4, 12, 13, 14, 15]), score, {"tokens": tokens})
    assert not is_tied(stage, torch.tensor([0, 1, 2, 4, 12, 13, 14, 16]), score, {"tokens": tokens})


def test_targets_follow_from_a_tie_among_the_dominant(ranked: torch.Tensor) -> None:
    stage = plan("top_k_and_uniform", "cls_attention_mean")
    score = ranked.clone()
    score[0, 3] = score[0, 2]  # the cut of the three dominant ones lies between tokens 2 and 3
    for order in (score, score.index_fill(1, torch.tensor([3]), float(score[0, 2]) + 1e-3)):
        kept = stage.choose({"score": order})[0]
        assert is_tied(stage, kept, score, {})
    assert not is_tied(stage, torch.tensor([0, 1, 2, 11]), score, {})


def test_greedy_choices_are_replayed_step_by_step() -> None:
    torch.manual_seed(0)
    stage, tokens = plan("max_min", None), torch.randn(1, N, 16)
    kept = stage({"tokens": tokens}).keep[0]
    assert is_tied(stage, kept, None, {"tokens": tokens})
    other = kept.clone()
    other[-1] = next(t for t in range(N) if t not in kept.tolist())
    assert not is_tied(stage, other.sort().values, None, {"tokens": tokens})
    twin = tokens.clone()
    spare = next(t for t in range(N) if t not in kept.tolist())
    twin[0, spare] = twin[0, kept[0]]  # two equal tokens: either may stand for both
    chosen = stage({"tokens": twin}).keep[0]
    swapped = [spare if t == int(kept[0]) else int(kept[0]) if t == spare else t for t in chosen.tolist()]
    assert is_tied(stage, torch.tensor(sorted(swapped)), None, {"tokens": twin})


def test_a_tie_at_the_edge_of_a_quota() -> None:
    """A score that lifts what quotas pick puts one of two equal tokens far above the other."""
    attention = Term("last_query_attention_mean", {"heads": "mean"})
    lifted = Term("window_modality_quotas", {"temperature": 100.0}, of=(attention,))
    row = Stage(Site("decoder.layer", 1), Term("top_k"), lifted, share=0.5, scope="whole")
    planned = plan_recipe(
        Recipe("r", "t", "l", (row,)), keep=None, images=4, tokens_per_image=6, vision_layers=2, decoder_layers=2
    )
    stage = stage_function(planned.stages[0])
    source = torch.Generator().manual_seed(0)
    signals = {
        "last_query_attention": torch.softmax(torch.randn(1, 1, 24, generator=source), 2),
        "source": torch.arange(24)[None],
    }
    weight = signals["last_query_attention"][0, 0]

    def in_first_window() -> tuple[list[int], list[int]]:
        """Tokens of the first two images that stay and that go, the lightest first."""
        kept = stage(signals).keep[0].tolist()
        order = weight[:12].argsort().tolist()
        return [t for t in order if t in kept], [t for t in order if t not in kept]

    stays, goes = in_first_window()
    weight[goes[-1]] = weight[stays[0]]
    stays, goes = in_first_window()
    kept = stage(signals).keep[0].tolist()
    assert weight[goes[-1]] == weight[stays[0]]
    for other, tied in ((goes[-1], True), (goes[0], False)):
        swapped = sorted({*kept, other} - {stays[0]})
        assert is_tied(stage, torch.tensor(swapped), stage.score(signals), signals) is tied


def test_a_tie_at_the_edge_of_what_a_score_puts_first() -> None:
    """Ranks stand an order of one apart, however near the scores were: the signals say that two tokens are tied."""
    row = Stage(Site("decoder.layer", 1), Term("top_k"), Term("carried_then_question"), share=K / N, scope="whole")
    planned = plan_recipe(
        Recipe("r", "t", "l", (row,)), keep=None, images=1, tokens_per_image=N, vision_layers=2, decoder_layers=2
    )
    stage, source = stage_function(planned.stages[0]), torch.Generator().manual_seed(0)
    carried = torch.arange(N, 0, -1).float()[None] * 1e-3
    tokens = torch.eye(N)[None]
    signals = {
        "carried": carried,
        "tokens": tokens,
        "text_tokens": tokens[:, 5:6] + 0.01 * torch.randn(1, 1, N, generator=source),
        "text_rows": torch.ones(1, 1, dtype=torch.bool),
    }
    assert stage(signals).keep.tolist() == [[0, 1, 2, 5]]
    carried[0, 3] = carried[0, 2]
    assert is_tied(stage, torch.tensor([0, 1, 3, 5]), stage.score(signals), signals)
    assert not is_tied(stage, torch.tensor([0, 1, 4, 5]), stage.score(signals), signals)
