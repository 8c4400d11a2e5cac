"""Which test files stand nearest to a module: by imports, then by name, then by time.

The distance from a test file to a module is the number of imports between them, read from the source: those inside
functions count, and so do names of our modules in strings, which is how lazy ones are written. The nearest files and
those one import further are taken, `MOST` at most, while their time together is within a limit; tests of measurements
are left out. `ALSO` names those that reach a module by another road.
"""

from __future__ import annotations

import ast
import json
from collections import deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path

FOLDERS = ("compiler", "passes", "exporters", "runtime", "tools")
SECONDS = Path(__file__).with_name("seconds.json")
MINUTE = 60.0
"""Processor seconds that the nearest test file may take."""
LIMIT = 20.0
"""Processor seconds for the tests of one mutant, where the nearest file does not take more alone."""
MOST = 6
UNKNOWN = {"null": 1.0, "unit": 4.0}
"""Seconds that a file is taken to need until it was measured."""
ALSO: dict[str, tuple[str, ...]] = {
    "runtime/backends/": (
        "tests/null/test_onnxruntime_cuda.py", "tests/null/test_session.py", "tests/null/test_tensorrt_faults.py",
        "tests/null/test_tensorrt_memory.py", "tests/null/test_tensorrt_session.py",
    ),
    "runtime/given.py": ("tests/null/test_session.py",),
    "runtime/kv.py": ("tests/null/test_session.py",),
    "runtime/request.py": ("tests/null/test_session.py",),
    "passes/methods/": ("tests/unit/test_transcriptions.py",),
    "passes/recipes/": ("tests/unit/test_transcriptions.py", "tests/unit/test_recipes_table.py"),
}  # fmt: skip
"""Test files that stand as near to a module, or to all of a folder, as those that import it."""


def list_nearest(root: Path, module: str, seconds: Mapping[str, float], limit: float = LIMIT) -> list[str]:
    """Test files for ``module``, e.g. ``passes/stage.py``, in the order they are run."""
    distances = _distances(root).get(module, {})
    also = {file: 1 for key in (module, f"{Path(module).parent}/") for file in ALSO.get(key, ())}
    far, stem = distances | also, Path(module).stem
    least = min(distances.values(), default=0)
    needs = {file: seconds.get(file, UNKNOWN[Path(file).parts[1]]) for file in far}
    ranked = sorted(
        (file for file, distance in far.items() if distance <= least + 1),
        key=lambda file: (far[file], stem not in file, needs[file], file),
    )
    chosen: list[str] = []
    total = 0.0
    for file in ranked:
        if len(chosen) < MOST and total + needs[file] <= (limit if chosen else MINUTE):
            chosen.append(file)
            total += needs[file]
    return chosen


def read_seconds(path: Path = SECONDS) -> dict[str, float]:
    """Processor seconds that each test file took on its own, in a process that had the libraries loaded."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_seconds(seconds: Mapping[str, float], path: Path = SECONDS) -> None:
    path.write_text(json.dumps(dict(sorted(seconds.items())), indent=0) + "\n", encoding="utf-8")


@cache
def _distances(root: Path) -> dict[str, dict[str, int]]:
    """module -> {test file: imports between them}."""
    names = {_name(path.relative_to(root)): str(path.relative_to(root)) for path in _sources(root)}
    imports = {file: _imports(root / file, name, names) for name, file in names.items()}
    found: dict[str, dict[str, int]] = {}
    for test in (file for file in imports if _judges(Path(file).name)):
        reached, queue = {test: 0}, deque([test])
        while queue:
            file = queue.popleft()
            for further in imports[file]:
                if further not in reached:
                    reached[further] = reached[file] + 1
                    queue.append(further)
        for file, distance in reached.items():
            found.setdefault(file, {})[test] = distance
    return found


def _judges(name: str) -> bool:
    return name.startswith("test_") and not name.startswith("test_bench_")


def _sources(root: Path) -> list[Path]:
    places = [*(root / folder for folder in FOLDERS), root / "src" / "secateur", root / "tests"]
    found = {path.resolve() for place in places for path in place.rglob("*.py")}
    return sorted(path for path in found if not {"device", "mutants"} & set(path.relative_to(root.resolve()).parts))


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "src" else parts if parts[0] == "tests" else ("secateur", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, name: str, names: Mapping[str, str]) -> set[str]:
    """Files of ours that the file at ``path`` imports; ``names`` are all our modules."""
    wanted: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            inner = [f"{origin}.{alias.name}" for alias in node.names]
            wanted.update(full if full in names else origin for full in inner)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("secateur."):
            wanted.add(node.value)
    return {names[each] for each in wanted if each in names} - {names.get(name, "")}
