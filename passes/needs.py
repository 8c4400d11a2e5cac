"""What some recipes need besides a model: a file of learned weights, which whoever compiles one brings; sound."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

from secateur.compiler.learned import WeightsFile, read_weights
from secateur.compiler.recipe import Recipe, Term
from secateur.passes.methods.learned import Weights
from secateur.passes.methods.windows_in_time import NEED_SOUND
from secateur.passes.vocabulary import ROLES
from secateur.runtime.errors import UserError


def needs_weights(recipe: Recipe) -> bool:
    """Whether a function of ``recipe`` reads learned weights and no file is given for it."""
    terms = [
        (role, term)
        for stage in recipe.stages
        for role, term in (("score", stage.score), ("select", stage.select), ("merge", stage.merge))
        if term is not None
    ]
    return any(_missing(role, inner) for role, term in terms for inner in _walk(term))


def needs_sound(recipe: Recipe) -> bool:
    """Whether a score of ``recipe`` means nothing where nothing is heard."""
    return any(stage.score is not None and listens(stage.score) for stage in recipe.stages)


def listens(term: Term) -> str:
    """The first function of ``term``, and of the scores it is made of, that means nothing without sound; or ""."""
    return next((inner.name for inner in _walk(term) if inner.name in NEED_SOUND), "")


def with_weights(recipe: Recipe, path: Path, where: str = "weights") -> Recipe:
    """``recipe`` with the safetensors file at ``path`` for every function that lacks one. The recipe's digest covers
    the file's name and content, not its folder. Raises UserError where no function lacks one, or the file is none."""
    if not needs_weights(recipe):
        raise UserError(f"recipe {recipe.name} waits for no file of weights", where=where, fix="leave :weights= out")
    file = read_weights(f"file:{path.name}", path.parent, where)

    def fill(role: str, term: Term | None) -> Term | None:
        return None if term is None else _fill(role, term, file)

    stages = tuple(
        replace(s, score=fill("score", s.score), select=fill("select", s.select), merge=fill("merge", s.merge))
        for s in recipe.stages
    )
    return replace(recipe, stages=stages)


def _walk(term: Term) -> Iterator[Term]:
    yield term
    for inner in term.of:
        yield from _walk(inner)


def _missing(role: str, term: Term) -> list[str]:
    """The options of a function that take weights and have none."""
    function = ROLES[role].get(term.name)
    if function is None:
        return []
    hints = get_type_hints(function, include_extras=True)
    return [
        name for name, parameter in inspect.signature(function).parameters.items()
        if hints.get(name) is Weights and parameter.default is parameter.empty and name not in term.options
    ]  # fmt: skip


def _fill(role: str, term: Term, file: WeightsFile) -> Term:
    options = {**term.options, **dict.fromkeys(_missing(role, term), file)}
    return Term(term.name, options, tuple(_fill("score", inner, file) for inner in term.of))
