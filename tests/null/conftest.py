"""Fixtures of the tests that need no torch."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module beside this one that builds bundles and knows their model in NumPy."""
    pytest.importorskip("onnx")
    path = Path(__file__).with_name("tiny_bundle.py")
    spec = importlib.util.spec_from_file_location("tiny_bundle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def built(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default bundle. Do not change it; take ``bundle`` for that."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of the default bundle that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def draw_image(seed: int, size: tuple[int, int] = (10, 9)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def image() -> Image.Image:
    return draw_image(0)


@pytest.fixture
def image_file(image: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    image.save(path)
    return path


# -- engines of the null library -----------------------------------------------------------------------------------


@pytest.fixture
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where kernels that TensorRT-RTX compiled are kept for the time of a test; it is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "secateur" / "tensorrt-rtx"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> Iterator[Any]:
    """The null TensorRT-RTX and CUDA where the real ones are imported from; behind a test nothing is left in them."""
    from . import null_bundle

    library = null_bundle.install(monkeypatch)
    with null_bundle.nothing_left(library):
        yield library


@pytest.fixture(scope="session")
def engines(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default bundle with engines whose weights are inputs. Do not change it."""
    from . import null_bundle

    return null_bundle.build(tiny, tmp_path_factory.mktemp("null") / "bundle", weights="inputs")
