"""The table of what experts cost: its three runs compute alike, and odd shapes are told."""

from __future__ import annotations

import pytest
import torch

from secateur.compiler import ops
from secateur.tools.bench import experts


def test_a_row_has_flops_and_three_times(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    experts.main(["6,32,24,8,2", "--turns", "1"])
    printed = capsys.readouterr().out
    assert [load in printed for load in experts.LOADS] == [True, True]
    row = experts.measure(experts.Shape(6, 32, 24, 8, 2), "uneven", 1)
    assert row.flops == 2 * 6 * 2 * 3 * 32 * 24
    assert min(row.layer, row.dense, row.eager) > 0


def test_what_is_compared_computes_alike() -> None:
    shape = experts.Shape(20, 32, 24, 8, 2)
    x, indices, weights, gate_up, down = experts.draw(shape, "even")
    with torch.no_grad():
        eager = experts._transformers_layer(shape, gate_up, down)(x, indices, weights)
    torch.testing.assert_close(ops.experts(x, indices, weights, gate_up, down), eager)
    alone, one = torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1)
    dense = experts._dense(x, gate_up[0], down[0])
    torch.testing.assert_close(ops.experts(x, alone, one, gate_up, down), dense)


@pytest.mark.parametrize("shape", ["1,2,3,4", "1,2,3,4,5", "0,2,3,4,1"])
def test_odd_shapes(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experts.main([shape])
    assert "a shape is T,D,F,E,k" in capsys.readouterr().err
