"""Look up the functions and signals a stage names, and refuse what does not fit, saying what does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from secateur.compiler.recipe import PlannedStage, Site, Stage, Term
from secateur.passes.methods.merge import MERGES
from secateur.passes.methods.score import SCORES
from secateur.passes.methods.select import SELECTORS
from secateur.passes.signal_table import SIGNALS
from secateur.runtime.errors import UserError

ROLES: dict[str, Mapping[str, Callable[..., Any]]] = {"score": SCORES, "select": SELECTORS, "merge": MERGES}
RESERVED = ("score", "k", "selection")
"""Parameters that receive the result of the step before, or the number of tokens to keep."""


@dataclass(frozen=True)
class BoundTerm:
    """A vocabulary function with its options; ``signals`` and ``reserved`` are the parameters left to fill."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    signals: tuple[str, ...]
    reserved: tuple[str, ...]


@dataclass(frozen=True)
class BoundStage:
    """The functions of a stage and every signal they need, with the signal's options filled in."""

    score: BoundTerm | None
    select: BoundTerm
    merge: BoundTerm | None
    signals: Mapping[str, Mapping[str, str]]


def bind_stage(stage: Stage | PlannedStage, where: str) -> BoundStage:
    """Resolve a stage's names. ``where`` opens the message of the :class:`UserError` raised on a misfit."""
    score = bind_term("score", stage.score, f"{where}.score") if stage.score else None
    select = bind_term("select", stage.select, f"{where}.select")
    merge = bind_term("merge", stage.merge, f"{where}.merge") if stage.merge else None
    if "score" in select.reserved and score is None:
        raise UserError(f"selector {select.name!r} needs a score", where=f"{where}.score", available=sorted(SCORES))
    if score is not None and "score" not in select.reserved:
        raise UserError(
            f"selector {select.name!r} takes no score, but {score.name!r} is given",
            where=f"{where}.score",
            fix="leave the score out",
        )
    needed = sorted({name for term in (score, select, merge) if term for name in term.signals})
    for name in stage.signals:
        if name not in needed:
            raise UserError(f"signal {name!r} is not used by this stage", where=f"{where}.signals", available=needed)
    signals = {name: bind_signal(name, stage.site, stage.signals.get(name, {}), where) for name in needed}
    return BoundStage(score, select, merge, signals)


def bind_term(role: str, term: Term, where: str) -> BoundTerm:
    """Resolve one function of ``role`` ("score", "select" or "merge") and check its options."""
    registry = ROLES[role]
    if term.name not in registry:
        noun = {"select": "selector"}.get(role, role)
        raise UserError(f"no {noun} {term.name!r}", where=where, available=sorted(registry))
    function = registry[term.name]
    parameters = inspect.signature(function).parameters
    signals = tuple(name for name in parameters if name in SIGNALS)
    reserved = tuple(name for name in parameters if name in RESERVED)
    choices = [name for name in parameters if name not in signals and name not in reserved]
    hints = get_type_hints(function, include_extras=True)
    for name, value in term.options.items():
        if name not in choices:
            raise UserError(f"{term.name} has no option {name!r}", where=f"{where}.options", available=choices)
        _check_option(value, hints[name], f"{where}.options.{name}")
    for name in choices:
        if parameters[name].default is inspect.Parameter.empty and name not in term.options:
            raise UserError(f"{term.name} needs option {name!r}", where=f"{where}.options", available=choices)
    return BoundTerm(term.name, function, dict(term.options), signals, reserved)


def bind_signal(name: str, site: Site, options: Mapping[str, Any], where: str) -> dict[str, str]:
    """A signal's options with defaults filled in, after checking that the signal exists at ``site``."""
    signal, where = SIGNALS[name], f"{where}.signals.{name}"
    if site.kind not in signal.sites:
        raise UserError(f"signal {name!r} does not exist at {site}", where=where, available=signal.sites)
    for option, value in options.items():
        if option not in signal.options:
            raise UserError(f"signal has no option {option!r}", where=where, available=signal.options)
        if value not in signal.options[option]:
            raise UserError(f"no {option} {value!r}", where=where, available=signal.options[option])
    chosen = {option: str(options.get(option, choices[0])) for option, choices in signal.options.items()}
    if site.layer == 0 and {site.kind, *chosen.values()} & set(signal.reads_layer_before):
        raise UserError(
            f"signal {name!r} reads the layer before {site}, and there is none",
            where=where,
            fix=f"use {site.kind}[1] or later" + (", or projections 'next'" if signal.options else ""),
        )
    return chosen


def _check_option(value: Any, hint: Any, where: str) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"no choice {value!r}", where=where, available=get_args(hint))
        return
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise UserError(f"must be {wanted}, not {value!r}", where=where) from None
