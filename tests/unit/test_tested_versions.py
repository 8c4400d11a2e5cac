"""A version of transformers that a family was not tested with is named in one warning."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.compiler import trace
from secateur.compiler.families import find_family, list_model_types
from secateur.compiler.trace import read_source
from secateur.runtime.errors import UserError

from . import tiny_onevision
from .tiny_model import write_config

FLOOR = "5.17"
"""What pyproject.toml asks for; ``tests/null/test_declared_ranges.py`` holds the page to it."""


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    trace._warn_untested.cache_clear()
    yield
    trace._warn_untested.cache_clear()


@pytest.mark.parametrize("version", ["5.16.3", "5.24.0", "6.0.0.dev0"])
def test_an_untested_version_is_named_once_per_family(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    # By name: transformers puts another module in its place when its first model is made.
    monkeypatch.setattr("transformers.__version__", version)
    plain = write_config(tmp_path / "llava")
    with caplog.at_level(logging.WARNING):
        read_source(plain)
        read_source(plain)
        read_source(tiny_onevision.write_config(tmp_path / "onevision"))
    said = [r.getMessage() for r in caplog.records if r.name == trace.__name__]
    assert len(said) == 2
    assert said[0].startswith(
        f"transformers {version} is installed, but family llava was tested with 5.17 to below 5.24"
    )
    assert "llava_onevision" in said[1]


@pytest.mark.parametrize("version", ["5.17.0", "5.23.0", "5.23.9"])
def test_a_tested_version_is_not_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with caplog.at_level(logging.WARNING):
        read_source(write_config(tmp_path / "llava"))
    assert not [r for r in caplog.records if r.name == trace.__name__]


@pytest.mark.parametrize("model_type", list_model_types())
def test_what_an_older_version_lacks_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Before anything else is read: a configuration of nothing but its type will do."""
    family = find_family(model_type, "")
    first = family.tested_transformers[0]
    assert bool(family.lacking_before) == (first != FLOOR), "what is lacking is said where the range begins later"
    if not family.lacking_before:
        return
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(UserError) as caught:
        read_source(tmp_path)
    assert str(caught.value) == (
        f"transformers: transformers 5.17.0 is installed, which lacks what family {family.name} needs: "
        f"{family.lacking_before}; pip install -U 'transformers>={first}'"
    )
