"""Sizes as people read them."""

from __future__ import annotations

import pytest

from secateur.runtime.sizes import size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (50_000, "48.8 KiB"),
        (1 << 20, "1.0 MiB"),
        (100 << 20, "100.0 MiB"),
        (24 << 30, "24.00 GiB"),
    ],
)
def test_nothing_small_looks_like_nothing(count: int, text: str) -> None:
    assert size_text(count) == text
