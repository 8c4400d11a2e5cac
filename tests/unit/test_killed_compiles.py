"""A compile that is killed leaves nothing for good: the next one to the same place clears it, and loses no bundle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.compiler import output
from secateur.compiler.output import MANIFEST, recover_output, whole_directory
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import check_files, read_manifest

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"


def command(out: Path, *more: str) -> list[str]:
    sizes = ("--text-tokens", "24", "--new-tokens", "2")
    return [sys.executable, "-m", "secateur", "compile", str(DEMO), "-o", str(out), *sizes, *more]


def kill_while(process: subprocess.Popen[str], folder: Path, pattern: str) -> list[Path]:
    """SIGKILL once something of that name is there; what lies in the folder then."""
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and not list(folder.glob(pattern)):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return list(folder.iterdir())


@pytest.mark.slow
def test_a_killed_compile_of_the_demo_model_is_cleared_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with subprocess.Popen(
        command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        left = kill_while(process, tmp_path, ".bundle.*.partial")
    assert [path.suffix for path in left] == [".partial"]
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"removed {left[0]}, which a process that was killed had left" in done.stderr
    assert list(tmp_path.iterdir()) == [out]
    check_files(out, read_manifest(out), "full")


REPLACING = """
import os, sys, time
from pathlib import Path
from secateur.compiler import output

wait, replace = int(sys.argv[2]), os.replace

def replace_and_wait(old, new):
    global wait
    if wait == 0:
        print("between", flush=True)
        time.sleep(60)
    wait -= 1
    replace(old, new)

os.replace = replace_and_wait
output.shutil.rmtree = lambda *how, **more: replace_and_wait("/", "/")
with output.whole_directory(Path(sys.argv[1]), True) as work:
    (work / "new").touch()
"""


def make_bundle(out: Path) -> None:
    out.mkdir()
    (out / "graph").write_text("old")
    (out / MANIFEST).write_text(json.dumps({"secateur": "0", "files": {"graph": {}}}))


@pytest.mark.parametrize(
    ("moves", "stays"), [(0, {"graph", MANIFEST}), (1, {"graph", MANIFEST}), (2, {"new"})], ids=["none", "old", "both"]
)
def test_a_bundle_that_is_being_replaced_is_not_lost(tmp_path: Path, moves: int, stays: set[str]) -> None:
    """Killed before the old one moved aside, behind that, and behind the new one came into its place."""
    make_bundle(out := tmp_path / "bundle")
    with subprocess.Popen(
        [sys.executable, "-c", REPLACING, str(out), str(moves)], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "between\n"
            before = {path for path in tmp_path.iterdir() if any(path.iterdir())}
            recover_output(out)
            assert {path for path in tmp_path.iterdir() if any(path.iterdir())} == before, "its process lives"
        finally:
            child.kill()
    recover_output(out)
    assert list(tmp_path.iterdir()) == [out]
    assert {path.name for path in out.iterdir()} == stays


def test_what_two_compiles_to_one_place_write_stays_apart(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "bundle", True) as one, whole_directory(tmp_path / "bundle", True) as other:
        assert one != other
        assert one.is_dir()
        (other / MANIFEST).write_text(json.dumps({"secateur": "0", "files": {}}))
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == []


def test_a_leftover_beside_a_bundle_of_another_name_is_its_own(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "bundle.v2", False) as work:
        os.rename(work, kept := tmp_path / work.name.replace("partial", "kept"))
        os.rename(kept, work)
        recover_output(tmp_path / "bundle")
        assert work.is_dir()


def test_an_output_beside_which_nothing_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output, "held_directory", refuse)
    with pytest.raises(UserError, match="cannot be written"), whole_directory(tmp_path / "bundle", False):
        pass
