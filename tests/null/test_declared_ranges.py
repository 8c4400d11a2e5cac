"""What pyproject.toml declares, what the page of versions says was tried, and the extras that texts name agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur.runtime.backends import preflight
from secateur.runtime.schema_requires import LEAST_ONNXRUNTIME
from secateur.tools.failures import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("compiler", "passes", "exporters", "runtime", "tools", "docs", "tests")
DECLARED: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OFFERED: dict[str, list[str]] = DECLARED["optional-dependencies"]
ONE_BOUND = re.compile(r"([A-Za-z0-9-]+)(?:\[[a-z,]+\])?>=([0-9.]+)")
TRIED = ("compile", "cpu", "video", "sound", "sweep")
"""Extras that `make test-lowest` installs; what the others bring needs a GPU."""


def texts() -> dict[str, str]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    files += [f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".md")]
    return {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8") for f in files if f != Path(__file__).resolve()}


def names_in(text: str) -> set[str]:
    """Extras that a text tells to install; those of f-strings in braces are values of tables."""
    lists = re.findall(r"(?:secateur|'?\.)\[([a-z, -]+)\]", text)
    return {name.strip() for each in lists for name in each.split(",")}


def bounds(*extras: str) -> dict[str, str]:
    """The least version of each package that users get."""
    listed = [*DECLARED["dependencies"], *(each for extra in extras for each in OFFERED[extra])]
    found = [ONE_BOUND.fullmatch(each) for each in listed]
    assert all(found), [each for each, match in zip(listed, found, strict=True) if not match]
    return {match[1]: match[2] for match in found if match}


def test_extras_that_texts_name_are_offered_and_all_are_named() -> None:
    named = {extra: where for where, text in texts().items() for extra in names_in(text)}
    named |= dict.fromkeys(EXTRAS.values(), "tools/failures.py")
    named |= {preflight._extra(flavour): "runtime/backends/preflight.py" for flavour in preflight.MODULES}
    assert {extra: where for extra, where in named.items() if extra not in OFFERED} == {}
    used = set(named) | set(re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split(","))
    assert set(OFFERED) - used == set(), "an extra that nothing names"


def test_every_requirement_has_one_lower_bound() -> None:
    assert bounds(*OFFERED)


def test_the_page_says_of_every_requirement_what_was_tried() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = dict(re.findall(r"^\| ([A-Za-z0-9-]+) \| ([0-9.]+) \|", page, re.M))
    declared = bounds(*TRIED) | {"python": DECLARED["requires-python"].removeprefix(">=")}
    assert {name: padded(version) for name, version in rows.items()} == {n: padded(v) for n, v in declared.items()}
    assert f"RANGE_EXTRAS := {' '.join(TRIED)}\n" in (ROOT / "Makefile").read_text()


def padded(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    return (*numbers, *(0,) * (3 - len(numbers)))


def test_the_runtime_and_its_extra_ask_for_the_same_library() -> None:
    assert bounds("cpu")["onnxruntime"] == LEAST_ONNXRUNTIME[max(LEAST_ONNXRUNTIME)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install 'secateur[sound]', or", {"sound"}),
        ("pip install -e '.[compile,cpu]'", {"compile", "cpu"}),
        ("secateur[{extra}] and program[0]", set()),
    ],
)
def test_names_are_read_off_texts(text: str, found: set[str]) -> None:
    assert names_in(text) == found
