"""The share of saved FLOPs that became saved time, and the table that shows it. Speed itself is not tested here."""

import io

import pytest
from rich.console import Console

from secateur.tools.bench.latency import describe_machine, saved_share
from secateur.tools.bench.latency_page import draw, table_rows, write


@pytest.mark.parametrize(
    ("time_ratio", "flops_ratio", "share"),
    [(4.0, 4.0, 1.0), (1.0, 4.0, 0.0), (2.0, 4.0, 2 / 3), (0.5, 2.0, -2.0), (3.0, 2.0, 4 / 3)],
)
def test_share_saved(time_ratio: float, flops_ratio: float, share: float) -> None:
    assert saved_share(time_ratio, flops_ratio) == pytest.approx(share)


def test_no_share_where_hardly_any_flops_are_saved() -> None:
    assert saved_share(1.3, 1.06) is None
    assert saved_share(1.3, 0.98) is None, "scoring may cost more than it saves"


def make_model(kind: str) -> dict:
    ratio = {"time": 2.0, "flops": 4.0, "saved": 2 / 3}
    cell = {
        "recipe": "fastv", "keep": 0.25, "load": 0.1, "visual_tokens": [196, 49],
        "seconds": dict.fromkeys(("prefill", "ttft", "tpot"), 0.010),
        "unpruned_seconds": dict.fromkeys(("prefill", "ttft", "tpot"), 0.020),
        "ratios": {"prefill": ratio, "ttft": ratio, "tpot": {**ratio, "saved": None}},
    }  # fmt: skip
    geometry = {"text_tokens": 32, "new_tokens": 8}
    return {"name": "random", "kind": kind, "repeat": 5, "geometry": geometry, "cells": [cell]}


def test_ratios_of_time_and_flops_stand_together() -> None:
    _, none, fastv = table_rows(make_model("random weights"))
    assert none[0] == "none"
    assert none[3] == "20.00 to 20.00"
    assert fastv[:6] == ["fastv", "0.25", "196, 49", "10.00", "2.00 / 4.00", "67 %"]
    assert fastv[-1] == ""
    console = Console(file=io.StringIO(), width=200)
    console.print(draw(make_model("random weights")))
    assert "random model (random weights), medians of 5 runs" in console.file.getvalue()


def test_page_names_the_machine_and_says_random_weights() -> None:
    page = write({"machine": describe_machine(2), "models": [make_model("random weights")]})
    assert "2 threads" in page.replace("\n", " ")
    assert "## Random model (random weights)" in page
