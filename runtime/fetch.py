"""Files from the network, where a caller asked for that: http, https and ftp, bounded in size and time."""

from __future__ import annotations

import threading
import time
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from secateur.runtime.errors import UserError

SCHEMES = ("http", "https", "ftp")
MOST_BYTES = 256 << 20
"""A longer answer is refused."""
SECONDS = 60.0
"""From the first byte asked for to the last one read, redirections among them."""
_PIECE = 1 << 16


def fetch(address: str, most: int = MOST_BYTES, seconds: float = SECONDS) -> bytes:
    """What lies at an address. Raises :class:`UserError` for every failure, in one line.

    Redirections are followed, to the same schemes alone. The thread that waits for a server which never answers is left
    behind when the time is up; its socket closes ``seconds`` later.
    """
    where, ends = show_address(address), time.monotonic() + seconds
    result: list[bytes | Exception] = []

    def work() -> None:
        try:
            result.append(_read(address, where, most, seconds, ends))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, name="secateur-fetch", daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise _too_slow(where, seconds)
    if isinstance(found := result[0], bytes):
        return found
    raise _blame(found, where, seconds) from None


def show_address(address: str) -> str:
    """For messages: short, and without what may be secret (a password, a signed query)."""
    try:
        parts = urlsplit(address)
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        shown = address
    shown = "".join(letter if letter.isprintable() else "?" for letter in shown)
    return shown if len(shown) <= 80 else shown[:79] + "…"


def _read(address: str, where: str, most: int, seconds: float, ends: float) -> bytes:
    request = Request(address, headers={"User-Agent": "secateur"})
    with urlopen(request, timeout=seconds) as answer:
        said = answer.headers.get("Content-Length") if answer.headers else None
        announced = int(said) if said and said.isdigit() else None
        if announced is not None and announced > most:
            raise _too_large(where, most)
        pieces, count = [], 0
        while piece := answer.read1(_PIECE):
            pieces.append(piece)
            count += len(piece)
            if count > most:
                raise _too_large(where, most)
            if time.monotonic() > ends:
                raise _too_slow(where, seconds)
    if announced is not None and count < announced:
        raise UserError(f"the answer ends after {count} of {announced} bytes", where=where, fix="try again")
    return b"".join(pieces)


def _too_large(where: str, most: int) -> UserError:
    return UserError(f"more than {most >> 20} MiB", where=where, fix="download it, and give the path")


def _too_slow(where: str, seconds: float) -> UserError:
    return UserError(f"not read within {seconds:g} s", where=where, fix="download it, and give the path")


def _blame(error: Exception, where: str, seconds: float) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, HTTPError):
        error.close()
        return UserError(f"the server answers {error.code}", where=where, fix="check the address")
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return _too_slow(where, seconds)
    if not isinstance(error, (OSError, HTTPException, ValueError)):
        raise error
    said = " ".join(str(reason).split()) or type(reason).__name__
    return UserError(f"cannot be fetched ({said})", where=where, fix="check the address")
