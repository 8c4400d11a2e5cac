"""``data:`` URLs: a file's bytes written into a message."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from secateur.runtime.errors import UserError

_SHOWN = 60
"""Characters of a source that a message repeats: a ``data:`` URL may have millions."""


def is_data_url(value: object) -> bool:
    return isinstance(value, str) and value[:5].lower() == "data:"


def read_data_url(url: str, where: str | None = None) -> bytes:
    """The bytes of ``data:[type][;base64],...``; raises UserError for one that cannot be decoded or holds nothing."""
    head, comma, body = url.partition(",")
    fix = "write data:image/png;base64, (or the file's own type) and the file in base64 behind it"
    if not comma:
        raise UserError("a data: URL without a comma", where=where or shorten(url), fix=fix)
    raw = unquote_to_bytes(body)
    if head.lower().endswith(";base64"):
        try:
            raw = base64.b64decode(b"".join(raw.split()), validate=True)
        except binascii.Error as error:
            raise UserError(
                f"a data: URL whose base64 is broken ({error})", where=where or shorten(url), fix=fix
            ) from None
    if not raw:
        raise UserError("a data: URL that holds nothing", where=where or shorten(url), fix=fix)
    return raw


def shorten(source: object) -> str:
    """A path or URL as messages show it."""
    text = str(source)
    return text if len(text) <= 4 * _SHOWN and not is_data_url(text) else f"{text[:_SHOWN]}..."
