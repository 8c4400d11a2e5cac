"""The kernels' table needs a GPU and says so; its rows print."""

from __future__ import annotations

import pytest
import torch

from secateur.tools.bench import __main__ as bench
from secateur.tools.bench.kernels import Row, make_table


def test_without_a_gpu_one_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["kernels"])
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err == "kernels: this table needs an NVIDIA GPU and a torch that sees it; there is none\n"
    )


def test_a_row_says_how_many_times_the_kernel_is_faster() -> None:
    table = make_table([Row("rank", "N9", 0.0, 0.5, 0.1, 2.0)])
    assert [list(column.cells) for column in table.columns][-1] == ["4.0"]
