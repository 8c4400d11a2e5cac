"""Streams and threads: closing from elsewhere, taking pieces together, letting go; sessions that close meanwhile."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from secateur.runtime.errors import SecateurError, UserError
from secateur.runtime.request import Request
from secateur.runtime.session import Session

SOON = 10.0
"""Seconds that nothing here should need."""


@pytest.fixture
def session(built: Path) -> Iterator[Session]:
    with Session(built, threads=1) as session:
        yield session


class Gate:
    """Holds decode steps of one request until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int = 1) -> None:
        self.reached, self.opened, self.steps = threading.Event(), threading.Event(), 0
        decode = Request.decode

        def held(request: Request, tokens: Any) -> Any:
            self.steps += 1
            if self.steps == step:
                self.reached.set()
                assert self.opened.wait(SOON)
            return decode(request, tokens)

        monkeypatch.setattr(Request, "decode", held)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_closing_from_another_thread_ends_it_after_the_running_step(
    session: Session, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, got = Gate(monkeypatch, step=2), []
    stream = session.stream("what", image, ignore_eos=True, temperature=0.0)
    thread = in_thread(lambda: got.extend(stream))
    assert gate.reached.wait(SOON)
    stream.close()  # does not wait
    stream.close()
    assert session._idle == []
    gate.opened.set()
    ended = stream.generations  # waits
    thread.join(SOON)
    assert not thread.is_alive()
    assert ended[0].finish_reason == "cancelled"
    assert len(ended[0].tokens) <= 3
    assert gate.steps == 2
    assert ended[0].text.startswith("".join(got))
    assert len(session._idle) == 1, "the caches are free again"
    assert list(stream) == []
    assert session.generate("what", image, ignore_eos=True).finish_reason == "length"


def test_a_thread_that_waits_for_its_turn_gets_nothing_more(
    session: Session, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    stream = session.stream("what", image, ignore_eos=True)
    threads = [in_thread(lambda: list(stream)) for _ in range(3)]
    assert gate.reached.wait(SOON)
    stream.close()
    gate.opened.set()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert gate.steps == 1
    assert stream.generations[0].finish_reason == "cancelled"
    assert len(session._idle) == 1


def test_threads_take_pieces_in_turn(session: Session, image: Image.Image) -> None:
    whole = session.generate("what", image, ignore_eos=True)
    for _ in range(5):
        stream = session.stream("what", image, ignore_eos=True)
        with ThreadPoolExecutor(3) as pool:
            taken = [future.result() for future in [pool.submit(lambda: list(stream)) for _ in range(3)]]  # noqa: B023  # done before the next
        assert sum(len("".join(pieces)) for pieces in taken) == len(whole.text)
        assert stream.generations[0].tokens == whole.tokens


def test_closing_at_any_moment(session: Session, image: Image.Image) -> None:
    """Closed by a thread that does not know where the other is: it ends, once, and the session goes on."""
    for wait in (0.0, 0.0005, 0.001, 0.002, 0.004) * 4:
        stream = session.stream("what", image, ignore_eos=True)
        thread = in_thread(lambda: list(stream))  # noqa: B023  # joined before the next
        time.sleep(wait)
        stream.close()
        thread.join(SOON)
        assert not thread.is_alive()
        assert stream.generations[0].finish_reason in ("cancelled", "length")
        assert len(session._idle) <= 1


def test_closing_while_nothing_runs(session: Session, image: Image.Image) -> None:
    never = session.stream("what", image)
    never.close()
    never.close()
    assert (never.generations[0].tokens, list(never)) == ([], [])
    with session.stream("what", image, ignore_eos=True) as begun:
        next(begun)
        other = in_thread(begun.close)
        other.join(SOON)
        assert next(begun, None) is None
    assert begun.generations[0].finish_reason == "cancelled"
    done = session.stream("what", image, ignore_eos=True)
    text = "".join(done)
    done.close()
    assert (done.generations[0].text, done.generations[0].finish_reason) == (text, "length")


def test_a_stream_nobody_holds_gives_its_caches_back(session: Session, image: Image.Image) -> None:
    gc.disable()
    try:
        stream = session.stream("what", image, ignore_eos=True)
        next(stream)
        assert session._idle == []
        del stream
        assert len(session._idle) == 1, "at once, not when a cycle is found"
    finally:
        gc.enable()
    ring: list[Any] = [session.stream("what", image, ignore_eos=True)]
    next(ring[0])
    ring.append(ring)
    assert session._idle == []
    with session._lock:  # the collector may come while this thread is giving a request out
        del ring
        gc.collect()
    assert len(session._idle) == 1


def test_others_on_the_session_go_on(session: Session, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = session.generate("what", image, ignore_eos=True).tokens
    gate = Gate(monkeypatch)
    stream = session.stream("what", image, ignore_eos=True)
    thread = in_thread(lambda: list(stream))
    assert gate.reached.wait(SOON)
    stream.close()
    assert session.generate("what", image, ignore_eos=True).tokens == alone
    gate.opened.set()
    thread.join(SOON)
    assert not thread.is_alive()


def test_a_session_closes_under_a_running_stream(
    built: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(built, threads=1)
    alone = session.generate("what", image, ignore_eos=True).tokens
    gate, later = Gate(monkeypatch), session.stream("what", image)
    stream = session.stream("what", image, ignore_eos=True)
    thread = in_thread(lambda: list(stream))
    assert gate.reached.wait(SOON)
    session.close()
    gate.opened.set()
    thread.join(SOON)
    assert stream.generations[0].tokens == alone, "a stream that has started keeps its programs"
    assert session._idle == []
    with pytest.raises(UserError, match="the session is closed"):
        next(later)


def test_cancelling_from_another_thread(session: Session, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, cancel = Gate(monkeypatch), threading.Event()
    stream = session.stream("what", image, ignore_eos=True, cancel=cancel)
    thread = in_thread(lambda: list(stream))
    assert gate.reached.wait(SOON)
    cancel.set()
    gate.opened.set()
    thread.join(SOON)
    assert stream.generations[0].finish_reason == "cancelled"
    assert len(stream.generations[0].tokens) == 2


def test_a_step_that_fails_while_it_is_closed(
    session: Session, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, opened, seen = threading.Event(), threading.Event(), []

    def fail(request: Request, tokens: Any) -> Any:
        reached.set()
        assert opened.wait(SOON)
        raise SecateurError("broken")

    def take() -> None:
        with pytest.raises(SecateurError, match="broken"):
            list(stream)
        seen.append(True)

    monkeypatch.setattr(Request, "decode", fail)
    stream = session.stream("what", image, ignore_eos=True)
    thread = in_thread(take)
    assert reached.wait(SOON)
    stream.close()
    opened.set()
    thread.join(SOON)
    assert seen
    assert stream.generations[0].finish_reason == "cancelled"
    assert session._idle == []
