"""Text that is none: strings of Python that hold half a surrogate pair, or a byte that was not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from secateur.runtime.errors import UserError


def check_text(text: str, where: str | None, error: type[UserError] = UserError) -> str:
    """``text`` as it is; raises ``error`` for a character that UTF-8 has no bytes for (U+D800 to U+DFFF).

    JSON writes such characters as ``\\ud83d``; Python puts U+DC80 to U+DCFF where bytes of an argument or of a file's
    name are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as broken:
        code = ord(text[broken.start])
        what = f"character {broken.start} of the text is U+{code:04X}, half of a surrogate pair"
        if 0xDC80 <= code <= 0xDCFF:
            what = f"character {broken.start} of the text stands for the byte 0x{code - 0xDC00:02X}, which is not UTF-8"
        raise error(what, where=where, fix="give whole Unicode text") from None
    return text


def check_all_text(value: Any, where: str) -> None:
    """:func:`check_text` for every string in plain data, keys among them; ``where`` is extended by its place in it."""
    try:
        for place, text in _walk(value, where):
            check_text(text, place)
    except RecursionError:
        raise UserError("nested too deeply", where=where) from None


def _walk(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield f"a field of {where}", key
            yield from _walk(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{where}[{index}]")
