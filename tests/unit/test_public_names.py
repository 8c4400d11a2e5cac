"""The names `import secateur` offers."""

from __future__ import annotations

import pytest

import secateur


@pytest.mark.parametrize("name", secateur.__all__)
def test_a_public_name_loads_on_first_use_and_stays(name: str) -> None:
    assert getattr(secateur, name) is vars(secateur)[name]
