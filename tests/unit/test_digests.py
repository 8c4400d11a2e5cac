"""Digests of large files, computed beside other work."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from secateur.exporters import digests as module
from secateur.exporters.digests import Digests
from secateur.runtime.manifest import hash_file


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.bin" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (3_000_000 + number))
    return paths


def test_digests_are_those_of_the_files(files: list[Path]) -> None:
    told: list[int] = []
    with Digests() as digests:
        digests.begin(files[:2])
        found = digests.get(files, told.append)
    assert found == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert told[-1] == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000])
def test_pieces_of_any_size_make_the_same_digest(tmp_path: Path, size: int) -> None:
    path, told = tmp_path / "file", list[int]()
    path.write_bytes(bytes(range(256)) * 20 if size == 5000 else bytes(size))
    assert hash_file(path, told.append, 1000) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(told) == path.stat().st_size


def test_a_file_is_read_once(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def hash_file(path: Path, on_bytes: object, piece: int) -> str:
        read.append(path)
        return path.name

    monkeypatch.setattr(module, "hash_file", hash_file)
    with Digests() as digests:
        digests.begin(files)
        digests.begin(files)
        assert digests.get(files) == {path: path.name for path in files}
    assert sorted(read) == files


def test_a_file_written_to_since_is_read_again(files: list[Path]) -> None:
    with Digests() as digests:
        digests.get(files)
        files[0].write_bytes(b"other")
        os.utime(files[0], ns=(1, 1))
        assert digests.get(files)[files[0]] == hashlib.sha256(b"other").hexdigest()


def test_leaving_stops_what_is_under_way(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A compilation that fails does not wait for gigabytes to be read."""
    started, pieces = threading.Event(), []

    def hash_file(path: Path, on_bytes: object, piece: int) -> str:
        assert callable(on_bytes)
        for number in range(1_000_000):
            pieces.append(number)
            started.set()
            on_bytes(1)
            time.sleep(0.001)
        return "whole"

    monkeypatch.setattr(module, "hash_file", hash_file)

    with Digests() as digests:
        digests.begin(files)
        assert started.wait(10)
    assert 0 < len(pieces) < 1_000_000


def test_files_that_turn_out_unneeded_are_not_read_on(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_file(path: Path, on_bytes: object, piece: int) -> str:
        assert callable(on_bytes)
        while path == files[0]:
            on_bytes(1)
        return path.name

    monkeypatch.setattr(module, "hash_file", hash_file)
    with Digests() as digests:
        digests.begin(files)
        digests.keep(files[1:])  # else the next line waits for ever
        assert digests.get(files[1:]) == {path: path.name for path in files[1:]}
