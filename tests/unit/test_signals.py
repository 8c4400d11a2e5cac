"""Every signal at every site, with every option: what the compiled graph computes is what the oracle sees.

A stage's score is a sum over signals, and its merge adds to each survivor a mean of all tokens by their scores, so
that a wrong number in any signal shows in the rows the stage leaves: as another direction, which no norm takes away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.compiler.bundle import outline
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import KINDS, TOLERANCE, Parity, compare_runs, expected_kinds
from secateur.compiler.pipeline import RECIPES, Geometry, Recipe, prune, read_source, trace_model
from secateur.compiler.recipe import Site, Stage, Term
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.trace import Traced
from secateur.passes.methods import own
from secateur.passes.methods.rows import take_rows
from secateur.passes.methods.select import Selection
from secateur.passes.signal_table import SIGNALS
from secateur.runtime.request import Request

from . import tiny_internvl
from .own_words import forget_own


def ramp(count: int) -> Tensor:
    """Weights of both signs, no two alike."""
    return torch.cos(torch.arange(count, dtype=torch.float32) * 1.7 + 0.3)


def over_heads(value: Tensor) -> Tensor:
    return (value * ramp(value.shape[1])[:, None]).sum(1)


def over_width(value: Tensor) -> Tensor:
    return (value * ramp(value.shape[-1])).sum(-1)


def over_keys(value: Tensor, rows: Tensor) -> Tensor:
    """``[G,H,R,N]`` over the rows that count."""
    return over_heads((value * rows[:, None, :, None]).sum(2))


def over_slots(value: Tensor, slots: Tensor) -> Tensor:
    """``[G,2,L,D]`` at the prunable slots, and how they compare with all real ones."""
    return over_heads(over_width(value)).gather(1, slots)


# Per signal: what else it is read with, and how it becomes one number per token.
REDUCE: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    **dict.fromkeys(("tokens", "normed_tokens", "projector_inputs"), ((), over_width)),
    **{n: ((), lambda v: v.float()) for n in ("size", "source", "carried")},
    **dict.fromkeys(("cls_attention", "received_attention", "last_query_attention"), ((), over_heads)),
    **{n: ((), lambda v: over_heads(v.flatten(1, 2))) for n in ("cls_attention_layers", "received_attention_layers")},
    "self_attention": ((), lambda v: over_heads((v * ramp(v.shape[2])[:, None]).sum(2))),
    **{n: ((), lambda v: over_heads(over_width(v))) for n in ("queries", "keys", "values", "probe_slopes")},
    "cls_values": (("values",), lambda v, values: over_heads(over_width(values * v[:, :, None]))),
    "text_attention": (("text_rows",), lambda v, rows: over_keys(v.clamp(min=-50), rows)),
    "text_to_text_attention": (
        ("text_rows", "text_attention"),
        lambda v, rows, attention: over_keys(attention.clamp(min=-50), over_keys(v, rows) * rows),
    ),
    "text_tokens": (("text_rows", "tokens"), lambda v, rows, t: (t @ (v * rows[..., None]).sum(1)[..., None])[..., 0]),
    "normed_text": (
        ("text_rows", "normed_tokens"),
        lambda v, rows, t: (t @ (v * rows[..., None]).sum(1)[..., None])[..., 0],
    ),
    "text_keys": (
        ("text_rows", "keys"),
        lambda v, rows, k: over_heads((k @ (v * rows[:, None, :, None]).sum(2)[..., None])[..., 0]),
    ),
    "text_rows": (("tokens",), lambda v, t: over_width(t) * v.sum(1, keepdim=True)),
    "attention_logits": (
        ("slots", "real_slots"),
        lambda v, slots, real: over_heads(
            (torch.softmax(v, -1) * real[:, None, :, None]).sum(2) / real.sum(1)[:, None, None]
        ).gather(1, slots),
    ),
    "slots": ((), lambda v: v.float()),
    "real_slots": (("tokens",), lambda v, t: over_width(t) * v.sum(1, keepdim=True)),
    **dict.fromkeys(("branch_inputs", "branch_outputs"), (("slots",), over_slots)),
}


@pytest.fixture(autouse=True, scope="module")
def _vocabulary() -> Any:
    """Scores named ``read_SIGNAL``, their sum, and the merge that shows a score."""
    for name, (others, reduce) in REDUCE.items():

        def read(*, _names: tuple[str, ...] = (name, *others), _reduce: Any = reduce, **given: Tensor) -> Tensor:
            value: Tensor = _reduce(*(given[n] if n in ("slots", _names[0]) else given[n].float() for n in _names))
            return value / value.abs().amax(1, keepdim=True).clamp_min(1e-3)

        wanted = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=Tensor) for n in (name, *others)]
        read.__signature__ = inspect.Signature(wanted)  # type: ignore[attr-defined]
        read.__annotations__ = dict.fromkeys((name, *others), Tensor)
        read.__name__ = f"read_{name}"
        own.score(read)

    @own.score
    def added(scores: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([s * (1 + 0.1 * i) for i, s in enumerate(scores)]).sum(0)

    @own.merge
    def pulled(selection: Selection, score: Tensor) -> Tensor:
        scaled = score / score.abs().amax(1, keepdim=True)
        whole = torch.diag_embed(1 + 0.1 * scaled) + 0.5 * torch.softmax(2 * scaled, 1)[:, None]
        return take_rows(whole, selection.keep)

    yield
    forget_own()


def stage(site: Site, *, share: float, scope: Any = "image", without: tuple[str, ...] = (), **options: Any) -> Stage:
    """All signals of ``site``, each read with ``options`` as far as it has them."""
    names = [n for n, s in SIGNALS.items() if site.kind in s.sites and n not in without]
    parts = tuple(Term(f"read_{n}") for n in names)
    signals: dict[str, dict[str, Any]] = {}
    for name in names:
        chosen = {o: v for o, v in options.items() if o in SIGNALS[name].options}
        if chosen:
            signals[name] = chosen
    return Stage(
        site, select=Term("top_k"), score=Term("added", of=parts), merge=Term("pulled"), share=share, scope=scope,
        signals=signals,
    )  # fmt: skip


TOWER = ("carried", "cls_attention_layers", "received_attention_layers")
CASES = {
    "tower": (stage(Site("vision.layer", 1), share=0.5, without=("carried",)),),
    "tower twice": (
        stage(Site("vision.layer", 1), share=0.7, without=("carried",)),
        stage(Site("vision.out"), share=0.4),
    ),
    "after the tower": (stage(Site("vision.out"), share=0.5, without=("carried",)),),
    "the layer behind": (stage(Site("vision.out"), share=0.5, without=TOWER, layer="next", heads="joint"),),
    "several layers": (stage(Site("vision.out"), share=0.5, without=("carried",), layers=["0", "read"], layer="0"),),
    "after the projector": (
        stage(Site("projector.out"), share=0.5, without=("carried",), directions=3, seed=5, step=0.02),
    ),
    "previous": (stage(Site("decoder.layer", 1), share=0.5, without=("carried",)),),
    "next": (stage(Site("decoder.layer", 2), share=0.5, without=("carried",), projections="next", softmax="none"),),
    "own": (
        stage(Site("decoder.layer", 2), share=0.5, scope="whole", without=("carried",), projections="own",
              rotary="none", which="all"),
    ),
    "across programs": (
        stage(Site("vision.out"), share=0.7, without=("carried",)),
        stage(Site("decoder.layer", 1), share=0.5, rotary="none"),
        stage(Site("decoder.layer", 3), share=0.2, scope="whole", projections="next"),
    ),
}  # fmt: skip


def test_every_signal_is_read() -> None:
    assert set(REDUCE) == set(SIGNALS)


@pytest.mark.parametrize(
    ("case", "positions"), [*((case, "original") for case in CASES), ("across programs", "compact")]
)
def test_compiled_signals_are_the_oracles(
    case: str, positions: Any, traced: Callable[..., Any], model_dir: Callable[..., Path]
) -> None:
    recipe = Recipe(case, case, "", CASES[case], positions=positions)
    hold_against_oracle(traced("llama", "fp32", 2, 2), recipe)


@pytest.mark.parametrize("case", ["after the tower", "several layers", "after the projector", "across programs"])
def test_compiled_signals_of_squares_of_patches_are_the_oracles(case: str, squares: Traced) -> None:
    hold_against_oracle(squares, Recipe(case, case, "", CASES[case]))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """A traced model that makes one visual token of two by two patches."""
    path = tiny_internvl.write_model(tmp_path_factory.mktemp("internvl") / "model")
    return trace_model(read_source(path), Geometry(batch=2, images=2, text_tokens=16, new_tokens=4))


def hold_against_oracle(trace: Traced, recipe: Recipe) -> None:
    pruned = prune(trace, recipe, expose=True)
    told = outline(pruned.job, pruned.programs)
    ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, Weights(trace.source, trace.model)), told))
    found = Parity(expects=expected_kinds(recipe))
    compare_runs(ours, OracleRun(Oracle(pruned.job)), random_rows(told, 4, 2, seed=1), 2, found)
    assert found.passed, found
    assert max(getattr(found, kind) for kind in KINDS) <= TOLERANCE, found
    assert found.kind("logits").scale > 0.1, "a comparison of zeros proves nothing"


def test_table_rows_are_untouched() -> None:
    assert "read_tokens" not in str(RECIPES)
