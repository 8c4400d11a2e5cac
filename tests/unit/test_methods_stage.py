"""A stage's names resolve to functions, or the error says what exists."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from secateur.compiler.layout import Grid, Layout
from secateur.compiler.plan_recipe import PlannedStage
from secateur.compiler.recipe import Site, Term
from secateur.compiler.site import SITE_KINDS
from secateur.passes.recipes import RECIPES
from secateur.passes.signal_table import SIGNALS
from secateur.passes.stage import stage_function
from secateur.passes.vocabulary import RESERVED, ROLES
from secateur.runtime.errors import UserError

from .rows import ready


def planned(**changes: Any) -> PlannedStage:
    fields: dict[str, Any] = {
        "index": 0,
        "site": Site("vision.out"),
        "score": Term("cls_attention_mean"),
        "select": Term("top_k"),
        "merge": None,
        "scope": "image",
        "positions": "compact",
        "signals": {},
        "groups": 1,
        "length_in": 10,
        "length_out": 4,
    }
    return PlannedStage(**{**fields, **changes})


def decoder(index: int, **options: str) -> dict[str, Any]:
    return {
        "site": Site("decoder.layer", index),
        "score": Term("last_query_attention_mean"),
        "signals": {"last_query_attention": options},
    }


def test_signals_are_sorted_and_options_filled_in() -> None:
    merging = planned(select=Term("top_k_and_uniform"), merge=Term("nearest_target"))
    assert stage_function(merging).signals == ("cls_attention", "keys")
    assert stage_function(merging).signal_options == {
        "cls_attention": {"layer": ("read",), "heads": "split"},
        "keys": {"layer": ("read",)},
    }
    options = stage_function(planned(**decoder(2))).signal_options
    assert options == {"last_query_attention": {"projections": "previous"}}
    options = stage_function(planned(**decoder(2, projections="own"))).signal_options
    assert options == {"last_query_attention": {"projections": "own"}}
    assert stage_function(planned(score=None, select=Term("max_min"))).signals == ("tokens",)


def test_options_reach_the_function() -> None:
    attention = torch.tensor([[[0.9, 0.0, 0.5], [0.0, 0.0, 0.5]]])
    for heads, kept in (("max", 0), ("mean", 2)):
        stage = planned(score=Term("cls_attention_mean", {"heads": heads}), length_in=3, length_out=1)
        assert stage_function(stage)({"cls_attention": attention}).keep.tolist() == [[kept]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"score": Term("attention")},
            f"stage0.score: no score 'attention' (available: {', '.join(sorted(ROLES['score']))})",
        ),
        (
            {"select": Term("top")},
            f"stage0.select: no selector 'top' (available: {', '.join(sorted(ROLES['select']))})",
        ),
        (
            {"merge": Term("mean")},
            f"stage0.merge: no merge 'mean' (available: {', '.join(sorted(ROLES['merge']))})",
        ),
        (
            {"score": Term("cls_attention_mean", {"head": "max"})},
            "stage0.score.options: cls_attention_mean has no option 'head' (available: heads)",
        ),
        (
            {"score": Term("cls_attention_mean", {"heads": "median"})},
            "stage0.score.options.heads: no choice 'median' (available: mean, sum, max)",
        ),
        (
            {"score": Term("seeded_random", {"seed": 0.5})},
            "stage0.score.options.seed: must be a valid integer, not 0.5",
        ),
        (
            {"select": Term("top_k_and_uniform", {"contextual": 1.0})},
            "stage0.select.options.contextual: must be less than 1, not 1.0",
        ),
        (
            {"score": None},
            f"stage0.score: selector 'top_k' needs a score (available: {', '.join(sorted(ROLES['score']))})",
        ),
        (
            {"select": Term("max_min")},
            "stage0.score: selector 'max_min' takes no score, but 'cls_attention_mean' is given; leave the score out",
        ),
        (
            {"site": Site("decoder.layer", 2)},
            "stage0.signals.cls_attention: signal 'cls_attention' does not exist at decoder.layer[2] "
            "(available: vision.layer, vision.out, projector.out)",
        ),
        (
            {**decoder(2), "site": Site("projector.out")},
            "stage0.signals.last_query_attention: signal 'last_query_attention' does not exist at projector.out "
            "(available: decoder.layer)",
        ),
        (
            decoder(2, projections="last"),
            "stage0.signals.last_query_attention: no projections 'last' (available: previous, next, own)",
        ),
        (
            decoder(2, layer="2"),
            "stage0.signals.last_query_attention: signal has no option 'layer' at decoder.layer[2] "
            "(available: projections)",
        ),
        (
            {"signals": {"keys": {}}},
            "stage0.signals: signal 'keys' is not used by this stage (available: cls_attention)",
        ),
        (
            decoder(0),
            "stage0.signals.last_query_attention: signal 'last_query_attention' reads the layer before "
            "decoder.layer[0], and there is none; use decoder.layer[1] or later, or projections 'next'",
        ),
        (
            {"site": Site("vision.layer", 0)},
            "stage0.signals.cls_attention: signal 'cls_attention' reads the layer before vision.layer[0], "
            "and there is none; use vision.layer[1] or later",
        ),
    ],
)
def test_misfits_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        stage_function(planned(**changes))
    assert str(caught.value) == message


def test_layer_zero_serves_what_the_next_layer_computes() -> None:
    stage = stage_function(planned(**decoder(0, projections="next")))
    assert stage.signal_options["last_query_attention"] == {"projections": "next"}


def test_every_function_is_described_by_its_signature() -> None:
    """Signals, reserved words, or options with a default: nothing else, so that a recipe can name everything."""
    for role, registry in ROLES.items():
        for name, function in registry.items():
            assert function.__name__ == name
            assert function.__doc__
            for parameter in inspect.signature(function).parameters.values():
                learned = parameter.annotation == "Weights"  # a file every recipe must name
                if parameter.name not in SIGNALS and parameter.name not in RESERVED and not learned:
                    assert parameter.default is not inspect.Parameter.empty, f"{role} {name}: {parameter.name}"


def test_signal_table_is_sound() -> None:
    for name, signal in SIGNALS.items():
        assert signal.name == name
        assert set(signal.sites) <= set(SITE_KINDS)
        choices = {choice for options in signal.options.values() if isinstance(options, tuple) for choice in options}
        assert set(signal.reads_layer_before) <= choices | set(signal.sites)


def test_every_row_of_the_table_resolves() -> None:
    for name in RECIPES:
        for stage in ready(name).stages:
            fields = {name: getattr(stage, name) for name in ("site", "score", "select", "merge", "signals")}
            known = {"grid": Grid(1, 2, 5), "layout": Layout((0,) * 10, (0, 1) * 5)}
            assert stage_function(planned(**fields, **known)).signals
