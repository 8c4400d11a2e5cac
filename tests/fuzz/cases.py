"""Cases that ``make fuzz`` found: one JSON file each, run by ``make test`` within the test they failed.

{"test": "tests/unit/test_x.py::test_y", "arguments": {"seed": 7}, "found": "AssertionError: …"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, settings

from .values import decode, encode

FOLDER = Path(__file__).with_name("cases")


def register_profiles() -> None:
    """``fixed``: the same examples on every run and machine. ``fuzz``: new ones for each seed, nothing remembered."""
    common: dict[str, Any] = {"deadline": None, "database": None}
    settings.register_profile("fixed", derandomize=True, **common)
    settings.register_profile(
        "fuzz", derandomize=False, print_blob=False, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=[HealthCheck.too_slow], **common,
    )  # fmt: skip


def name_of(item: pytest.Item) -> str:
    """A test without its parameters: ``tests/unit/test_x.py::test_y``."""
    return item.nodeid.partition("[")[0]


def property_tests(items: Iterable[pytest.Item]) -> dict[str, Any]:
    """The functions among ``items`` that Hypothesis gives values, by name."""
    found = ((name_of(item), getattr(item, "obj", None)) for item in items)
    return {name: function for name, function in found if getattr(function, "is_hypothesis_test", False)}


def read_cases(folder: Path = FOLDER) -> dict[Path, dict[str, Any]]:
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def add_cases(items: Iterable[pytest.Item], folder: Path = FOLDER) -> None:
    """Give every property test among ``items`` its found cases as explicit examples."""
    tests = property_tests(items)
    for case in read_cases(folder).values():
        if (function := tests.get(case["test"])) is not None:
            example(**{name: decode(value) for name, value in case["arguments"].items()})(function)


def write_case(test: str, arguments: Mapping[str, Any], error: BaseException, folder: Path = FOLDER) -> Path:
    """Write what failed; the same arguments of the same test are the same file."""
    written = {name: encode(value) for name, value in sorted(arguments.items())}
    digest = hashlib.sha256(json.dumps([test, written], sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{test.rpartition('::')[2]}-{digest}.json"
    first = (str(error).splitlines() or [""])[0]
    found = f"{type(error).__name__}: {first}"[:200]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"test": test, "arguments": written, "found": found}, indent=1) + "\n", encoding="utf-8")
    return path
