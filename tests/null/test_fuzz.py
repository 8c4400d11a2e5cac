"""Property tests draw the same examples on every run; ``make fuzz`` draws others, and what it finds stays a case."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz import __main__ as fuzz
from tests.fuzz.cases import add_cases, read_cases
from tests.fuzz.values import Draws, decode, encode

from secateur.compiler.layout import Grid

ROOT = Path(__file__).parents[2]
FAULTY = """
from hypothesis import given, settings, strategies as st

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.data())
def test_small(number, data):
    more = data.draw(st.lists(st.integers(0, 9), max_size=3))
    assert number < 100 or len(more) < 1

@given(st.integers())
def test_sound(number):
    assert number == number
"""


def test_property_tests_are_derandomised() -> None:
    assert settings.default is not None
    assert settings.default.derandomize
    assert settings.default.database is None
    assert settings(max_examples=7).derandomize


@given(st.integers(0, 2**64))
def test_examples_are_remembered(number: int) -> None:
    DRAWN.append(number)


DRAWN: list[int] = []


def test_two_runs_draw_the_same() -> None:
    DRAWN.clear()
    test_examples_are_remembered()
    first = list(DRAWN)
    DRAWN.clear()
    test_examples_are_remembered()
    assert first == DRAWN
    assert len(first) > 50


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2**70, 0.1, -0.0, "\ud83d é", b"\x00\xff", [1, [2.0]], (1, (2, "x")), {1: (2,)}, Grid(1, 2, 3),
     [float("inf"), (Grid(4, 5, 6), [])]],
)  # fmt: skip
def test_values_come_back_as_they_were(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert (back, type(back), repr(back)) == (value, type(value), repr(value))


def test_tensors_come_back_as_they_were() -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.tensor([[0.1, -torch.inf]]), torch.zeros(2, 0, dtype=torch.int64), torch.tensor([True])):
        back = decode(json.loads(json.dumps(encode(tensor))))
        assert torch.equal(back, tensor)
        assert back.dtype == tensor.dtype


def test_a_type_that_cannot_be_written_is_named() -> None:
    assert decode(encode(float("nan"))) != decode(encode(float("nan")))
    with pytest.raises(TypeError, match="cannot write SimpleNamespace"):
        encode(SimpleNamespace())


def run(folder: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--minutes", "2", "--work", str(folder / "work"), "--only",
         str(folder / "test_faulty.py"), "--cases", str(folder / "cases"), *options],
        capture_output=True, text=True, cwd=ROOT, timeout=240, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr + done.stdout


def test_what_is_found_becomes_a_case(tmp_path: Path) -> None:
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    code, text = run(tmp_path, "--seeds", "1")
    (path,) = (tmp_path / "cases").iterdir()
    case = json.loads(path.read_text())
    assert code == 1, text
    assert "1 new cases" in text
    assert case["test"].endswith("test_faulty.py::test_small")
    assert case["arguments"] == {"number": 100, "data": {"draws": [[0]]}}, "not shrunk"
    assert case["found"].startswith("AssertionError")

    # The next run goes on behind what is through, finds the same, and writes no second file.
    code, text = run(tmp_path, "--seeds", "1", "--workers", "2")
    assert "seed 2: 2 tests, 1 failed" in text
    assert (code, list((tmp_path / "cases").iterdir())) == (0, [path]), text

    # As an explicit example it fails at once; a mended test passes it.
    calls: list[tuple[int, Any]] = []

    @settings(max_examples=1, deadline=None)
    @given(st.integers(0, 1000), st.data())
    def test_small(number: int, data: Any) -> None:
        calls.append((number, data.draw(st.lists(st.integers(0, 9)))))

    item: Any = SimpleNamespace(nodeid=f"{case['test']}[one]", obj=test_small)
    add_cases([item, item], tmp_path / "cases")
    test_small()
    assert calls[0] == (100, [0])


def test_draws_are_handed_out_again_on_another_call() -> None:
    draws = Draws([1, "x"])
    assert [draws.draw(None) for _ in range(4)] == [1, "x", 1, "x"]


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--workers", "0"], ["--only", "no/such.py"]])
def test_what_cannot_be_fuzzed(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fuzz.main(options)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert options[0] in said or f"no file {options[1]}" in said


def test_every_file_with_property_tests_is_fuzzed() -> None:
    every = {path for path in (ROOT / "tests").rglob("test_*.py") if "@given(" in path.read_text(encoding="utf-8")}
    assert every <= set(fuzz.list_files())


def test_every_case_belongs_to_a_test() -> None:
    """A test that was renamed takes its cases along: change "test" and "arguments" in the file."""
    for path, case in read_cases().items():
        file, _, name = case["test"].partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        arguments = [
            {argument.arg for argument in node.args.args}
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert arguments, f"{path.name}: no test {case['test']}"
        assert set(case["arguments"]) <= arguments[0], path.name
        for value in case["arguments"].values():
            decode(value)
