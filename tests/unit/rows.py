"""Rows of the table made whole for tests: those with learned weights get a file of seeded random ones."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.compiler.recipe import Recipe
from secateur.passes.needs import needs_sound, needs_weights, with_weights
from secateur.passes.recipes import RECIPES

LEARNED = tuple(name for name, row in RECIPES.items() if needs_weights(row))
SEEING = tuple(name for name, row in RECIPES.items() if not needs_sound(row))
"""Rows that mean something where nothing is heard."""
NORMS = {"echoingpixels": 1}
"""How many RMS norms the scores of a row have of their own."""
INNER = 7


def draw_weights(name: str, width: int, seed: int = 0) -> dict[str, Tensor]:
    """The tensors that the row ``name`` reads, for tokens of ``width``."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    if name == "echoingpixels":
        norm = torch.rand(width, generator=source) + 0.5
        up = {"norm.weight": norm, "up.weight": normal(INNER, width), "up.bias": normal(INNER)}
        return {**up, "down.weight": normal(1, INNER)}
    parts = {"q_proj": (INNER, width), "k_proj": (INNER, width)}
    return {f"{part}.{kind}": normal(*(shape if kind == "weight" else shape[:1]))
            for part, shape in parts.items() for kind in ("weight", "bias")}  # fmt: skip


@functools.cache
def _folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="weights-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def weights_file(name: str, width: int) -> Path:
    """The safetensors file of :func:`draw_weights`; do not change it."""
    path = _folder() / f"{name}-{width}.safetensors"
    save_file(draw_weights(name, width), path)
    return path


def ready(name: str, width: int = 12) -> Recipe:
    """The row ``name``, with weights for tokens of ``width`` where it reads some."""
    row = RECIPES[name]
    return with_weights(row, weights_file(name, width)) if name in LEARNED else row
