"""What makes a stored result stale, and what does not."""

from pathlib import Path

import pytest

from secateur.tools.sweep.records import (
    cell_key,
    digest,
    digest_model,
    digest_sources,
    holds,
    read_record,
    write_record,
)

CELL = {"model": "a" * 64, "plan": "recipe fastv keep=0.25", "positions": "original", "questions": 1000}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "b" * 64},
        {"plan": "recipe fastv keep=0.5"},
        {"plan": "recipe random keep=0.25"},
        {"positions": "compact"},
        {"questions": 40},
        {"sources": "c"},
    ],
)
def test_key_changes_with_everything_the_result_depends_on(change: dict) -> None:
    assert cell_key(**CELL) == cell_key(**dict(reversed(CELL.items())))
    assert cell_key(**{**CELL, **change}) != cell_key(**CELL)


def test_model_digest_sees_weights_but_not_the_card(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = digest_model(tmp_path)
    (tmp_path / "README.md").write_text("about the model")
    assert digest_model(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"better weights")
    assert digest_model(tmp_path) != first


def test_source_digest_covers_what_it_is_told() -> None:
    assert digest_sources("passes") == digest_sources("passes")
    assert digest_sources("passes") != digest_sources("passes", "runtime/kv.py")
    assert digest_sources() == digest({})


def test_half_a_record_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "cells" / "fastv-0.25.json"
    assert read_record(path) == {}
    write_record(path, {"key": "k", "accuracy": 0.5})
    assert holds(read_record(path), "k")
    assert not holds(read_record(path), "other")
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing half-written is left"
    path.write_text('{"key": "k", "accu')
    assert not holds(read_record(path), "k")
    path.write_text("[1]")
    assert read_record(path) == {}
