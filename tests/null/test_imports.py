"""What importing costs: the runtime and the command line load without the libraries of the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import secateur

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("compiler", "passes", "exporters", "runtime", "tools")
HEAVY = (
    "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "yaml"
)  # fmt: skip

# Runs in an interpreter of its own, in which the libraries named on the command line cannot be found.
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

IMPORT_EVERY_MODULE = """
import importlib, pkgutil
import secateur.runtime
for module in pkgutil.walk_packages(secateur.runtime.__path__, "secateur.runtime."):
    importlib.import_module(module.name)
"""

LOAD_EVERY_VERB = """
from secateur.tools import cli
group = cli.VerbGroup(name="secateur")
assert all(group.get_command(None, verb) for verb in cli.VERBS)
"""


def run_without(libraries: tuple[str, ...], program: str) -> None:
    command = [sys.executable, "-c", WITHOUT + program, ",".join(libraries)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_runtime_module_imports_without_heavy_libraries() -> None:
    run_without(HEAVY, IMPORT_EVERY_MODULE)


def test_every_verb_loads_without_heavy_libraries() -> None:
    run_without(HEAVY, LOAD_EVERY_VERB)


def test_public_names_can_be_listed_without_heavy_libraries() -> None:
    run_without(HEAVY, "import secateur\nassert set(secateur.__all__) <= set(dir(secateur))")


ERRORS_ARE_PUBLIC = """
import sys
import secateur
from secateur.runtime import errors
found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
assert {"SecateurError", "UserError", "BundleError", "MisfitError"} <= found <= set(secateur.__all__), found
assert all(getattr(secateur, name) is getattr(errors, name) for name in found)
assert not {name.partition(".")[0] for name in sys.modules} & {"numpy", "pydantic"}
"""


def test_every_error_a_caller_may_catch_is_a_public_name_and_costs_no_library() -> None:
    run_without(HEAVY, ERRORS_ARE_PUBLIC)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        secateur.prune_everything  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize("folder", FOLDERS)
def test_packages_are_relative_links_to_the_top_folders(folder: str) -> None:
    link = ROOT / "src" / "secateur" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", "..", folder)


def test_every_package_says_what_lives_there() -> None:
    silent = [
        path.parent.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
        if not path.read_text(encoding="utf-8").startswith('"""')
    ]
    assert not silent


def test_every_folder_of_modules_is_a_package() -> None:
    # Without an __init__.py setuptools would leave the folder out of the wheel.
    homeless = {
        path.parent.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert not homeless
