"""What one rendering of a chat template may take: steps, characters and time, counted before they are spent.

A template is a program of a stranger. Its loops are counted step by step; whatever makes a value larger than those it
is made of (repeating, joining, padding, formatting) is weighed first, so that no single operation takes the machine.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Set, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any, NamedTuple

STEPS, STEPS_PER_ITEM = 2_000_000, 1000
"""Of every rendering, and for every value in the messages beside it."""
CHARACTERS, CHARACTERS_PER_CHARACTER = 16_000_000, 64
"""Written or copied on the way to the text."""
SECONDS = 30.0
MOST_BITS = 4096
"""Of a whole number that is multiplied or raised."""
_SLOW_TEXT = 100_000
"""Characters: longer text is not given to filters whose time grows with its square."""
_SEQUENCES = (list, tuple, Set, ValuesView)
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


class TooMuchError(Exception):
    """A rendering would take more than it may."""


class Size(NamedTuple):
    """Of plain data: values in it, however often they are the same one; characters of its strings; depth."""

    values: int
    characters: int
    depth: int


class Budget:
    """What is left of one rendering. One thread uses it."""

    def __init__(self, steps: int, characters: int, seconds: float = SECONDS) -> None:
        self._limits = steps, characters, seconds
        self.steps, self.characters, self._ends = steps, characters, perf_counter() + seconds

    def take(self, steps: int = 1, characters: int = 0) -> None:
        """Raises :class:`TooMuchError` if so much is not left."""
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0:
            raise TooMuchError(f"takes more than {self._limits[0]} steps")
        if self.characters < 0:
            raise TooMuchError(f"writes more than {self._limits[1]} characters")
        if perf_counter() > self._ends:
            raise TooMuchError(f"takes more than {self._limits[2]:g} seconds")


_NONE = Budget(STEPS, CHARACTERS, float("inf"))
_current: ContextVar[Budget] = ContextVar("budget", default=_NONE)


@contextmanager
def limited(messages: Any) -> Iterator[None]:
    """A new budget, larger for longer messages (plain data); whatever is counted inside is taken from it."""
    size = _weigh(messages, None)
    budget = Budget(
        STEPS + STEPS_PER_ITEM * size.values, CHARACTERS + CHARACTERS_PER_CHARACTER * size.characters, SECONDS
    )
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)


def take(steps: int = 1, characters: int = 0) -> None:
    _current.get().take(steps, characters)


def count(value: Any) -> Any:
    """``value`` as it is, once it was weighed: everything in it is a step, its characters are characters. What it gives
    one by one is counted one by one."""
    if isinstance(value, Iterator):
        return _count_each(value)
    if isinstance(value, (str, bytes)):
        take(1, len(value))
    elif isinstance(value, (Mapping, *_SEQUENCES)):
        _weigh(value, _current.get())
    return value


def _count_each(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        take(1, len(value) if isinstance(value, str) else 0)
        yield value


def _weigh(value: Any, budget: Budget | None) -> Size:
    """Whatever is in ``value``, each time it is in it: what printing or comparing it costs."""
    values = characters = depth = 0
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        one, level = waiting.pop()
        values, depth = values + 1, max(depth, level)
        length = len(one) if isinstance(one, (str, bytes)) else 0
        characters += length
        if budget is not None:
            budget.take(1, length)
        if isinstance(one, Mapping):
            waiting += [(each, level + 1) for pair in one.items() for each in pair]
        elif isinstance(one, _SEQUENCES):
            waiting += [(each, level + 1) for each in one]
    return Size(values, characters, depth)


# -- operators ---------------------------------------------------------------------------------------------------------


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Takes what the result will cost."""
    if operator == "%" and isinstance(left, (str, bytes)):
        return _check_percent(left, right)
    if operator == "+" and isinstance(left, (str, bytes, list, tuple)):
        count(left)
        count(right)
    if operator == "*":
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, (str, bytes, list, tuple)) and isinstance(times, int) and times > 0:
                size = _weigh(repeated, _current.get())
                take(1 if isinstance(repeated, (str, bytes)) else size.values * times, size.characters * times)
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}.get(operator, 0)
        if bits > MOST_BITS:
            raise TooMuchError(f"makes a whole number of more than {MOST_BITS} bits")


def _check_percent(text: Any, values: Any) -> None:
    shown = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    fields = [number for pair in _PERCENT.findall(shown) for number in pair if number]
    _check_fields(shown, shown.count("%"), fields, "*" in fields, values)


def _check_braces(text: str, values: Any) -> None:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError:
        return  # formatting will say it
    specs = [spec for _, _, spec, _ in parts if spec]
    fields = [number for spec in specs for number in re.findall(r"\d+", spec)]
    _check_fields(text, text.count("{"), fields, any("{" in spec for spec in specs), values)


def _check_fields(text: str, places: int, numbers: Iterable[str], nested: bool, values: Any) -> None:
    size = _weigh(values, _current.get())
    width = sum(int(number) if len(number) < 10 else 10**10 for number in numbers if number != "*")
    if nested:
        width += places * _sum_of_ints(values)
    take(1, len(text) + places * (size.characters + size.values) + width)


def _sum_of_ints(values: Any) -> int:
    if isinstance(values, int):
        return abs(values)
    if isinstance(values, Mapping):
        values = list(values.values())
    return sum(map(_sum_of_ints, values)) if isinstance(values, (list, tuple)) else 0


# -- methods and filters -----------------------------------------------------------------------------------------------


def check_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Takes what a call will cost; returns the arguments to call it with."""
    owner, name = getattr(function, "__self__", None), str(getattr(function, "__name__", ""))
    given = [*args, *kwargs.values()]
    if not isinstance(owner, (str, bytes, int, float)):
        for value in given:
            count(value) if isinstance(value, (Mapping, *_SEQUENCES)) else None
        take()
        return args
    length = len(owner) if isinstance(owner, (str, bytes)) else 1
    if name == "join" and args:
        args = (list(args[0]) if isinstance(args[0], Iterable) else args[0], *args[1:])
        given = [*args, *kwargs.values()]
        take(1, length * (len(args[0]) if isinstance(args[0], list) else 0))
    if name in ("format", "format_map"):
        _check_braces(str(owner), [list(args), dict(kwargs)])
    if name == "replace" and isinstance(owner, str):
        _check_replace(owner, given)
    if name == "translate":
        take(1, length * max((_weigh(value, _current.get()).characters for value in given), default=0))
    if name == "expandtabs":
        take(1, length * max(8, _sum_of_ints(given)))
    for value in given:
        count(value)
    take(1, length + _sum_of_ints(given))
    return args


def _check_replace(text: str, given: list[Any]) -> None:
    texts = [value for value in given if isinstance(value, str)]
    if len(texts) == 2:
        take(1, text.count(texts[0]) * len(texts[1]))


_FREE = frozenset(
    ("abs", "attr", "count", "d", "default", "first", "float", "int", "last", "length", "random", "reverse")
)
"""Filters that look at one value, or at none."""
_BY_LENGTH = frozenset(("indent", "join", "urlize", "wordwrap", "xmlattr"))
"""Filters that may write a text argument once for every line, word or item."""


def check_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Takes what a filter will cost, but for its result, which :func:`count` takes."""
    if name in _FREE:
        return take()
    given = [*args, *kwargs.values()]
    size = _weigh(value, _current.get())
    width = _sum_of_ints(given)
    longest = max((len(one) for one in given if isinstance(one, str)), default=0)
    if name in _BY_LENGTH:
        take(1, (size.characters + size.values) * (longest + width))
    if name in ("tojson", "pprint"):
        between = sum(_weigh(one, _current.get()).characters for one in given) + width
        take(1, size.values * (size.depth * (1 + between) if between or name == "pprint" else 1))
    if name == "replace" and isinstance(value, str):
        _check_replace(value, given)
    if name == "format":
        _check_percent(str(value), [list(args), dict(kwargs)])
    if name == "sum":
        take(size.values**2)  # lists are added one by one
    if name in ("striptags", "urlize") and size.characters > _SLOW_TEXT:
        raise TooMuchError(f"gives {size.characters} characters to the filter {name}")
    take(1, width)
