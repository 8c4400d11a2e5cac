"""Recipes, functions and signals as plain data, for people who choose among them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from secateur.compiler.recipe import Recipe, Stage, Term
from secateur.passes.recipe_file import recipe_to_data
from secateur.passes.signal_table import SIGNALS, Number, Option, TowerLayers


@dataclass(frozen=True)
class Function:
    """A word of the vocabulary. ``options`` maps an option's name to its type and default, ``takes`` are the signals
    and reserved parameters it receives."""

    role: str
    name: str
    summary: str
    options: dict[str, str]
    takes: tuple[str, ...]


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its file would hold it, and what follows from that: ``keep``, the published ratio; ``sites``; and
    ``signals``, of every stage with all options filled in."""
    stages = [(index, stage, _bind(recipe, index, stage)) for index, stage in enumerate(recipe.stages)]
    signals = [
        {"stage": index, "name": name, "shape": SIGNALS[name].shape, "options": _plain(bound.signals[name])}
        for index, _, bound in stages
        for name in sorted(bound.signals)
    ]
    sites = [stage.site.written for stage in recipe.stages]
    return recipe_to_data(recipe) | {"keep": recipe.default_keep, "sites": sites, "signals": signals}


def describe_term(role: str, term: Term) -> str:
    """What a stage's function does: the first sentence about it, and about those it is made of."""
    from secateur.passes.vocabulary import ROLES

    function = ROLES[role].get(term.name)
    own = summarize(function) if function else ""
    inner = [describe_term("score", part) for part in term.of]
    return " ".join(filter(None, [own, *(f"Of: {text}" for text in inner)]))


def list_functions() -> list[Function]:
    """Every score, selector and merge, by role and name."""
    from secateur.passes.vocabulary import RESERVED, ROLES

    found = []
    for role, functions in ROLES.items():
        for name, function in sorted(functions.items()):
            parameters = inspect.signature(function).parameters
            takes = tuple(p for p in parameters if p in SIGNALS or p in RESERVED)
            hints = get_type_hints(function)
            options = {
                p: _show_type(hints[p]) + ("" if spec.default is inspect.Parameter.empty else f" = {spec.default!r}")
                for p, spec in parameters.items()
                if p not in takes
            }
            found.append(Function(role, name, summarize(function), options, takes))
    return found


def list_signals() -> list[dict[str, Any]]:
    """Every signal: name, shape, sites, options, and what it is."""
    return [
        {
            "name": signal.name,
            "shape": signal.shape,
            "sites": list(signal.sites),
            "options": {name: show_option(name, option) for name, option in signal.options.items()},
            "doc": signal.doc,
        }
        for signal in SIGNALS.values()
    ]


def show_option(name: str, option: Option) -> str:
    """What an option of a signal takes, the default first."""
    if isinstance(option, Number):
        return f"{option.default:g}; a number of at least {option.low:g}"
    if isinstance(option, TowerLayers):
        return "read; next, 3/24 or 3" + (", or a list of those" if option.several else "")
    return ", ".join(option)


def summarize(function: Callable[..., Any]) -> str:
    """The first sentence of a function's docstring."""
    text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text)[0]


def _bind(recipe: Recipe, index: int, stage: Stage) -> Any:
    from secateur.passes.vocabulary import bind_stage

    return bind_stage(stage, f"recipe {recipe.name}: stages[{index}]", weights=False)


def _plain(options: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _show_type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return re.sub(r"\btyping\.|\bNoneType\b", lambda m: "None" if m[0] == "NoneType" else "", text)
