"""Chat templates: Jinja in a sandbox, with the names that Hugging Face templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError, TemplateError

from secateur.runtime.chat_bounds import BoundedEnvironment, TooMuchError
from secateur.runtime.errors import BundleError, UserError

Message: TypeAlias = Mapping[str, Any]
"""``{"role": …, "content": text}``, or content a list of ``{"type": "image"}`` (or ``"video"``, ``"audio"``) and
``{"type": "text", "text": …}``."""

_WHERE = "chat_template.jinja"


class ChatTemplate:
    """A compiled template. It comes from a stranger: it reaches plain data only, and can change none of it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._environment = _environment()
            self._template = self._environment.from_string(source)
        except TemplateError as error:
            raise BundleError(f"the chat template is malformed ({error})", where=_WHERE) from None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for ``messages``, ending where the assistant's answer starts.

        Raises BundleError for a template that does what it may not, or does not end, UserError for one that refuses or
        fails on the messages.
        """
        self._environment.budget.start()
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except SecurityError as error:
            raise BundleError(
                f"the chat template tried something it may not do ({error})",
                where=_WHERE,
                fix="do not use this bundle unless you trust where it came from",
            ) from None
        except (TooMuchError, RecursionError, MemoryError) as error:
            reason = str(error) if isinstance(error, TooMuchError) else f"it ends in a {type(error).__name__}"
            raise BundleError(
                f"the chat template was stopped: {reason}", where=_WHERE,
                fix="give shorter messages, or take the template of the original checkpoint",
            ) from None  # fmt: skip
        except TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {error}", where=_WHERE) from None
        except Exception as error:  # a template can raise whatever the expressions in it raise
            raise UserError(
                f"the chat template fails on these messages ({type(error).__name__}: {error})",
                where=_WHERE,
                fix="give a list of messages with role and content",
            ) from None


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


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    values = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        values[str(name)] = value
    return values


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.bound_filter("tojson", _to_json)
    environment.globals.update(
        raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form), namespace=_namespace
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which templates for models do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _plain(value: Any) -> Any:
    """Plain data only: an image object in a message has methods a template must not reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
