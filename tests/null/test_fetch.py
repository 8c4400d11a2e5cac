"""Addresses: refused unless asked for; then bounded in size and time, with a line for every failure."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secateur.runtime import fetch as fetching
from secateur.runtime.errors import UserError
from secateur.runtime.fetch import fetch, show_address
from secateur.runtime.messages import read_messages
from secateur.runtime.session import Session

PIXELS = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def encode() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/missing":
            return self.send_error(404)
        if path.startswith("/to-"):
            self.send_response(302)
            self.send_header("Location", {"/to-picture": "/a.png", "/to-file": "file:///etc/passwd"}[path])
            return self.end_headers()
        body = encode() if path == "/a.png" else b"x" * 5000
        self.send_response(200)
        if path not in ("/slow", "/endless"):
            self.send_header("Content-Length", str(len(body) + (7 if path == "/short" else 0)))
        self.end_headers()
        if path == "/silent":
            time.sleep(1.5)
        for _ in range(100 if path in ("/slow", "/endless") else 1):
            try:
                self.wfile.write(body[:50] if path == "/slow" else body)
                self.wfile.flush()
            except OSError:
                return None
            time.sleep(0.05 if path == "/slow" else 0)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def refusal(address: str, most: int = 1 << 20, seconds: float = 10) -> str:
    with pytest.raises(UserError) as caught:
        fetch(address, most, seconds)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_asked_for_is_fetched(server: str, built: Path) -> None:
    assert fetch(f"{server}/a.png?size=1") == encode() == fetch(f"{server}/to-picture")
    part = {"type": "image_url", "image_url": {"url": f"{server}/a.png"}}
    message = [{"role": "user", "content": [part]}]
    assert read_messages(message, allow_network=True).media["image"] == [encode()]
    with Session(built) as session:
        wanted = session.generate("x", PIXELS).tokens
        assert session.generate("x", f"{server}/a.png", allow_network=True).tokens == wanted
        for prompt, images in (("x", f"{server}/a.png"), (message, None)):
            with pytest.raises(UserError, match=r"a\.png is not a local file; download the image .* allow_network"):
                session.generate(prompt, images)


def test_what_cannot_be_fetched(server: str) -> None:
    assert refusal(f"{server}/missing").endswith("/missing: the server answers 404; check the address")
    assert "the server answers 302" in refusal(f"{server}/to-file")
    assert "the answer ends after 5000 of 5007 bytes" in refusal(f"{server}/short")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "cannot be fetched (" in refusal(f"http://127.0.0.1:{port}/")
    assert "cannot be fetched (" in refusal(f"http://127.0.0.1:{port}/a b")
    assert "cannot be fetched (" in refusal("http://[::1/")


def test_bounds(server: str) -> None:
    assert "more than 0 MiB; download it" in refusal(f"{server}/any", most=4999)
    assert "more than 0 MiB; download it" in refusal(f"{server}/endless", most=20000)
    for path in ("slow", "silent"):
        start = time.monotonic()
        assert "not read within 0.4 s; download it" in refusal(f"{server}/{path}", seconds=0.4)
        assert time.monotonic() - start < 1.4
    for thread in threading.enumerate():
        if thread.name == "secateur-fetch":
            thread.join(5)


def test_addresses_in_messages_hold_no_secrets() -> None:
    assert show_address("https://me:secret@x.org/a.png?key=secret#secret") == "https://x.org/a.png"
    assert len(show_address("http://x.org/" + "a" * 1000)) == 80
    assert show_address("http://x.org/a\nb\x1b") == "http://x.org/ab?"
    assert set(fetching.SCHEMES) == {"http", "https", "ftp"}
