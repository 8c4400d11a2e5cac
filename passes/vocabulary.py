"""Look up the functions and signals a stage names, and refuse what does not fit, saying what does."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from secateur.compiler.learned import WeightsFile
from secateur.compiler.plan_recipe import PlannedStage
from secateur.compiler.recipe import Site, Stage, Term
from secateur.passes.methods.learned import TENSORS, Weights, load_weights
from secateur.passes.methods.registry import MERGES, SCORES, SELECTORS
from secateur.passes.signal_table import SIGNALS, Number, Option, TowerLayers
from secateur.runtime.errors import UserError

ROLES: dict[str, Mapping[str, Callable[..., Any]]] = {"score": SCORES, "select": SELECTORS, "merge": MERGES}
RESERVED = ("score", "scores", "k", "selection", "grid", "layout")
"""Parameters that receive the result of the step before (for a score: of the scores it is made of), the number of
tokens to keep, or how the tokens lie (:class:`Grid`, :class:`Layout`)."""


@dataclass(frozen=True)
class BoundTerm:
    """A vocabulary function with its options; ``signals`` and ``reserved`` are the parameters left to fill,
    ``optional`` those signals that may be None."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    signals: tuple[str, ...]
    reserved: tuple[str, ...]
    optional: tuple[str, ...] = ()
    of: tuple[BoundTerm, ...] = ()

    def every_signal(self) -> set[str]:
        """The signals of this function and of the scores it is made of."""
        return set(self.signals).union(*(term.every_signal() for term in self.of))

    def every_reserved(self) -> set[str]:
        """The same for reserved parameters."""
        return set(self.reserved).union(*(term.every_reserved() for term in self.of))

    def every_needed(self) -> set[str]:
        """The signals that may not be None."""
        return (set(self.signals) - set(self.optional)).union(*(term.every_needed() for term in self.of))


@dataclass(frozen=True)
class BoundStage:
    """The functions of a stage and every signal they need, with the signal's options filled in."""

    score: BoundTerm | None
    select: BoundTerm | None
    merge: BoundTerm | None
    signals: Mapping[str, Mapping[str, Any]]

    @property
    def terms(self) -> tuple[BoundTerm, ...]:
        return tuple(term for term in (self.score, self.select, self.merge) if term is not None)

    def needs(self, signal: str) -> bool:
        """Whether some function cannot do without ``signal``."""
        return any(signal in term.every_needed() for term in self.terms)


def bind_stage(stage: Stage | PlannedStage, where: str, weights: bool = True) -> BoundStage:
    """Resolve a stage's names. ``where`` opens the message of the :class:`UserError` raised on a misfit. Without
    ``weights`` files of learned weights may be missing: then the stage can be described, and not run."""
    score = bind_term("score", stage.score, f"{where}.score", weights) if stage.score else None
    select = bind_term("select", stage.select, f"{where}.select", weights) if stage.select else None
    merge = bind_term("merge", stage.merge, f"{where}.merge", weights) if stage.merge else None
    if select is None:
        if score is None or merge is not None:
            raise UserError(
                "a stage without a selector only scores", where=where, fix="give it a score and no merge, or a selector"
            )
    elif "score" in select.reserved and score is None:
        raise UserError(f"selector {select.name!r} needs a score", where=f"{where}.score", available=sorted(SCORES))
    elif score is not None and "score" not in select.reserved and (merge is None or "score" not in merge.reserved):
        raise UserError(
            f"selector {select.name!r} takes no score, but {score.name!r} is given",
            where=f"{where}.score",
            fix="leave the score out",
        )
    needed = sorted({name for term in (score, select, merge) if term for name in term.every_signal()})
    for name in stage.signals:
        if name not in needed:
            raise UserError(f"signal {name!r} is not used by this stage", where=f"{where}.signals", available=needed)
    signals = {name: bind_signal(name, stage.site, stage.signals.get(name, {}), where) for name in needed}
    return BoundStage(score, select, merge, signals)


def bind_term(role: str, term: Term, where: str, weights: bool = True) -> BoundTerm:
    """Resolve one function of ``role`` ("score", "select" or "merge") and check its options; ``weights`` as in
    :func:`bind_stage`."""
    registry = ROLES[role]
    if term.name not in registry:
        noun = {"select": "selector"}.get(role, role)
        raise UserError(f"no {noun} {term.name!r}", where=where, available=sorted(registry))
    function = registry[term.name]
    parameters = inspect.signature(function).parameters
    signals = tuple(name for name in parameters if name in SIGNALS)
    optional = tuple(name for name in signals if parameters[name].default is None)
    reserved = tuple(name for name in parameters if name in RESERVED)
    choices = [name for name in parameters if name not in signals and name not in reserved]
    hints = get_type_hints(function, include_extras=True)
    for name in choices:
        if hints.get(name) in (None, Tensor):
            raise UserError(
                f"{term.name} takes {name!r}, which is no signal" + (" and has no type" if name not in hints else ""),
                where=where,
                available=sorted(SIGNALS),
                fix="options need a type hint, such as float",
            )
    for name, value in term.options.items():
        if name not in choices:
            raise UserError(f"{term.name} has no option {name!r}", where=f"{where}.options", available=choices)
        _check_option(value, hints[name], f"{where}.options.{name}")
    options = {name: _load_option(value, hints[name]) for name, value in term.options.items()}
    for name in choices:
        if parameters[name].default is inspect.Parameter.empty and name not in term.options:
            if hints[name] is Weights:
                if not weights:
                    continue
                raise _ask_for_weights(term.name, name, where)
            raise UserError(f"{term.name} needs option {name!r}", where=f"{where}.options", available=choices)
    takes = (1, 1) if role == "score" and "score" in reserved else (1, 99) if "scores" in reserved else (0, 0)
    if not takes[0] <= len(term.of) <= takes[1]:
        wanted = {(0, 0): "no other score", (1, 1): "exactly one score"}.get(takes, "at least one score")
        raise UserError(f"{term.name} is made of {wanted}, not {len(term.of)}", where=f"{where}.of")
    of = tuple(bind_term("score", inner, f"{where}.of[{i}]", weights) for i, inner in enumerate(term.of))
    return BoundTerm(term.name, function, options, signals, reserved, optional, of)


def bind_signal(name: str, site: Site, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A signal's options with defaults filled in, after checking that the signal exists at ``site``.

    Options that mean nothing at the site (a tower layer in the decoder, projections in the tower) are left out.
    """
    signal, where = SIGNALS[name], f"{where}.signals.{name}"
    if site.kind not in signal.sites:
        raise UserError(f"signal {name!r} does not exist at {site}", where=where, available=signal.sites)
    usable = {option: spec for option, spec in signal.options.items() if _applies(option, spec, site.kind)}
    for option in options:
        if option not in usable:
            raise UserError(f"signal has no option {option!r} at {site}", where=where, available=usable)
    chosen = {option: _read_option(option, spec, options.get(option), where) for option, spec in usable.items()}
    before = set(signal.reads_layer_before)
    if site.layer == 0 and before & {site.kind, *(v for v in chosen.values() if isinstance(v, str))}:
        raise UserError(
            f"signal {name!r} reads the layer before {site}, and there is none",
            where=where,
            fix=f"use {site.kind}[1] or later" + (", or projections 'next'" if "projections" in usable else ""),
        )
    return chosen


def _applies(option: str, spec: Option, kind: str) -> bool:
    if isinstance(spec, TowerLayers):
        return kind in ("vision.out", "projector.out")
    return option not in ("projections", "rotary") or kind == "decoder.layer"


def _read_option(option: str, spec: Option, value: Any, where: str) -> Any:
    """The value of a signal's option: a choice, a number, or a tuple of layer names."""
    if isinstance(spec, Number):
        if value is None:
            return spec.default
        whole = isinstance(spec.default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value < spec.low:
            kind = "an integer" if whole else "a number"
            raise UserError(f"{option} must be {kind} of at least {spec.low:g}, not {value!r}", where=where)
        return value
    if isinstance(spec, TowerLayers):
        listed = spec.several and isinstance(value, (list, tuple)) and value
        named = ("read",) if value is None else tuple(map(str, value)) if listed else (str(value),)
        for layer in named:
            if not re.fullmatch(r"read|next|\d+(/[1-9]\d*)?", layer):
                raise UserError(f"no {option} {layer!r}", where=where, available=("read", "next", "3", "3/24"))
        return named
    if value is None:
        return spec[0]
    if value not in spec:
        raise UserError(f"no {option} {value!r}", where=where, available=spec)
    return value


def _ask_for_weights(function: str, option: str, where: str) -> UserError:
    wanted = f" that holds {TENSORS[function]}, floating-point, D the width of a token" if function in TENSORS else ""
    return UserError(
        f"{function} needs option {option!r}, a safetensors file{wanted}", where=f"{where}.options",
        fix=f"write --recipe NAME:{option}=FILE behind a row's name, or {option}: file:FILE in a recipe file",
    )  # fmt: skip


def _load_option(value: Any, hint: Any) -> Any:
    return load_weights(value) if hint is Weights else value


def _check_option(value: Any, hint: Any, where: str) -> None:
    if hint is Weights:
        if not isinstance(value, WeightsFile):
            raise UserError(
                f"{value!r} is no file of weights", where=where,
                fix="write file:PATH of a safetensors file; in Python read_weights('file:PATH')",
            )  # fmt: skip
        return
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"no choice {value!r}", where=where, available=get_args(hint))
        return
    if isinstance(value, list) and get_origin(hint) is tuple:
        value = tuple(value)  # as files spell it
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise UserError(f"must be {wanted}, not {value!r}", where=where) from None
