"""Chat templates: messages to the text of a prompt, and what a template does wrong in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jinja2.exceptions import SecurityError, TemplateError

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.template_limits import TooMuchError, limited
from secateur.runtime.template_sandbox import compile_template

Message: TypeAlias = Mapping[str, Any]
"""``{"role": …, "content": text}``, or content a list of ``{"type": "image"}`` (or ``"video"``, ``"audio"``) and
``{"type": "text", "text": …}``."""

_WHERE = "chat_template.jinja"
_TRUST = "do not use this bundle unless you trust where it came from"
_LONGEST = 300
"""Characters of a template's own words in an error."""


class ChatTemplate:
    """A compiled template. It comes from a stranger: it reaches plain data only, and can change none of it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = compile_template(source)
        except TooMuchError as error:
            raise BundleError(f"the chat template {error}", where=_WHERE, fix=_TRUST) from None
        except Exception as error:  # Python's compiler, too: nested too deeply, numbers too long
            raise BundleError(f"the chat template is malformed ({_one_line(error)})", where=_WHERE) from None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for ``messages``, ending where the assistant's answer starts."""
        try:
            plain = [_plain(message) for message in messages]
            with limited(plain):
                return self._template.render(
                    messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
                )
        except TooMuchError as error:
            raise BundleError(f"the chat template {error}", where=_WHERE, fix=_TRUST) from None
        except SecurityError as error:
            what = f"the chat template tried something it may not do ({_one_line(error)})"
            raise BundleError(what, where=_WHERE, fix=_TRUST) from None
        except TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {_one_line(error)}", where=_WHERE) from None
        except Exception as error:  # a template can raise whatever the expressions in it raise
            raise UserError(
                f"the chat template fails on these messages ({type(error).__name__}: {_one_line(error)})",
                where=_WHERE,
                fix="give a list of messages with role and content",
            ) from None


def _one_line(error: Exception) -> str:
    """What a template says may have lines, and any length."""
    text = " ".join(str(error)[:2000].split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


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
