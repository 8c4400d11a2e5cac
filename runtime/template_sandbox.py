"""Jinja in a sandbox: a template reaches plain data only, can change none of it, and everything it does is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from secateur.runtime.template_limits import TooMuchError, check_call, check_filter, check_operator, count, take

MOST_SOURCE = 1_000_000
"""Characters of a template; published ones have some ten thousand."""
_STEP, _COUNT = "step!", "count!"
"""Filters of our own; no template can spell their names."""
_LONGEST_TIME = 1000
"""Characters of a format of dates."""


def compile_template(source: str) -> jinja2.Template:
    """Raises jinja's TemplateError for a malformed one, and whatever Python's compiler does if it is too deep."""
    if len(source) > MOST_SOURCE:
        raise TooMuchError(f"has {len(source)} characters, {MOST_SOURCE} are the most")
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=_finalize
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _guard(name, filter) for name, filter in environment.filters.items()}
    environment.filters |= {_STEP: _step, _COUNT: _count}
    environment.globals.pop("lipsum")  # it writes as much nonsense as it is told to
    environment.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_namespace)
    tree = _Counting().visit(environment.parse(source))
    tree.set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.concat = _concat  # type: ignore[assignment]  # jinja's own is a method of the empty string

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as jinja's
        if isinstance(__obj, Macro):
            take()
            return super().call(__context, __obj, *args, **kwargs)
        args = check_call(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, range) else count(result)


class _Counting(NodeTransformer):
    """Puts a step in front of each turn of a loop, of each macro and of each condition in a loop's head, and weighs
    every list, tuple and dictionary that is made and every piece that ``~`` joins."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.test is not None:
            node.test = jinja2.nodes.And(_apply(_STEP, jinja2.nodes.Const(True)), node.test, lineno=node.lineno)
        return _count_body(node)

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Node:  # noqa: N802
        return _count_body(self.generic_visit(node))

    def visit_CallBlock(self, node: jinja2.nodes.CallBlock) -> jinja2.nodes.Node:  # noqa: N802
        return _count_body(self.generic_visit(node))

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_apply(_COUNT, piece) for piece in node.nodes]
        return node

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:  # noqa: N802
        return self._weigh(node, node.items)

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:  # noqa: N802
        return self._weigh(node, node.items) if node.ctx == "load" else self.generic_visit(node)

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:  # noqa: N802
        return self._weigh(node, [each for pair in node.items for each in (pair.key, pair.value)])

    def _weigh(self, node: Any, items: list[Any]) -> jinja2.nodes.Node:
        plain = all(isinstance(item, (jinja2.nodes.Const, jinja2.nodes.Slice)) for item in items)
        self.generic_visit(node)
        return node if plain else _apply(_COUNT, node)


def _apply(name: str, node: Any) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


def _count_body(node: Any) -> jinja2.nodes.Node:
    step = _apply(_STEP, jinja2.nodes.Const(True, lineno=node.lineno))
    node.body.insert(0, jinja2.nodes.ExprStmt(step, lineno=node.lineno))
    return node


# Filters that take the context are never tried at compile time, where nothing is counted.


@jinja2.pass_context
def _step(context: Context, value: Any) -> bool:
    take()
    return True


@jinja2.pass_context
def _count(context: Context, value: Any) -> Any:
    return count(value)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    return count(value)


def _guard(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    passed = str(getattr(getattr(filter, "jinja_pass_arg", None), "name", ""))

    @jinja2.pass_context
    def guarded(context: Context, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        check_filter(name, value, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}.get(passed)
        return count(filter(value, *args, **kwargs) if first is None else filter(first, value, *args, **kwargs))

    return guarded


def _concat(pieces: Any) -> str:
    """What a macro, a block or the whole template has written."""
    written = []
    for piece in pieces:
        take(0, len(piece))
        written.append(piece)
    return "".join(written)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it only prints its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's ``namespace`` without names that start with an underscore, which reach into Python itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"the name {name!r} is not allowed in a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may be of any size


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    values = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        values[str(name)] = value
    return values


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which templates for models do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    if len(form) > _LONGEST_TIME:
        raise TooMuchError(f"asks for a date in {len(form)} characters")
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise TemplateError(message)
