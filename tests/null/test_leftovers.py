"""What killed processes leave is cleared by the next; what lives, is somebody's own or another machine's, stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from secateur.runtime import leftovers
from secateur.runtime.backends import kernel_cache
from secateur.runtime.leftovers import clear_leftovers, held_directory, held_file, make_directory

PREFIX, SUFFIX = ".bundle.", ".partial"

HOLDER = """
import sys, time
from pathlib import Path
from secateur.runtime.leftovers import held_directory, held_file

with held_directory(Path(sys.argv[1]), ".bundle.", ".partial") as made, held_file(Path(sys.argv[1]), ".file-") as file:
    (made / "half").write_text("written")
    print("made", flush=True)
    time.sleep(60)
"""


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing a directory and a file in ``folder``."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "made\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def test_what_a_living_process_writes_stays_and_a_killed_ones_goes(tmp_path: Path) -> None:
    with holding(tmp_path) as child:
        assert len(list(tmp_path.iterdir())) == 2
        with held_directory(tmp_path, PREFIX, SUFFIX), held_file(tmp_path, ".file-"):
            assert len(list(tmp_path.iterdir())) == 4
        assert len(list(tmp_path.iterdir())) == 2
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert len(list(tmp_path.iterdir())) == 2
    with held_directory(tmp_path, PREFIX, SUFFIX) as mine, held_file(tmp_path, ".file-") as (file, _):
        assert set(tmp_path.iterdir()) == {mine, file}
    assert list(tmp_path.iterdir()) == []


def test_what_was_moved_away_stays(tmp_path: Path) -> None:
    with held_directory(tmp_path, PREFIX, SUFFIX) as made:
        os.replace(made, tmp_path / "bundle")
    with held_file(tmp_path, ".file-") as (file, handle):
        os.write(handle, b"whole")
        os.replace(file, tmp_path / "file")
    assert names(tmp_path) == ["bundle", "file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_by_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with held_directory(tmp_path, PREFIX, SUFFIX) as made, held_file(tmp_path, ".file-"):
            (made / "half").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def age(path: Path, seconds: float) -> None:
    for one in (*path.rglob("*"), path):
        before = one.stat().st_mtime - seconds
        os.utime(one, (before, before))


def test_another_machines_stays_until_nothing_is_written_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_machine", lambda: "0" * 8)
    there = make_directory(tmp_path, PREFIX, SUFFIX)
    (there / "half").touch()
    monkeypatch.undo()
    age(there, leftovers.QUIET_S + 60)
    os.utime(there / "half")
    assert clear_leftovers(tmp_path, PREFIX, SUFFIX) == []
    age(there / "half", leftovers.QUIET_S + 60)
    assert clear_leftovers(tmp_path, PREFIX, SUFFIX) == [there]


def test_names_without_a_machine_as_they_were_before_count_as_another_ones(tmp_path: Path) -> None:
    (old := tmp_path / ".bundle.abcd_123.partial").mkdir()
    assert clear_leftovers(tmp_path, PREFIX, SUFFIX) == []
    age(old, leftovers.QUIET_S + 60)
    assert clear_leftovers(tmp_path, PREFIX, SUFFIX) == [old]


OTHERS = (
    ".bundle.mine.partial", ".bundle..partial", ".bundle.12345678.partial.txt", "bundle.12345678.partial",
    ".bundle.v2.12345678.partial", ".other.12345678.partial", ".bundle.12345678.old",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    age(tmp_path / name, leftovers.QUIET_S + 60)
    assert clear_leftovers(tmp_path, PREFIX, SUFFIX) == []


def test_a_users_own_folder_that_only_begins_alike_stays(tmp_path: Path) -> None:
    (tmp_path / "bundle-mymodels").mkdir()
    age(tmp_path / "bundle-mymodels", leftovers.QUIET_S + 60)
    assert clear_leftovers(tmp_path, "bundle-") == []


def test_a_link_and_another_users_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_directory(tmp_path, PREFIX, SUFFIX)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    link = made.with_name(f"{made.name[: -len(SUFFIX) - 8]}abcdefgh{SUFFIX}")
    link.symlink_to(tmp_path / "precious")
    monkeypatch.setattr(os, "getuid", lambda: made.stat().st_uid + 1)
    assert clear_leftovers(tmp_path, PREFIX, SUFFIX) == []
    monkeypatch.undo()
    assert clear_leftovers(tmp_path, PREFIX, SUFFIX) == [made]
    assert link.is_symlink()
    assert (tmp_path / "precious" / "file").exists()


def test_where_there_are_no_locks_nothing_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_directory(tmp_path, PREFIX, SUFFIX)

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(leftovers.fcntl, "flock", refuse)
    with held_directory(tmp_path, PREFIX, SUFFIX) as mine:
        assert {*tmp_path.iterdir()} == {made, mine}
    assert [*tmp_path.iterdir()] == [made]


def test_what_another_process_clears_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, cleared = leftovers.make_directory, []

    def make(*how: object) -> Path:
        made = real(*how)  # type: ignore[arg-type]
        if not cleared:
            cleared.append(made)
            shutil.rmtree(made)
        return made

    monkeypatch.setattr(leftovers, "make_directory", make)
    with held_directory(tmp_path, PREFIX, SUFFIX) as mine:
        assert [*tmp_path.iterdir()] == [mine] != cleared


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    assert clear_leftovers(tmp_path / "nothing", PREFIX, SUFFIX) == []


def test_temporary_names_of_the_package_are_all_made_here() -> None:
    """Whoever makes a temporary place that a kill would leave for good does it by :mod:`leftovers`."""
    root = Path(__file__).resolve().parents[2]
    # They lie inside a directory that is held, or are small and in the system's own place for such files.
    known = {"runtime/leftovers.py", "runtime/manifest.py", "exporters/tensorrt.py", "exporters/plugins/aot.py"}
    found = {
        str(path.relative_to(root))
        for folder in ("compiler", "passes", "exporters", "runtime", "tools")
        for path in (root / folder).rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in ("mkdtemp(", "mkstemp(", "TemporaryDirectory("))
        if "tools/bench" not in str(path)
    }
    assert found <= known
    assert "held_file" in Path(kernel_cache.__file__).read_text(encoding="utf-8")
