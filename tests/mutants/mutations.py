"""What may be changed in a file: cosmic-ray's operators, and where they apply.

A mutant is one operator at one place. Left out are places where a change cannot be seen or is none: the ``|`` of type
annotations, which nothing evaluates; ``if TYPE_CHECKING``; and what Python itself refuses, or warns of, when it
compiles the file. Strings have no operator, but the numbers and operators inside f-strings do, those of error messages
too.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

PROVIDER = "core/"


class Place(NamedTuple):
    """Where an operator applies: ``index`` is cosmic-ray's occurrence in the file, ``on_line`` the one on the line."""

    operator: str
    index: int
    line: int
    on_line: int


def list_operators() -> tuple[str, ...]:
    """Operators without arguments; the two that want names of variables to mix up draw numbers at random."""
    return tuple(
        name.removeprefix(PROVIDER)
        for name in sorted(operator_names())
        if name.startswith(PROVIDER) and not get_operator(name).arguments()
    )


def list_places(source: str, operators: tuple[str, ...] | None = None) -> list[Place]:
    """Every place of ``source`` that the operators change, by operator, then from top to bottom."""
    nodes = list(ast_nodes(parso.parse(source)))
    hidden = {id(node) for node in nodes if _is_hidden(node)}
    return [place for name in operators or list_operators() for place in _list_places(name, nodes, hidden)]


def _list_places(name: str, nodes: list[Any], hidden: set[int]) -> Iterator[Place]:
    operator, index, on_line = get_operator(PROVIDER + name)(), 0, {}
    for node in nodes:
        for (line, _), _ in operator.mutation_positions(node):
            if id(node) not in hidden:
                yield Place(name, index, line, on_line.setdefault(line, 0))
                on_line[line] += 1
            index += 1


def _is_hidden(node: Any) -> bool:
    """Whether a change of ``node`` cannot matter: ``|`` in an annotation, or a condition for type checkers."""
    if node.type == "if_stmt":
        return str(node.children[1].get_code()).strip() == "TYPE_CHECKING"
    if node.type != "operator" or node.value != "|":
        return False
    child, parent = node, node.parent
    while parent is not None:
        where = [each is child for each in parent.children].index(True)
        before = parent.children[where - 1] if where else None
        colon = parent.type in ("tfpdef", "annassign") and getattr(before, "value", "") == ":"
        if (colon and where <= 2) or (parent.type == "funcdef" and getattr(before, "value", "") == "->"):
            return True
        child, parent = parent, parent.parent
    return False


@lru_cache(maxsize=64)
def _shape(source: str) -> str:
    return ast.dump(ast.parse(source))


def mutate(source: str, place: Place) -> str | None:
    """``source`` with the change; None if Python does not compile it without a warning, or reads the same in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = mutate_code(source, get_operator(PROVIDER + place.operator)(), place.index)
        if changed is None:
            return None
        if place.operator == "ExceptionReplacer":
            changed += "\n\nclass CosmicRayTestingException(Exception):\n    pass\n"
        try:
            compile(changed, "mutant", "exec")
        except (SyntaxError, SyntaxWarning):
            return None
        return None if _shape(changed) == _shape(source) else changed
