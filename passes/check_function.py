"""Try functions from outside this package on random signals before a model is traced with them.

Their mistakes then come as one line that names the user's own file, not as a failure deep inside a pass.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from secateur.compiler.blame import blame_error
from secateur.compiler.function import first_line, trace_function
from secateur.compiler.plan_recipe import PlannedRecipe
from secateur.passes.methods.learned import Weights
from secateur.passes.methods.own import digest_own, is_own, place_of
from secateur.passes.signal_table import SIGNALS
from secateur.passes.vocabulary import BoundStage, BoundTerm
from secateur.runtime.errors import SecateurError, UserError

_TEXT, _HEADS, _WIDTH, _KEY_WIDTH, _SEVERAL = 3, 2, 8, 4, 2
_FEW = 1024
"""Up to this many tokens two groups are tried, so that a function that confuses groups with tokens fails."""


def every_term(bound: BoundStage) -> list[BoundTerm]:
    """The functions of a stage, those that scores are made of included."""
    found: list[BoundTerm] = []
    waiting = list(bound.terms)
    while waiting:
        term = waiting.pop()
        found.append(term)
        waiting += term.of
    return found


def digest_plan(plan: PlannedRecipe, stages: Iterable[Any]) -> str:
    """SHA-256 of a planned recipe and of the text of those functions of its ``stages`` that are not this package's."""
    own = digest_own(term.function for stage in stages for term in every_term(stage.bound))
    return hashlib.sha256(f"{plan}{own}".encode()).hexdigest()


def check_stage(stage: Any) -> None:
    """Run a ``StageFunction`` that uses functions of the user's twice on the same random signals, and trace it.

    Raises UserError where they raise, return something of another shape or kind than their role asks for, differ
    between the two runs, or have shapes that depend on data.
    """
    own = [term for term in every_term(stage.bound) if is_own(term.function)]
    # Learned weights fit the model's widths, which are not those of the random signals.
    learned = any(isinstance(v, Weights) for term in every_term(stage.bound) for v in term.options.values())
    if own and not learned:
        _check(_Key(stage, str(stage.planned) + digest_own(term.function for term in own)))


class _Key:
    """A stage that counts as the same when its plan and its functions' text are: a stage is tried once."""

    def __init__(self, stage: Any, text: str) -> None:
        self.stage, self.text = stage, text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=64)
def _check(key: _Key) -> None:
    stage = key.stage
    own = [term for term in every_term(stage.bound) if is_own(term.function)]
    names = ", ".join(term.name for term in own)
    where = f"{stage.planned.name}: {place_of(own[0].function)}"
    signals = draw_signals(stage)
    first, second = _run(stage, signals, where), _run(stage, signals, where)
    _check_result(stage, first, where)
    for what, value in first.items():
        if not torch.equal(value, second[what]):
            raise UserError(
                f"{names} returned another {what} for the same input the second time",
                where=where,
                fix="draw random numbers from a generator of its own with a fixed seed, and keep no state",
            )

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(_run_plain(stage, dict(zip(signals, values, strict=True))).values())

    try:
        trace_function(names, run, signals, tuple(first))
    except UserError:
        raise
    except SecateurError as error:
        raise UserError(str(error).removeprefix("trace: "), where=stage.planned.name) from error


def _run_plain(stage: Any, signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = stage.run(signals)
    found = {"choice": result.map.keep}
    if result.map.mix is not None:
        found["mix"] = result.map.mix
    if result.carry is not None:
        found["score"] = result.carry
    return found


def _run(stage: Any, signals: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            return _run_plain(stage, signals)
    except SecateurError:
        raise
    except AssertionError as error:
        said = first_line(error).removeprefix(f"{stage.planned}: ")
        raise UserError(f"{said}, of {_wanted(stage)}", where=where) from error
    except Exception as error:
        raise UserError(f"{type(error).__name__}: {first_line(error)}{blame_error(error)}", where=where) from error


def _wanted(stage: Any) -> str:
    p = stage.planned
    return f"{p.length_in} tokens per group, {p.length_out} to keep (shapes: score [G,N], keep [G,k], mix [G,k,N])"


def _check_result(stage: Any, result: Mapping[str, Tensor], where: str) -> None:
    planned = stage.planned
    keep = result["choice"]
    if keep.dtype != torch.int64 or (keep.shape[1] and not bool((keep.diff(dim=1) > 0).all())):
        raise UserError("keep is not int64 and strictly increasing", where=where, fix="sort the chosen indices")
    if keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < planned.length_in:
        raise UserError(f"keep names a token outside 0 to {planned.length_in - 1}", where=where)
    for what in ("score", "mix"):
        value = result.get(what)
        if value is not None and value.dtype != torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{what} is {kind}, not float32", where=where, fix="return it with .float()")
        if value is not None and not bool(value.isfinite().all()):
            raise UserError(f"{what} is not finite (NaN or infinity) on random signals", where=where)


def draw_signals(stage: Any) -> dict[str, Tensor]:
    """Random signals of the shapes in the signal table; where they mean attention, rows that sum to at most one."""
    count = stage.planned.length_in
    sizes = {
        "G": 2 if count <= _FEW else 1, "N": count, "H": _HEADS, "d": _KEY_WIDTH, "D": _WIDTH, "Dv": _WIDTH,
        "A": _SEVERAL, "m": _SEVERAL, "T": _TEXT, "L": count + _TEXT,
    }  # fmt: skip
    source = torch.Generator().manual_seed(0)
    return {name: _draw(name, stage.signal_options[name], sizes, source) for name in stage.signals}


def _draw(name: str, options: Mapping[str, Any], sizes: Mapping[str, int], source: torch.Generator) -> Tensor:
    signal = SIGNALS[name]
    letters = re.findall(r"[A-Za-z]+|\d+", signal.shape)
    shape = [1 if a == "H" and options.get("heads") == "joint" else sizes[a] if a in sizes else int(a) for a in letters]
    if signal.doc.startswith("int64"):
        return torch.arange(shape[-1]).expand(shape)
    if signal.doc.startswith("bool"):
        return torch.ones(shape, dtype=torch.bool)
    if name == "size":
        return torch.ones(shape)
    values = torch.randn(shape, generator=source)
    if "attention" in name and options.get("softmax") != "none" and name != "attention_logits":
        return torch.softmax(2 * values, -1)
    return values.abs() if name == "carried" else values
