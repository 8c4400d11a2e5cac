"""Manifest and file checks: a bundle is whole or it is refused with one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest

from secateur.runtime import manifest as m
from secateur.runtime.errors import BundleError
from secateur.runtime.schema import Engines, Stage


def refusal(directory: Path, level: m.Level = "graphs") -> str:
    with pytest.raises(BundleError) as caught:
        m.check_files(directory, m.read_manifest(directory), level)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_manifest_reads_back_as_written(bundle: Path) -> None:
    read = m.read_manifest(bundle)
    before = (bundle / m.MANIFEST).read_bytes()
    assert m.write_manifest(bundle, read) == read
    assert (bundle / m.MANIFEST).read_bytes() == before
    assert before == m.canonical_json(json.loads(before)).encode()
    assert [p.name for p in bundle.iterdir() if p.name.startswith(".")] == []
    m.check_files(bundle, read, "full")


def test_building_twice_gives_the_same_manifest(tiny: ModuleType, built: Path, tmp_path: Path) -> None:
    again = tiny.build(tmp_path / "again")
    assert (again / m.MANIFEST).read_bytes() == (built / m.MANIFEST).read_bytes()


def test_a_failed_write_leaves_the_old_manifest(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted((p.name, p.stat().st_size) for p in bundle.iterdir())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        m.write_manifest(bundle, m.read_manifest(bundle))
    assert sorted((p.name, p.stat().st_size) for p in bundle.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"removed": 1}, "segment s0: length + removed is not the sequence's length"),
        ({"capacity": 1}, "segment s0: capacity is below the rows it holds"),
        ({"evicted": 10_000}, "segment s0: evicted is not below its length"),
        ({"evicted": -1}, "evicted"),
        ({"evicted": 3}, "segment s0: a capacity of {capacity} is not its {held} rows and 8 new"),
    ],
)
def test_segments_that_do_not_add_up(tiny: ModuleType, bundle: Path, change: dict[str, int], message: str) -> None:
    first, *others = json.loads((bundle / m.MANIFEST).read_bytes())["segments"]
    tiny.resign(bundle, segments=[first | change, *others])
    held = first["length"] - change.get("evicted", 0)
    assert message.format(capacity=first["capacity"], held=held) in refusal(bundle)


def test_what_a_manifest_leaves_unsaid() -> None:
    stage = {"name": "s", "site": "projector.out", "scope": "image", "groups": 1, "length_in": 4, "length_out": 2}
    only_scores = Stage(**stage)
    assert not only_scores.chooses
    assert not only_scores.in_decoder
    assert Stage(**stage, select="top_k").chooses
    assert not Stage(**stage | {"length_out": 0}, select="top_k").chooses
    assert Stage(**stage | {"site": "decoder.layer[2]"}).in_decoder
    engines = Engines.model_construct()
    said = engines.weights, engines.version_compatible, engines.hardware_compatible, engines.opt_level
    assert said == ("plan", False, False, None)


def test_what_is_not_a_bundle(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert "no such bundle" in refusal(tmp_path / "nothing")
    assert "a bundle is a directory" in refusal(file)
    assert "it has no manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"schema_version": NaN}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_not_an_object(bundle: Path, text: str) -> None:
    (bundle / m.MANIFEST).write_bytes(text.encode("latin-1"))
    assert "manifest" in refusal(bundle)


def test_a_newer_schema_says_both_versions(tiny: ModuleType, bundle: Path) -> None:
    tiny.resign(bundle, schema_version=7, unheard_of=1)
    assert "has schema 7, this secateur reads up to 3; upgrade" in refusal(bundle)


def test_a_bundle_of_an_older_schema_opens_and_is_written_as_3(tiny: ModuleType, bundle: Path) -> None:
    written = json.loads((bundle / m.MANIFEST).read_bytes())
    assert written["schema_version"] == m.SCHEMA_VERSION == 3
    tiny.resign(bundle, schema_version=1)
    older = m.read_manifest(bundle)
    m.check_files(bundle, older, "full")
    assert older.schema_version == 1
    assert m.write_manifest(bundle, older) == m.read_manifest(bundle)
    assert json.loads((bundle / m.MANIFEST).read_bytes()) == written


@pytest.mark.parametrize("version", [None, "1", True, 0, 1.5])
def test_a_schema_version_that_is_none(tiny: ModuleType, bundle: Path, version: object) -> None:
    tiny.resign(bundle, schema_version=version)
    assert "schema_version is missing or not a number" in refusal(bundle)


def test_an_altered_manifest(bundle: Path) -> None:
    path = bundle / m.MANIFEST
    path.write_text(path.read_text().replace('"new_tokens": 8', '"new_tokens": 9'))
    assert "altered: its digest does not match" in refusal(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"surprise": 1}, "surprise: unknown field"),
        ({"geometry__surprise": 1}, "geometry.surprise: unknown field"),
        ({"geometry__batch": 0}, "geometry.batch"),
        ({"geometry__batch": "1"}, "geometry.batch"),
        ({"segments": []}, "segments do not cover every layer"),
        ({"target": "abacus"}, "target"),
        ({"programs": {}}, "programs are"),
        ({"weights": ["other.safetensors"]}, "other.safetensors is not listed"),
        ({"weights": []}, "weights"),
        ({"weights": ["tokenizer.json"]}, "tokenizer.json has no header_sha256"),
    ],
)
def test_wrong_fields(tiny: ModuleType, bundle: Path, change: dict[str, object], says: str) -> None:
    tiny.resign(bundle, **change)
    assert says in refusal(bundle)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../weights.safetensors", "a/../../b", "a\\b", "C:x", "", ".", "./a", "a//b", "a\0b"]
)
def test_paths_that_leave_the_bundle(tiny: ModuleType, bundle: Path, path: str) -> None:
    tiny.resign(bundle, programs__decode__graph=path)
    assert "leaves the bundle" in refusal(bundle) or "shortest form" in refusal(bundle)


def test_a_link_that_leaves_the_bundle(bundle: Path, tmp_path: Path) -> None:
    (bundle / "decode.onnx").rename(tmp_path / "decode.onnx")
    (bundle / "decode.onnx").symlink_to(tmp_path / "decode.onnx")
    assert "decode.onnx: links to a file outside the bundle" in refusal(bundle)


def test_a_link_that_stays_is_fine(bundle: Path) -> None:
    (bundle / "decode.onnx").rename(bundle / "blob")
    (bundle / "decode.onnx").symlink_to("blob")
    m.check_files(bundle, m.read_manifest(bundle))


FILES = ["vision.onnx", "prefill.onnx", "decode.onnx", "tokenizer.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", [*FILES, "weights.safetensors"])
def test_missing_truncated_and_longer_files(bundle: Path, name: str) -> None:
    path = bundle / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{name}: truncated: {len(whole) - 1} bytes instead of {len(whole)}" in refusal(bundle)
    path.write_bytes(whole + b"x")
    assert f"{name}: longer" in refusal(bundle)
    path.unlink()
    assert f"{name}: missing" in refusal(bundle)
    path.mkdir()
    assert f"{name}: missing" in refusal(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte(bundle: Path, name: str) -> None:
    flip(bundle / name, -1)
    assert f"{name}: altered" in refusal(bundle)


def test_swapped_files(bundle: Path) -> None:
    (bundle / "decode.onnx").write_bytes((bundle / "prefill.onnx").read_bytes())
    assert "decode.onnx: longer than it should be" in refusal(bundle)


def test_a_flipped_weight_shows_in_the_full_check_only(bundle: Path) -> None:
    flip(bundle / "weights.safetensors", -1)
    m.check_files(bundle, m.read_manifest(bundle))
    assert "weights.safetensors: altered" in refusal(bundle, "full")


@pytest.mark.parametrize("at", [0, 7, 8, 9])
def test_a_broken_weight_header(bundle: Path, at: int) -> None:
    flip(bundle / "weights.safetensors", at)
    assert "weights.safetensors: not a whole safetensors file" in refusal(bundle)


def test_weights_shorter_than_their_header_says(tiny: ModuleType, bundle: Path) -> None:
    path = bundle / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    tiny.relist(bundle)
    assert "not a whole safetensors file (data length)" in refusal(bundle)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def test_no_flipped_byte_of_the_manifest_passes_or_crashes(bundle: Path) -> None:
    path = bundle / m.MANIFEST
    whole = path.read_bytes()
    for at in range(0, len(whole), 53):
        for bit in (0x01, 0x20, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with pytest.raises(BundleError):
                m.read_manifest(bundle)
