"""Where a picture, a clip or a video comes from: a path, a ``file:`` or ``data:`` URL, base64, bytes, an open file, or,
where a caller asked for it, an address."""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from secateur.runtime.data_url import is_data_url, read_data_url, shorten
from secateur.runtime.errors import UserError
from secateur.runtime.fetch import SCHEMES, fetch, show_address

KNOWN = ("a path", "file:", "data:", *(f"{scheme}: with allow_network" for scheme in SCHEMES))
"""What a string may be."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
"""Two letters or more: one is a drive of Windows."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_LEAST_BASE64 = 64
"""Characters: shorter text is taken for a path that is not there."""
_FOREIGN = {"image": ("audio", "video", "text"), "video": ("audio", "text"), "audio": ("image", "text")}
"""Kind -> the kinds of a ``data:`` URL that cannot be it. (A moving GIF is a video.)"""


def read_source(source: Any, kind: str, where: str | None = None, allow_network: bool = False) -> Any:
    """A local path (``str``), or the bytes that a string, an open file or a buffer holds; anything else as it is.

    ``kind`` is image, video or audio. transformers takes a string that is no file for base64; so does this one, where
    it is long enough and nothing else. Raises :class:`UserError` for addresses unless ``allow_network``, for other
    schemes, and for URLs that cannot be read.
    """
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, bytes):
        return source
    if isinstance(source, str):
        return _read_text(source, kind, where, allow_network)
    if callable(getattr(source, "read", None)) and not isinstance(source, PathLike):
        # Readers of pictures and videos go to and fro in a file; memory is for what cannot.
        seekable = getattr(source, "seekable", None)
        keep = kind != "audio" and callable(seekable) and seekable()
        return source if keep else _read_open(source, kind, where)
    return source


def name_source(source: object) -> str | None:
    """What messages call a source: its path or address, or how many bytes it has; None for an array or a picture."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if isinstance(source, (str, PathLike)):
        text = os.fspath(source)
        if (match := _SCHEME.match(text)) and match[1].lower() in SCHEMES:
            return show_address(text)
        return shorten(text)
    return str(getattr(source, "name", "a file object")) if callable(getattr(source, "read", None)) else None


def _read_text(source: str, kind: str, where: str | None, allow_network: bool) -> str | bytes:
    if is_data_url(source):
        return _read_data(source, kind, where)
    scheme = match[1].lower() if (match := _SCHEME.match(source)) else ""
    if scheme == "file":
        return _local_path(source, where)
    if scheme in SCHEMES:
        if not allow_network:
            raise UserError(
                f"{show_address(source)} is not a local file", where=where,
                fix=f"download the {kind} and give its path, or ask for it with allow_network=True (--allow-network)",
            )  # fmt: skip
        return fetch(source)
    if _is_file(source):
        return source
    if scheme and source[len(scheme) + 1 :].startswith("//"):
        raise UserError(f"addresses of {scheme}: are not read", where=where, available=KNOWN)
    if len(source) >= _LEAST_BASE64 and _BASE64.fullmatch("".join(source.split())):
        return read_data_url(f"data:;base64,{source}", where)
    if len(source) > 4096:
        raise UserError(f"text of {len(source)} characters is no path", where=where, available=KNOWN)
    return source


def _read_data(source: str, kind: str, where: str | None) -> bytes:
    media = source[len("data:") :].partition(",")[0].split(";")[0].strip().lower()
    if media.split("/")[0] in _FOREIGN[kind]:
        raise UserError(f"a data: URL of {media:.40}", where=where, fix=f"give one of {kind}/…")
    return read_data_url(source, where)


def _local_path(source: str, where: str | None) -> str:
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise UserError(f"a file: URL that cannot be ({error})", where=where, fix="write file:///path") from None
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"a file: URL of another machine ({parts.netloc})", where=where, fix="write file:///path")
    return url2pathname(parts.path)


def _read_open(source: Any, kind: str, where: str | None) -> bytes:
    try:
        data = source.read()
    except (OSError, ValueError) as error:
        raise UserError(f"the open file cannot be read ({error})", where=where) from None
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise UserError(f"the open file gives {type(data).__name__}", where=where, fix=f"open the {kind} with 'rb'")
    return bytes(data)


def _is_file(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for the file system, or with a zero byte
        return False
