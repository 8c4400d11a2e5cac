"""For all tests: who runs which, signals as a terminal has them, and golden text, which is compared line by line."""

from __future__ import annotations

import difflib
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from .fuzz.cases import add_cases, register_profiles

# Property tests draw the same examples on every run; `make fuzz` draws others.
register_profiles()
settings.load_profile("fixed")

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


LONG = (
    "test_matrix_layouts.py", "test_matrix_sample.py", "test_tensorrt_recipes.py", "test_demo_omni_run.py",
    "test_demo_run.py", "test_compile_scale.py", "test_timed_prompts.py",
)  # fmt: skip
"""Files whose tests are few and long: begun first, so that no worker is left alone with one at the end."""
TOGETHER = ("test_export.py", "test_passes.py", "test_passes_golden.py", "test_manifest_page.py")
"""Files that look at the same pruned programs, of every row of the table, which one worker then makes once."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Property tests get the cases that were found; and for ``--dist loadgroup`` a file stays with one worker, so that
    what its fixtures make is made once."""
    add_cases(items)
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        name = TOGETHER[0] if item.path.name in TOGETHER else str(item.path.relative_to(config.rootpath))
        item.add_marker(pytest.mark.xdist_group(name))
    place = {name: index for index, name in enumerate((*LONG, *TOGETHER))}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


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
