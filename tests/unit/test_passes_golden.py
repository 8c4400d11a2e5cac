"""The pruned programs as text. Four layers, the fewest PyramidDrop's three stages need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("recipe", ["none", "fastv", "pyramiddrop", "fastervlm"])
def test_pruned_programs_read_as_before(
    pruned: Callable[..., Any], golden: Callable[[str, str], None], recipe: str
) -> None:
    golden(f"{recipe}-llama", str(pruned(recipe)))


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
def test_other_decoders_read_as_before(
    pruned: Callable[..., Any], golden: Callable[[str, str], None], decoder: str
) -> None:
    """The prefill program alone: the tower is the same, decode differs in the same places."""
    golden(f"fastv-{decoder}", str(pruned("fastv", decoder=decoder).programs["prefill"]))
