"""``make mutants``: what is a mutant, the stored sample, the tests near a module, verdicts on a small tree."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from tests.mutants import nearest, page, sample
from tests.mutants.bench import Bench
from tests.mutants.judge import Judge
from tests.mutants.mutations import list_operators, list_places, mutate
from tests.mutants.sample import Mutant

SOURCE = '''from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def join(first: int | None, second: int, *, third: "int | str" = 3) -> int | None:
    """Adds 1 + 1."""
    total: int | None = second
    if first is not None and first == 7:
        total = first | second
    return total


def tell(count: int, *rest: int) -> str:
    return f"{count + 1} of {len(rest)}: {'two' == count}"
'''
LINES = SOURCE.splitlines()


def test_places_are_those_that_run() -> None:
    found = Counter(place.line for place in list_places(SOURCE))
    assert set(found) == {LINES.index(line) + 1 for line in LINES if line.strip().startswith(
        ("if first", "total = ", "return f", "def join"))}  # fmt: skip
    changed = {mutate(SOURCE, place) for place in list_places(SOURCE) if place.line == LINES.index(LINES[6]) + 1}
    # The default of `third` is a number; of what a star may become there only the slash compiles.
    assert {text.splitlines()[6].partition("=")[2].split(")")[0].strip() for text in changed if text} == {"2", "3", "4"}


def test_what_python_warns_of_is_no_mutant() -> None:
    line = LINES.index(next(line for line in LINES if "two" in line)) + 1
    names = {p.operator for p in list_places(SOURCE) if p.line == line and mutate(SOURCE, p) is not None}
    assert "ReplaceComparisonOperator_Eq_NotEq" in names
    assert "ReplaceComparisonOperator_Eq_Is" not in names


def test_operators_draw_nothing_themselves() -> None:
    assert not {name for name in list_operators() if name.startswith("Variable")}
    assert len(list_operators()) > 100


def test_a_sample_is_drawn_the_same_again(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE, encoding="utf-8")
    first, lines = sample.draw(tmp_path, ["a.py"], 4, 1)
    assert (first, lines) == sample.draw(tmp_path, ["a.py"], 4, 1)
    assert lines == 4
    assert len({mutant.line for mutant in first}) == len(first) == 4
    assert all(sample.find(mutant, SOURCE) not in (None, SOURCE) for mutant in first)
    assert any(sample.draw(tmp_path, ["a.py"], 4, seed)[0] != first for seed in range(2, 5))


def test_a_mutant_is_found_by_its_line() -> None:
    line = LINES.index("        total = first | second") + 1
    mutant = Mutant("m001", "a.py", line, "total = first | second", "ReplaceBinaryOperator_BitOr_Add", 0)
    moved = "\n".join(["import os", "", *LINES, "", "def other(first, second):", f"    {mutant.text}"])
    found = sample.find(mutant, moved)
    assert found is not None
    assert found.count("total = first + second") == 1
    assert found.index("total = first + second") < found.index("total = first | second")
    assert sample.find(mutant, SOURCE.replace("first | second", "second | first")) is None


def test_the_stored_sample_is_large_enough() -> None:
    mutants, origin = sample.read()
    assert len(mutants) >= 300
    assert len({(mutant.file, mutant.line) for mutant in mutants}) == len(mutants)
    assert origin["lines"] > len(mutants)
    assert {mutant.id for mutant in mutants} >= set(page.read_reasons())
    reasons = page.read_reasons().values()
    assert all(reason["why"] and reason["kind"] in ("equivalent", "timed out") for reason in reasons)


def test_every_walked_module_has_tests_near_it() -> None:
    seconds = nearest.read_seconds()
    files = [name for name in sample.list_files(sample.ROOT) if not name.endswith("__init__.py")]
    chosen = {file: nearest.list_nearest(sample.ROOT, file, seconds) for file in files}
    assert [file for file, tests in chosen.items() if not tests] == []
    totals = [[seconds.get(test, 1) for test in tests] for tests in chosen.values()]
    assert all(sum(some) <= nearest.LIMIT or (len(some) == 1 and some[0] <= nearest.MINUTE) for some in totals)
    assert chosen["runtime/wav.py"][0] in ("tests/null/test_audio.py", "tests/null/test_sound_files.py")


TOY = """def count(number: int) -> int:
    found = 0
    while number > 0:
        number -= 1
        found += 2
    return found if found >= 0 else 0
"""
TESTS = """from secateur.runtime.toy import count

def test_count():
    assert count(3) == 6
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one module and one test file."""
    files = {"runtime/toy.py": TOY, "tests/null/test_toy.py": TESTS, "src/secateur/__init__.py": "", "a": ""}
    for name, text in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text, encoding="utf-8")
    (tmp_path / "tree" / "src" / "secateur" / "runtime").symlink_to("../../runtime")
    (tmp_path / "tree" / "tests" / "mutants").mkdir()
    shutil.copy(sample.ROOT / "tests" / "mutants" / "server.py", tmp_path / "tree" / "tests" / "mutants")
    subprocess.run(["git", "init", "-q", tmp_path / "tree"], check=True)
    return tmp_path / "tree"


def toy(name: str, line: int, operator: str) -> Mutant:
    return Mutant(name, "runtime/toy.py", line, TOY.splitlines()[line - 1].strip(), operator, 0)


def test_verdicts_and_what_they_rest_on(tree: Path, tmp_path: Path) -> None:
    judge = Judge(tree, tmp_path / "work", slack=1, grace=1, seconds_file=tmp_path / "seconds.json")
    killed = toy("m001", 5, "NumberReplacer")
    survives = toy("m002", 6, "ReplaceComparisonOperator_GtE_Gt")
    endless = toy("m003", 4, "NumberReplacer")
    with Bench(tree) as bench:
        found = {mutant.id: judge.judge(mutant, bench) for mutant in (killed, survives)}
        place = next(p for p in list_places(TOY, ("NumberReplacer",)) if p.line == 4 and p.on_line == 1)
        late = judge.judge(Mutant(**{**vars(endless), "occurrence": place.on_line}), bench)
        assert (bench.tree / "runtime" / "toy.py").read_text() == TOY
    assert found["m001"]["killer"] == "tests/null/test_toy.py::test_count"
    assert {name: verdict["verdict"] for name, verdict in found.items()} == {"m001": "killed", "m002": "survived"}
    assert late["verdict"] == "timed out"
    assert (tree / "runtime" / "toy.py").read_text() == TOY
    assert not list(Path(tempfile.gettempdir()).glob(f"{bench.tree.parent.name}*"))
    assert judge.held(killed) == found["m001"]
    (tree / "tests" / "null" / "test_toy.py").write_text(TESTS + "\n# more\n", encoding="utf-8")
    assert judge.held(killed) == found["m001"]
    assert judge.held(survives) is None
    (tree / "tests" / "null" / "test_toy.py").write_text(TESTS.replace("6", "6.0"), encoding="utf-8")
    assert judge.held(killed) is None


def test_a_test_that_fails_anyway_judges_nothing(tree: Path, tmp_path: Path) -> None:
    (tree / "tests" / "null" / "test_toy.py").write_text(TESTS.replace("6", "5"), encoding="utf-8")
    judge = Judge(tree, tmp_path / "work", slack=1, grace=1, seconds_file=tmp_path / "seconds.json")
    with Bench(tree) as bench:
        assert judge.judge(toy("m001", 5, "NumberReplacer"), bench)["verdict"] == "survived"
    assert judge.failing == {"tests/null/test_toy.py"}


def test_shares_and_faults() -> None:
    reasons = {"a": {"kind": "equivalent", "why": "x"}, "d": {"kind": "equivalent", "why": "x"}}
    verdicts = {"a": "survived", "b": "killed", "c": "timed out", "d": "killed", "e": "gone", "f": "survived"}
    kinds = {name: page.classify({"verdict": verdict}, reasons.get(name)) for name, verdict in verdicts.items()}
    assert kinds["a"] == "equivalent"
    assert page.share(kinds.values()) == 2 / 4
    assert [line.partition(" ")[0] for line in page.list_faults(kinds, reasons)] == ["c", "d"]
