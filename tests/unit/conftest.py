"""Fixtures the compiler's tests share. Models, traces and pruned programs are made once: a trace takes seconds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model_dir(decoder="llama")`` -> a whole model directory of four layers; do not change it."""
    root = tmp_path_factory.mktemp("models")

    def make(decoder: str = "llama") -> Path:
        path = root / decoder
        return path if path.is_dir() else tiny_model.write_model(path, decoder=decoder, layers=4)

    return make


@pytest.fixture(scope="session")
def traced(model_dir: Callable[..., Path]) -> Callable[..., Any]:
    """``traced(decoder="llama", dtype="fp32", batch=1, images=1)`` -> Traced: 4 layers, 24 text, 8 new tokens."""
    from secateur.compiler.pipeline import Geometry, read_source, trace_model

    made: dict[tuple[object, ...], Any] = {}

    def make(decoder: str = "llama", dtype: str = "fp32", batch: int = 1, images: int = 1) -> Any:
        key = (decoder, dtype, batch, images)
        if key not in made:
            geometry = Geometry(batch=batch, images=images, text_tokens=24, new_tokens=8)
            made[key] = trace_model(read_source(model_dir(decoder)), geometry, dtype)
        return made[key]

    return make


@pytest.fixture(scope="session")
def pruned(traced: Callable[..., Any]) -> Callable[..., Any]:
    """``pruned(recipe, keep=None, decoder=..., ...)`` -> Pruned; the other arguments are those of ``traced``."""
    from secateur.compiler.pipeline import prune

    from .rows import ready

    made: dict[tuple[object, ...], Any] = {}

    def make(recipe: str, keep: float | None = None, **model: Any) -> Any:
        row = ready(recipe, width=64)
        if keep is None and row.stages:
            keep = max(row.default_keep, 1 / 16)  # of sixteen tokens the smallest published ratio would leave none
        key = (recipe, keep, id(traced(**model)))
        if key not in made:
            made[key] = prune(traced(**model), row, keep)
        return made[key]

    return make


class _Objection(logging.Handler):
    """Makes what the linter only warns of an error."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(f"the linter finds something in what was compiled: {record.getMessage()}")


@pytest.fixture(scope="session", autouse=True)
def no_findings() -> Iterator[None]:
    """Every graph that a test compiles passes the linter, also where a finding would not stop a user."""
    logger, objection = logging.getLogger("secateur.exporters.lint"), _Objection(logging.WARNING)
    logger.addHandler(objection)
    yield
    logger.removeHandler(objection)
