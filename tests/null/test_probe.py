"""Pictures that tell whether a machine makes a bundle's pixels."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image
from typer.testing import CliRunner

from secateur.runtime.errors import BundleError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.probe import compare_pixels, find_difference, probe_pixels
from secateur.runtime.schema_fields import PROBE_LEVELS
from secateur.runtime.session import Session
from secateur.tools.cli import app

PILLOW_11 = Path(__file__).with_name("pillow_11.json")
"""What Pillow 11.3.0 made of the pictures with the processor below."""
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "size": {"height": 224, "width": 160}, "do_center_crop": False,
    "resample": 3,
}  # fmt: skip


def probe(bundle: Path, **changes: Any) -> dict[str, Any]:
    made = probe_pixels(bundle, read_manifest(bundle).variant(0))
    assert made is not None
    return {**made.model_dump(), **changes}


def spoil(levels: str, by: int) -> str:
    values = np.frombuffer(base64.b64decode(levels), np.uint8).astype(int)
    values[:100] += np.where(values[:100] < 128, by, -by)
    return base64.b64encode(values.astype(np.uint8).tobytes()).decode()


def test_the_same_pixels_are_no_matter(
    tiny: ModuleType, bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = probe(bundle)
    assert made == probe(bundle)
    assert made["pillow"] == PIL.__version__
    tiny.resign(bundle, pixels={**made, "pillow": "1.0"})
    assert find_difference(bundle, read_manifest(bundle)) is None
    with Session(bundle):
        pass
    # With the release that made it nothing is computed.
    tiny.resign(bundle, pixels={**made, "sha256": "0" * 64})
    monkeypatch.setattr(Image, "frombytes", lambda *_: pytest.fail("a picture was made"))
    with Session(bundle):
        pass
    assert not caplog.records


def test_other_pixels_are_one_warning(tiny: ModuleType, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = probe(bundle)
    changed = {"pillow": "1.0", "sha256": "0" * 64, "levels": spoil(made["levels"], 21)}
    tiny.resign(bundle, pixels=changed)
    with Session(bundle):
        pass
    said = (
        f"Pillow {PIL.__version__} makes other pixels than Pillow 1.0, with which the bundle was made: up to 21 of 255 "
        "levels apart, 10% of them different; for the same pixels: pip install pillow==1.0"
    )
    assert [record.getMessage() for record in caplog.records] == [said]
    shown = CliRunner().invoke(app, ["verify", str(bundle)])
    assert shown.exit_code == 0
    assert said in shown.output
    told = json.loads(CliRunner().invoke(app, ["verify", str(bundle), "--json"]).output)
    assert told["pixels"]["largest"] == 21
    assert told["pixels"]["pillow"] == "1.0"


def test_what_pillow_11_made(tiny: ModuleType, bundle: Path) -> None:
    """Of a tall picture another release makes other pixels: the order of its two passes is another one."""
    (bundle / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tiny.relist(bundle)
    sizes = {"geometry__image_height": 224, "geometry__image_width": 160}
    tiny.resign(bundle, pixels=json.loads(PILLOW_11.read_text()), **sizes)
    found = compare_pixels(bundle, read_manifest(bundle))
    if PIL.__version__.startswith("13."):
        assert found is not None
        assert 5 < found.largest < 60
        assert found.share < 0.5
    elif PIL.__version__ == "11.3.0":
        assert found is None


def test_a_processor_that_does_not_resize_has_no_probe(tiny: ModuleType, bundle: Path) -> None:
    (bundle / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "do_resize": False}))
    assert probe_pixels(bundle, read_manifest(bundle)) is None


@pytest.mark.parametrize(
    ("levels", "says"),
    [("?", "not base64"), ("AAAA", f"3 levels instead of {PROBE_LEVELS}"), ("A" * 4_000_000, "at most 16384")],
)
def test_levels_that_cannot_be(tiny: ModuleType, bundle: Path, levels: str, says: str) -> None:
    tiny.resign(bundle, pixels=probe(bundle, levels=levels))
    with pytest.raises(BundleError, match=f"pixels.levels: .*{says}"):
        read_manifest(bundle)
