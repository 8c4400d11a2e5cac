"""What a user installs: sdist -> wheel -> an environment with the base dependencies and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("compiler", "passes", "exporters", "runtime", "tools")
TRAINING_AND_MEASURING = ("secateur/tools/demo/", "secateur/tools/bench/")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from that sdist, not from the working tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", *FOLDERS):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, source)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean_python(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel and its base dependencies."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", distributions[1])
    return python


def test_sdist_holds_files_where_the_tree_holds_links(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members}
    assert {f"src/secateur/{folder}/__init__.py" for folder in FOLDERS} <= names


def test_wheel_holds_every_module_but_the_training_code(distributions: tuple[Path, Path]) -> None:
    packed = {name for name in zipfile.ZipFile(distributions[1]).namelist() if name.endswith(".py")}
    written = {f"secateur/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} | {
        "secateur/__init__.py",
        "secateur/__main__.py",
        "secateur/recipes.py",
    }
    assert packed == {name for name in written if not name.startswith(TRAINING_AND_MEASURING)}


def test_wheel_says_that_it_is_typed_and_licensed(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[1]).namelist()
    assert "secateur/py.typed" in names
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_runtime_imports_from_the_wheel_alone(clean_python: Path) -> None:
    program = (
        "import importlib.util, secateur.runtime\n"
        "assert not any(map(importlib.util.find_spec, ('torch', 'transformers', 'onnx', 'onnxruntime')))\n"
        "print(secateur.__version__, secateur.runtime.__file__)"
    )
    version, _, file = run(clean_python, "-c", program).partition(" ")
    assert version == "0.1.0"
    assert Path(file.strip()).is_relative_to(clean_python.parents[1])


def test_the_command_teaches_without_any_extra(clean_python: Path) -> None:
    text = run(clean_python.with_name("secateur"), "--help")
    for verb in ("compile", "run", "profile", "explain", "inspect", "verify", "recipes"):
        assert f"\n  {verb} " in text


def test_a_missing_extra_is_named(clean_python: Path, tmp_path: Path) -> None:
    command = [clean_python.with_name("secateur"), "compile", ROOT / "demo" / "model", "-o", tmp_path / "bundle"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=outside_the_tree())
    assert failed.returncode == 2
    assert failed.stderr.strip().endswith("is not installed; pip install 'secateur[compile]'")


def run(*command: object) -> str:
    """Standard output of ``command``; both outputs are in the failure if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=outside_the_tree())
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def outside_the_tree() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
