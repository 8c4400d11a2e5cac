"""Functions from outside this package join the vocabulary: ``@score``, ``@selector`` and ``@merge``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from secateur.passes.methods.registry import MERGES, SCORES, SELECTORS
from secateur.runtime.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])
_OWN: dict[str, Callable[..., Any]] = {}


def score(function: Function) -> Function:
    """Make ``function`` a score under its own name: it returns ``[G,N]`` float32, higher = keep, or ``Scored``.

    Parameters named like signals receive them (``secateur recipes --vocabulary`` lists them all), other parameters are
    options of the recipe and need type hints.
    """
    return _join(SCORES, "score", function)


def selector(function: Function) -> Function:
    """Make ``function`` a selector: from its signals, ``score`` and ``k`` it returns a ``Selection`` of exactly k."""
    return _join(SELECTORS, "selector", function)


def merge(function: Function) -> Function:
    """Make ``function`` a merge: from its signals and ``selection`` it returns ``mix [G,k,N]`` float32, of which row
    j says how the N tokens that enter make up survivor j."""
    return _join(MERGES, "merge", function)


def is_own(function: Callable[..., Any]) -> bool:
    """Whether ``function`` came by one of the decorators above."""
    return any(known is function for known in _OWN.values())


def place_of(function: Callable[..., Any]) -> str:
    """``FILE:LINE`` of a function's definition, for messages."""
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def digest_own(functions: Iterable[Callable[..., Any]]) -> str:
    """SHA-256 over the files that define those of ``functions`` that are not this package's; empty if none are.

    A recipe names its functions; for one whose text is not in this package the name alone says too little.
    """
    contents = {_content(function) for function in functions if is_own(function)}
    return hashlib.sha256("\0".join(sorted(contents)).encode()).hexdigest() if contents else ""


def _content(function: Callable[..., Any]) -> str:
    code = inspect.unwrap(function).__code__
    try:
        return Path(code.co_filename).read_text(encoding="utf-8", errors="replace")
    except OSError:  # typed at a prompt
        return f"{code.co_code.hex()} {code.co_consts} {code.co_names}"


def _join(words: dict[str, Callable[..., Any]], role: str, function: Function) -> Function:
    if not inspect.isfunction(function):
        raise UserError(f"{function!r} is no function", where=f"@{role}", fix="decorate a function written with def")
    name, where = function.__name__, place_of(function)
    known = words.get(name)
    # The same file read once more replaces what it said before.
    if known is not None and not (is_own(known) and place_of(known).rpartition(":")[0] == where.rpartition(":")[0]):
        other = f"defined at {place_of(known)}" if is_own(known) else "part of the vocabulary"
        raise UserError(f"there is a {role} {name!r} already, {other}", where=where, fix="choose another name")
    words[name] = _OWN[f"{role} {name}"] = function
    return function
