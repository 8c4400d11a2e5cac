"""Norms whose weight counts from 1 fold as well, in every type the model may run in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from secateur.compiler import ops
from secateur.compiler.function import trace_function
from secateur.compiler.program import Program
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import export_program
from secateur.exporters.weights import plan_weights
from secateur.passes.drop_noops import drop_noops
from secateur.passes.fold_rms_norm import fold_rms_norm

WIDTH = 8


class _Norm(nn.Module):
    """Gemma's form: product and weight in float32, one cast behind them."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, WIDTH).to(kind))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (1.0 + self.weight.float())).type_as(x)


def fold(kind: torch.dtype, twice: bool = False) -> tuple[_Norm, Program]:
    norm = _Norm(kind)

    def run(x: Tensor) -> Tensor:
        return norm(norm(x)) if twice else norm(x)

    x = torch.zeros(2, 3, WIDTH, dtype=kind)
    return norm, fold_rms_norm(drop_noops(trace_function("norm", run, {"x": x}, ("y",), {"norm": norm})))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_the_norm_is_one_node_that_computes_the_same(kind: torch.dtype) -> None:
    norm, program = fold(kind)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls] == [ops.rms_norm]
    assert calls[0].args[2:] == (1e-6, True)
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0)).to(kind)
    weight = norm.weight.detach()
    got = ops.rms_norm(x, weight, 1e-6, True)
    assert got.dtype == kind
    torch.testing.assert_close(got, norm(x).detach(), rtol=0, atol=0)


def test_in_onnx_the_weight_is_shared_and_applied_in_float32() -> None:
    norm, program = fold(torch.float32, twice=True)
    model = export_program(program, DIALECTS["plain"], plan_weights(program.weights(), norm, torch.float32))
    assert [node.op_type for node in model.graph] == ["Add", "RMSNormalization", "RMSNormalization"]
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(norm.weight.detach().numpy(), name=value.name)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)
    (got,) = session.run(None, {"x": x})
    np.testing.assert_allclose(got, norm(norm(torch.from_numpy(x))).detach().numpy(), rtol=0, atol=1e-6)


def test_a_norm_whose_wide_result_others_read_stays() -> None:
    norm = _Norm(torch.float16)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        product = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + norm.weight.float())
        return product.half(), product

    x = torch.zeros(2, 3, WIDTH, dtype=torch.float16)
    program = fold_rms_norm(trace_function("norm", run, {"x": x}, ("y", "wide"), {"norm": norm}))
    assert not [n for n in program.graph.nodes if n.target is ops.rms_norm]
