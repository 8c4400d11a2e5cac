"""A model of LLaVA-1.5-7B's shape through trace, FastV and export: small in memory, and in time on a free machine."""

from __future__ import annotations

import os

import pytest

from secateur.tools.bench.compile_scale import GIBIBYTES, SECONDS, draw, measure


@pytest.mark.slow
def test_seven_billion_parameters_without_weights() -> None:
    report = measure()
    assert report["peak_gib"] <= GIBIBYTES
    # CPU seconds do not depend on what else runs on the machine, or hardly; the clock does.
    assert report["cpu_seconds"] <= SECONDS
    if os.getloadavg()[0] < 2:
        assert report["seconds"] <= SECONDS
    assert report["layers"] == 32
    assert report["segments"] == [
        "segment s0 layers [0,2) length 640 capacity 704 removed 0",
        "segment s1 layers [2,32) length 352 capacity 416 removed 288",
    ]
    assert report["weights_bytes"] > 13e9
    assert draw(report).row_count == len(report["phases"]) + 2
