"""What a chat template may take: loops, texts and lists are counted and bounded, on whatever thread it is rendered.

A template comes from a stranger. Jinja's sandbox keeps it away from Python, and does not keep loops in loops from
running for days, or a text that is doubled forty times from filling the memory.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 1 << 24
"""Characters of a text, or elements of a list and characters in them, that a template may make; also its output."""
MOST_STEPS = 1 << 28
"""Elements and characters that a template may go through in all; a turn of a loop counts as :data:`TURN`."""
TURN = 1000
SECONDS = 10.0
"""A template that goes on longer is stopped at its next step: what steps cost depends on what they do."""
_WIDE = re.compile(r"\d{5}")
_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "tojson")
"""Filters and methods of text in which a number is a length."""
_HIGHEST_POWER = 4096
"""Bits of a whole number."""


class TooMuchError(Exception):
    """A template went over one of the bounds."""


class Budget(threading.local):
    """What is left to the template that this thread renders."""

    left = 0
    ends = 0.0

    def start(self) -> None:
        self.left, self.ends = MOST_STEPS, time.monotonic() + SECONDS

    def take(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise TooMuchError(f"it takes more than {MOST_STEPS} steps")
        if time.monotonic() > self.ends:
            raise TooMuchError(f"it takes more than {SECONDS:g} s")

    def weigh(self, value: Any) -> Any:
        """``value`` as it is, once its size is counted: that of texts and lists, with what lies in them."""
        self.take(measure(value))
        return value

    def turn(self) -> None:
        """The body of a loop or macro begins once more."""
        self.take(TURN)


def measure(value: Any, most: int = LONGEST) -> int:
    """Characters and elements in plain data, counted wherever they occur again. Raises TooMuchError above ``most``."""
    size, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, (list, tuple, set, frozenset)):
            size += len(one)
            _check_length(size, most)
            waiting.extend(one)
        elif isinstance(one, Mapping):
            size += len(one)
            _check_length(size, most)
            waiting.extend(one.keys())
            waiting.extend(one.values())
        elif isinstance(one, range):
            size += len(one)
        _check_length(size, most)
    return size


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which whatever a template does is counted against :attr:`budget`."""

    intercepted_binops = frozenset(("*", "+", "**", "%"))

    def __init__(self, **options: Any) -> None:
        self.budget = Budget()
        super().__init__(**options, finalize=self._finalize)
        self.globals.pop("lipsum")  # random text, of any length
        filters: Mapping[str, Any] = self.filters
        self.filters = {name: self._bound(name, function) for name, function in filters.items()}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: self._bound(name, function) for name, function in tests.items()}

    def bound_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter that is counted as Jinja's own are."""
        self.filters[name] = self._bound(name, function)

    def turn(self) -> str:
        self.budget.turn()
        return ""

    def join_text(self, pieces: Iterable[Any]) -> str:
        """``a ~ b``, and what a template prints: of one text."""
        texts, size = [], 0
        for piece in pieces:
            text = piece if isinstance(piece, str) else str(self.budget.weigh(piece))
            size += len(text)
            _check_length(size, LONGEST)
            self.budget.take(len(text) + 1)
            texts.append(text)
        return "".join(texts)

    concat = join_text  # type: ignore[assignment]  # what Jinja joins the output and blocks with

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int):
                    _check_length(max(measure(one), len(one)) * max(other, 0), LONGEST)
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return self.budget.weigh(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        found = super().getitem(obj, argument)
        return self.budget.weigh(found) if isinstance(argument, slice) else found

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        held = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if isinstance(held, str):
            _check_growth(name, (held, *args), kwargs)
        for given in (held, *args, *kwargs.values()):
            self.budget.weigh(given)
        return self._count(super().call(context, function, *args, **kwargs))

    def _bound(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # what Jinja passes first is an attribute of the function, which this keeps
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = [each for each in args if not isinstance(each, (jinja2.runtime.Context, jinja2.Environment))]
            given = [each for each in given if not isinstance(each, jinja2.nodes.EvalContext)]
            if name == "join" and given and not isinstance(given[0], (str, list, tuple, Mapping)):
                # What comes one by one is counted before it is joined.
                listed = list(self._count_each(iter(given[0])))
                args = tuple(listed if each is given[0] else each for each in args)
                given[0] = listed
            for each in (*given, *kwargs.values()):
                self.budget.weigh(each)
            _check_growth(name, tuple(given), kwargs)
            return self._count(function(*args, **kwargs))

        return bounded

    def _count(self, found: Any) -> Any:
        return self._count_each(found) if isinstance(found, Iterator) else self.budget.weigh(found)

    def _count_each(self, found: Iterator[Any]) -> Iterator[Any]:
        size = 0
        for one in found:
            size += 1 + measure(one)
            _check_length(size, LONGEST)
            self.budget.take(measure(one) + 1)
            yield one

    def _finalize(self, value: Any) -> Any:
        """What is printed; anything that is no text is written out."""
        self.budget.weigh(value)
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        bodies: tuple[type[Any], ...] = (jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)
        for kind in bodies:
            for block in list(template.find_all(kind)):
                block.body.insert(0, jinja2.nodes.ExprStmt(self._call("turn", []), lineno=block.lineno))
        for joined in list(template.find_all(jinja2.nodes.Concat)):
            pieces = jinja2.nodes.List(list(joined.nodes), lineno=joined.lineno)
            joined.nodes[:] = [self._call("join_text", [pieces])]
        template.set_environment(self)
        return template

    def _call(self, name: str, arguments: list[jinja2.nodes.Expr]) -> jinja2.nodes.Call:
        method = jinja2.nodes.EnvironmentAttribute(name)
        return jinja2.nodes.Call(method, arguments, [], None, None)


def _check_length(size: int, most: int) -> None:
    if size > most:
        raise TooMuchError(f"it makes texts or lists of more than {most} characters or elements")


def _check_bits(bits: int) -> None:
    if bits > _HIGHEST_POWER:
        raise SecurityError(f"a number of more than {_HIGHEST_POWER} bits")


def _check_format(form: str, given: Any) -> None:
    """``%10d`` and ``{:10}`` have widths, which may also be given (``%*d``)."""
    if _WIDE.search(form):
        raise TooMuchError("it formats text to a width of five digits or more")
    if "*" in form:
        for one in given if isinstance(given, tuple) else (given,):
            _check_length(abs(one) if isinstance(one, int) else 0, LONGEST)
    _check_length((measure(given) + 1) * (form.count("%") + form.count("{") + 1), LONGEST)


def _check_growth(name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """For filters and methods of text that make more than they are given: before they make it."""
    numbers = [abs(each) for each in (*given[1:], *named.values()) if isinstance(each, int)]
    if name in _PADDING:
        lines = str(given[0]).count("\n") + 1 if name == "indent" and isinstance(given[0], str) else 1
        _check_length(max(numbers, default=0) * (measure(given[0]) if name == "tojson" else lines), LONGEST)
    elif name == "replace" and len(given) > 2 and all(isinstance(each, str) for each in given[:3]):
        text, old, new = given[:3]
        _check_length(len(text) + text.count(old) * len(new), LONGEST)
    elif name == "join":
        # Of the filter the list comes first, of the method the text between.
        parts, between = (given[1], given[0]) if isinstance(given[0], str) and len(given) > 1 else (given[0], None)
        between = between if between is not None else named.get("d", given[1] if len(given) > 1 else "")
        _check_length(measure(parts) + len(parts if hasattr(parts, "__len__") else ()) * measure(between), LONGEST)
    elif name in ("format", "format_map") and isinstance(given[0], str):
        _check_format(given[0], (*given[1:], *named.values()))
