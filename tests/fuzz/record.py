"""Pytest plugin of ``make fuzz``: runs property tests alone, notes which have passed, and writes what fails as a case.

``python -m pytest -p tests.fuzz.record --hypothesis-profile=fuzz --hypothesis-seed=N --fuzz-record=FILE``
"""

from __future__ import annotations

import functools
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import FOLDER, name_of, property_tests, register_profiles, write_case
from .values import Draws, decode, encode

register_profiles()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-record", type=Path, help="a line of JSON for each test that has run; those are not run again"
    )
    parser.addoption(
        "--fuzz-until", type=float, default=float("inf"), help="seconds since 1970 after which no test starts"
    )
    parser.addoption("--fuzz-cases", type=Path, default=FOLDER, help="where found cases go")


def read_record(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that a killed run left in half is none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = property_tests(items)
    done = {line.get("test") for line in read_record(config.getoption("--fuzz-record"))}
    for name, function in tests.items():
        handle = function.hypothesis
        drawn = set(inspect.signature(handle.inner_test).parameters) - set(inspect.signature(function).parameters)
        handle.inner_test = _watch(handle.inner_test, name, drawn, config.getoption("--fuzz-cases"))
    left = [item for item in items if name_of(item) in tests and item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def _watch(test: Callable[..., Any], name: str, drawn: set[str], folder: Path) -> Callable[..., Any]:
    """``test`` that remembers what it was given last when it failed: of shrunk examples the smallest comes last."""
    seen: set[Path] = set()
    tried = False

    @functools.wraps(test)
    def watched(*args: Any, **given: Any) -> Any:
        nonlocal tried
        given = {
            key: Draws([], value) if key in drawn and type(value).__name__ == "DataObject" else value
            for key, value in given.items()
        }
        try:
            return test(*args, **given)
        except BaseException as error:  # pytest's failures are no Exceptions
            passing = isinstance(error, KeyboardInterrupt | SystemExit | pytest.skip.Exception | pytest.exit.Exception)
            # Hypothesis' own are examples that a test does not take.
            if not passing and type(error).__module__.partition(".")[0] != "hypothesis":
                for path in seen:
                    path.unlink()
                seen.clear()
                before = set(folder.glob("*.json"))
                seen.update({write_case(name, {key: given[key] for key in drawn}, error, folder)} - before)
            raise
        finally:
            if not tried:  # before anything fails it is known that it could be written
                tried = True
                decode(encode({key: given[key] for key in drawn}))

    return watched


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--fuzz-until"):
        pytest.exit("the time is over", returncode=0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        _write({"test": report.nodeid, "outcome": report.outcome})


def pytest_configure(config: pytest.Config) -> None:
    global _record
    _record = config.getoption("--fuzz-record")


_record: Path | None = None


def _write(line: dict[str, Any]) -> None:
    assert _record is not None
    with _record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    over = time.time() > session.config.getoption("--fuzz-until")
    if (
        exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        and not over
    ):
        _write({"done": True})
