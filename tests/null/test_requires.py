"""What a bundle says it needs is asked of the library that is installed, before the library is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from secateur.runtime import manifest as m
from secateur.runtime.backends.requires import least_version, numbers
from secateur.runtime.errors import BundleError, SecateurError
from secateur.runtime.session import Session

REQUIRES = {
    "library": "onnxruntime", "version": "1.23", "ir_version": 10, "domains": {"ai.onnx": 23}, "caches": "either",
}  # fmt: skip


def refusal(bundle: Path) -> str:
    with pytest.raises(SecateurError) as caught, Session(bundle):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_older_library_is_named_with_the_one_to_install(
    tiny: ModuleType, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    tiny.resign(bundle, requires=REQUIRES)
    with Session(bundle):
        pass
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    assert refusal(bundle) == (
        "backend onnxruntime: the bundle needs ONNX Runtime 1.23 or newer (its graphs have opset 20), 1.22.1 is "
        "installed; pip install -U 'onnxruntime>=1.23'"
    )
    # Bundles of older schemas say it by their opset.
    tiny.resign(bundle, requires=None, opset=23)
    assert "needs ONNX Runtime 1.23.1 or newer" in refusal(bundle)


def test_versions_are_compared_as_numbers() -> None:
    assert [numbers(v) for v in ("1.23", "1.23.0rc1", "1.9.1+cu12")] == [(1, 23), (1, 23), (1, 9, 1)]
    assert numbers("1.9") < numbers("1.23") <= numbers("1.23.0")


def test_every_opset_that_is_written_has_a_least_library() -> None:
    """TensorRT's graphs are parsed when they are compiled; its engines name the library that built them."""
    dialects = pytest.importorskip("secateur.exporters.dialects").DIALECTS
    opsets = {dialect.opset for name, dialect in dialects.items() if not name.startswith("tensorrt")}
    assert opsets <= {*m.LEAST_ONNXRUNTIME}


def test_a_bundle_for_another_library_is_not_given_to_this_one(tiny: ModuleType, bundle: Path) -> None:
    tiny.resign(bundle, requires={**REQUIRES, "library": "tensorrt", "version": "10.15"})
    assert "the bundle's programs are run by tensorrt" in refusal(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "new"}, "requires.version"),
        ({"version": ""}, "requires.version"),
        ({"library": "abacus"}, "requires.library"),
        ({"domains": {"": 0}}, "requires.domains"),
        ({"caches": None}, "requires.caches"),
        ({"surprise": 1}, "requires.surprise: unknown field"),
    ],
)
def test_requirements_that_are_none(tiny: ModuleType, bundle: Path, change: dict[str, Any], says: str) -> None:
    tiny.resign(bundle, requires={**REQUIRES, **change})
    with pytest.raises(BundleError) as caught:
        m.read_manifest(bundle)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_says_nothing_is_asked_by_opset(built: Path) -> None:
    manifest = m.read_manifest(built)
    assert manifest.requires is None
    assert least_version(manifest) == "1.17"


STEPS = [{"op": "convert_rgb", "on_white": True}, {"op": "stack"}]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({}, "says steps of images and of a video, or of neither"),
        ({"images": [STEPS, STEPS, STEPS]}, "3 lists of steps for 1 images"),
        ({"images": [STEPS[::-1]]}, "steps end with stack or patches"),
        ({"images": [STEPS[:1]]}, "steps end with stack or patches"),
        ({"images": [[*STEPS[:1], {"op": "patches", "patch": 4, "temporal_patch": 1, "merge": 1, "grid": [1, 2, 2]}]]},
         "makes 4 rows of pixel_values, the port has 1"),
        ({"images": [[{"op": "melt"}]]}, "preprocessing.images.0.0"),
        ({"images": [[{"op": "resize", "height": 8, "width": 8, "filter": "soft"}]]}, "filter"),
        ({"images": [STEPS], "placeholders": [{"kind": "image", "token": 3, "becomes": [{"token": 3, "count": 9}]}]},
         "a prompt gets 9 placeholders for 3 features"),
        ({"images": [STEPS], "placeholders": [{"kind": "smell", "token": 1, "becomes": []}]}, "kind"),
    ],
)  # fmt: skip
def test_preprocessing_that_does_not_come_to_the_ports(
    tiny: ModuleType, bundle: Path, said: dict[str, Any], says: str
) -> None:
    tiny.resign(bundle, preprocessing={"images": [STEPS]})
    assert m.read_manifest(bundle).preprocessing is not None
    tiny.resign(bundle, preprocessing=said)
    with pytest.raises(BundleError) as caught:
        m.read_manifest(bundle)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# -- digests, computed from the words of docs/ports.md with hashlib and json alone ---------------------------------


def test_digests_are_of_the_bytes_the_page_says(built: Path) -> None:
    text = (built / "manifest.json").read_text(encoding="utf-8")
    said = json.loads(text)
    unsigned = {key: value for key, value in said.items() if key != "manifest_sha256"}

    def canonical(value: Any) -> str:
        return json.dumps(value, sort_keys=True, indent=1, separators=(",", ": "), ensure_ascii=False) + "\n"

    assert said["manifest_sha256"] == hashlib.sha256(canonical(unsigned).encode()).hexdigest()
    assert text == canonical(said)
    for path, entry in said["files"].items():
        content = (built / path).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        if path.endswith(".safetensors"):
            size = 8 + int.from_bytes(content[:8], "little")
            assert entry["header_sha256"] == hashlib.sha256(content[:size]).hexdigest()
        else:
            assert entry["header_sha256"] is None
