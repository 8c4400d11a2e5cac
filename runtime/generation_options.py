"""How a prompt is answered: as the caller asks, else as the checkpoint says, else by transformers' own defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.generation_fields import APPLIED, LEFT_OUT, WITHOUT_SAY
from secateur.runtime.sampling import Sampling

DEFAULTS_FILE = "generation_config.json"
DEFAULTS = {"temperature": 1.0, "top_k": 50}
"""Of transformers, where a checkpoint says nothing and tokens are drawn; everything else is off."""


@dataclass(frozen=True)
class GenerationOptions:
    """Fields of transformers' GenerationConfig, resolved; ``asked_tokens`` is ``max_new_tokens`` where the caller gave
    it. ``eos`` None: the bundle's own."""

    sampling: Sampling
    asked_tokens: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    max_time: float | None = None
    stop: Sequence[str] = ()
    eos: Sequence[int] | None = None

    def room(self, capacity: int, prompt: int) -> int:
        """How many tokens to generate at most: ``capacity`` are compiled in, ``prompt`` is how many tokens transformers
        counts of the longest prompt. Raises UserError where ``max_length`` leaves none."""
        wanted = self.asked_tokens or self.max_new_tokens
        if wanted is None and self.max_length is not None:
            wanted = self.max_length - prompt
            if wanted < 1:
                raise UserError(
                    f"the prompt has {prompt} tokens, max_length is {self.max_length}", where="generation",
                    fix="give max_new_tokens, which counts the answer alone",
                )  # fmt: skip
        return capacity if wanted is None else min(wanted, capacity)


def resolve(
    defaults: Mapping[str, Any], given: Mapping[str, Any] | None = None, seed: int | None = None, where: str = ""
) -> GenerationOptions:
    """``defaults`` are the checkpoint's generation_config.json, which ``where`` names; ``given`` the caller's options
    by their names in GenerationConfig, None for those not given. A temperature of 0 is greedy, one above 0 draws.

    Raises UserError for names that are not applied, for values that are none, and for options of drawing given to a
    greedy search; BundleError for such values in ``defaults``.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    for name in given:
        _check_name(name)
    if isinstance(given.get("sequence_bias"), Mapping):
        given["sequence_bias"] = [(list(sequence), bias) for sequence, bias in given["sequence_bias"].items()]
    draws = _draws(defaults, given, where)
    values: dict[str, Any] = {}
    for name, rule in APPLIED.items():
        if rule.sampled and not draws:
            if name != "temperature" and name in given and _check(name, given[name]) != rule.off:
                raise UserError(
                    f"{name} says how to draw tokens, but the likeliest is taken", where="generation",
                    fix="give a temperature above 0, or leave it out",
                )  # fmt: skip
        elif name in given:
            values[name] = _check(name, given[name])
        elif defaults.get(name) is not None and name != "eos_token_id":  # the manifest has those, config.json's too
            values[name] = _check(name, defaults[name], where or DEFAULTS_FILE)
        elif draws and name in DEFAULTS:
            values[name] = DEFAULTS[name]
    for name in ("eos_token_id", "forced_eos_token_id"):
        if isinstance(values.get(name), Integral):
            values[name] = [values[name]]
    stop = values.get("stop_strings", ())
    tokens = {"max_length": None} if "max_new_tokens" in given else {"max_new_tokens": None}
    if "max_new_tokens" in given or "max_length" in given:  # the caller's wins over either of the checkpoint's
        values |= tokens
    named = {field.name for field in fields(Sampling)}
    return GenerationOptions(
        Sampling(seed=seed, **{name: value for name, value in values.items() if name in named}),
        asked_tokens=given.get("max_new_tokens"),
        max_new_tokens=values.get("max_new_tokens"),
        max_length=values.get("max_length"),
        max_time=values.get("max_time"),
        stop=[stop] if isinstance(stop, str) else list(stop),
        eos=values.get("eos_token_id"),
    )


def merge_given(named: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a call that have a name of their own, and the others, given together as ``generation``."""
    if not isinstance(generation, Mapping | None):
        raise UserError(
            f"a {type(generation).__name__} is no generation options", where="generation",
            fix="give a dictionary of names of transformers' GenerationConfig and their values",
        )  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None}
    if twice := sorted(given.keys() & {n for n, v in (generation or {}).items() if v is not None}):
        raise UserError(f"{twice[0]} is given twice", where="generation", fix="leave one of them out")
    return given | dict(generation or {})


def _draws(defaults: Mapping[str, Any], given: Mapping[str, Any], where: str) -> bool:
    """Whether tokens are drawn. A temperature that is given decides, if ``do_sample`` is not given."""
    said = given.get("do_sample")
    if said is not None:
        _check("do_sample", said)
    if "temperature" in given:
        above = given["temperature"] != 0
        if above:
            _check("temperature", given["temperature"])
        if said is not None and said != above:
            raise UserError(
                f"do_sample is {said}, temperature is {given['temperature']}", where="generation",
                fix="a temperature above 0 draws tokens, 0 takes the likeliest; give one of both",
            )  # fmt: skip
        return bool(above)
    if said is None and defaults.get("do_sample") is not None:
        said = _check("do_sample", defaults["do_sample"], where or DEFAULTS_FILE)
    return bool(said)


def _check_name(name: str) -> None:
    if name in APPLIED:
        return
    reason = f"no option {name!r}"
    if name in LEFT_OUT:
        reason = f"{name} is not applied here: answers are greedy or drawn, one for each row"
    elif name in WITHOUT_SAY:
        reason = f"{name} changes no answer here ({WITHOUT_SAY[name]})"
    raise UserError(reason, where="generation", available=APPLIED)


def _check(name: str, value: Any, where: str | None = None) -> Any:
    """``value``, if it may be that. ``where`` is the checkpoint's file; None for the caller's."""
    rule = APPLIED[name]
    if rule.valid(value) or (rule.off == () and value in ([], ())):
        return value
    if where is None:
        want = "0 (greedy) or more" if name == "temperature" else rule.want
        raise UserError(f"{name} is {value!r}", where="generation", fix=f"it must be {want}")
    raise BundleError(f"{name} is {value!r}", where=where, fix=f"it must be {rule.want}")
