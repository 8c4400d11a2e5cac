"""Results on disk, one JSON file per cell of a table, each with the digests that say whether it still holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import secateur
from secateur.runtime.manifest import hash_file

PROGRAM_SOURCES = ("compiler", "passes", "exporters", "runtime")
"""The folders whose code makes a bundle and runs it."""


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_model(directory: Path) -> str:
    """SHA-256 over every file of a model directory but its card."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix != ".md")
    return digest({path.name: hash_file(path) for path in files})


def digest_sources(*parts: str) -> str:
    """SHA-256 over the package's Python files that are, or lie below, ``parts`` (such as ``passes``)."""
    root = Path(secateur.__file__).parent
    files: list[Path] = []
    for part in parts:
        path = root / part
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return digest({str(path.relative_to(root)): hash_file(path) for path in files})


def cell_key(*, model: str, plan: str, positions: str, **others: Any) -> str:
    """What a cell's result depends on: the model's digest, the planned recipe, and whatever else is named."""
    return digest({"model": model, "plan": plan, "positions": positions, **others})


def read_record(path: Path) -> dict[str, Any]:
    """A cell's record; empty where there is none, or where a crash left half of one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(path: Path, record: Any) -> None:
    """Write JSON so that an interrupt leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def holds(record: dict[str, Any], key: str) -> bool:
    return record.get("key") == key


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
