"""For all tests: signals as a terminal has them, and golden text, what something prints, compared line by line."""

from __future__ import annotations

import difflib
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="session", autouse=True)
def default_signals() -> None:
    """A test run in the background, or under nohup, ignores signals, and so would every program it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    """The command line sets the package's level for good; the next test in the process starts with its own."""
    logger = logging.getLogger("secateur")
    level = logger.level
    yield
    logger.setLevel(level)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden", action="store_true", help="rewrite tests/golden/ with what is printed now; read the diff"
    )


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Callable[[str, str], None]:
    """``golden(name, text)``: ``text`` is what ``tests/golden/<name>.txt`` holds."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if pytestconfig.getoption("--regenerate-golden"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(f"{text}\n", encoding="utf-8")
        kept = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        difference = list(difflib.unified_diff(kept, text.splitlines(), str(path), "now", n=1, lineterm=""))
        if difference:
            shown = "\n".join(difference[:40])
            pytest.fail(f"{shown}\n… if this is meant: pytest --regenerate-golden, and read the diff", pytrace=False)

    return check
