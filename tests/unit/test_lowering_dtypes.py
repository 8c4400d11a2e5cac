"""In which type an exported operator computes: that of torch, at every cast the lowerings write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from secateur.compiler import ops
from secateur.compiler.function import trace_function
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import export_program
from secateur.exporters.weights import WeightLayout
from secateur.passes.drop_noops import drop_noops

HALF, WHOLE = torch.float16, torch.int64


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def halves(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return draw(*shape, seed=seed, scale=scale).half()


MASK = draw(4, 6, seed=3) > 0
COUNT = torch.arange(24).reshape(4, 6)
ONES = torch.ones(2, 4096, dtype=HALF)
"""Counted in half precision they come to 2048."""

# Name -> function and inputs: operands of two types, and results of another type than what they are made of.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "add half and single": (lambda x, y: x + y, (halves(4, 6), draw(4, 6, seed=1))),
    "subtract whole from half": (lambda x, y: x - y, (halves(4, 6), COUNT)),
    "multiply whole by a fraction": (lambda x: x * 0.3, (COUNT,)),
    "multiply half by a whole": (lambda x: x * 3, (halves(4, 6),)),
    "divide wholes": (lambda x, y: x / y, (COUNT, COUNT + 7)),
    "divide whole by a number": (lambda x: x / 7, (COUNT,)),
    "fraction less a whole": (lambda x: 1.5 - x, (COUNT,)),
    "weighted sum": (lambda x, y: torch.add(x, y, alpha=3), (draw(4, 6), halves(4, 6, seed=1))),
    "minimum of half and single": (lambda x, y: torch.minimum(x, y), (halves(4, 6), draw(4, 6, seed=1))),
    "clamp": (lambda x: x.clamp(min=-0.1, max=0.3), (halves(4, 6),)),
    "compare whole with a fraction": (lambda x: x > 5.5, (COUNT,)),
    "compare half with a fraction it cannot hold": (lambda x: x >= 0.1, (torch.tensor([0.1, 0.2]).half(),)),
    "compare half with single": (lambda x, y: x < y, (torch.tensor([0.1, 0.3]).half(), torch.tensor([0.1, 0.3]))),
    "equal across types": (lambda x, y: x == y, (COUNT, COUNT.float())),
    "root of wholes": (lambda x: torch.sqrt(x), (COUNT,)),
    "reciprocal root of single": (lambda x: torch.rsqrt(x.float()), (halves(4, 6).abs() + 1,)),
    "square in single": (lambda x: x.float().pow(2), (halves(4, 6, scale=300),)),
    "mean in single": (lambda x: x.mean(1, dtype=torch.float32), (ONES * 3,)),
    "sum in single": (lambda x: x.sum(1, dtype=torch.float32), (ONES,)),
    "sum of flags": (lambda x: x.sum(1), (MASK,)),
    "sum of a cast": (lambda x: x.float().sum(1), (ONES,)),
    "running count of flags": (lambda x: torch.cumsum(x, 1), (MASK,)),
    "running sum in single": (lambda x: torch.cumsum(x, 1, dtype=torch.float32), (ONES,)),
    "softmax in single": (lambda x: torch.softmax(x, -1, dtype=torch.float32), (halves(4, 6, scale=4),)),
    "softmax of a cast, cast back": (lambda x: torch.softmax(x.float(), -1).half(), (halves(4, 6, scale=4),)),
    "where of two types": (lambda m, x, y: torch.where(m, x, y), (MASK, halves(4, 6), draw(4, 6, seed=1))),
    "where of half and a number": (lambda m, x: torch.where(m, x, 0.25), (MASK, halves(4, 6))),
    "fill with a number": (lambda m, x: x.masked_fill(m, float("-inf")), (MASK, halves(4, 6))),
    "join of two types": (lambda x, y: torch.cat([x, y], 1), (halves(4, 6), draw(4, 6, seed=1))),
    "stack of one type": (lambda x, y: torch.stack([x.float(), y]), (halves(4, 6), draw(4, 6, seed=1))),
    "flags as numbers": (lambda m: m.float() * 2.5, (MASK,)),
    "wholes as half": (lambda x: x.half() * 0.5, (COUNT,)),
    "floor of wholes": (lambda x, y: x // y, (COUNT - 12, torch.full((4, 6), 5))),
    "norm of a cast": (lambda x: torch.linalg.vector_norm(x.float(), dim=1), (halves(2, 64, scale=200),)),
}  # fmt: skip


def run(function: Callable[..., Any], inputs: tuple[Tensor, ...], dialect: str) -> tuple[np.ndarray, ir.Model]:
    onnxruntime = pytest.importorskip("onnxruntime")
    feed = {f"x{index}": value for index, value in enumerate(inputs)}
    program = trace_function("typed", lambda *given: (function(*given),), feed, ("y",))
    model = export_program(drop_noops(program), DIALECTS[dialect], WeightLayout({}, b"", {}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = [port.name for port in session.get_inputs()]
    (made,) = session.run(None, {name: feed[name].contiguous().numpy() for name in wanted})
    return made, model


@pytest.mark.parametrize("name", CASES)
def test_operators_compute_in_torchs_type(name: str) -> None:
    function, inputs = CASES[name]
    found, model = run(function, inputs, "plain")
    want = function(*inputs)
    assert torch.from_numpy(found).dtype == want.dtype
    assert found.shape == tuple(want.shape)
    # Half rounds once, where torch rounds as well; a sum or a softmax in it would be wrong by hundreds of these.
    near = {"rtol": 1e-3, "atol": 1e-3} if want.dtype == HALF else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(torch.from_numpy(found), want, **near)
    check_types(model)


def check_types(model: ir.Model) -> None:
    """What the graph says of every value is what ONNX's own inference finds; operands of one kind have one type."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
    onnx.checker.check_model(inferred, full_check=True)


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_counted_in_float32(dialect: str, offset: bool, dtype: torch.dtype) -> None:
    """Squares of 300 are too large for half precision; in eight bits of bfloat16 a mean of 64 would be off."""
    x, weight = draw(2, 5, 64, scale=300).to(dtype), draw(64, seed=1).to(dtype)
    feed = {"x": x, "weight": weight}
    program = trace_function("n", lambda x, weight: (ops.rms_norm(x, weight, 1e-6, offset),), feed, ("y",))
    model = export_program(drop_noops(program), DIALECTS[dialect], WeightLayout({}, b"", {}))
    (norm,) = [n for n in model.graph if n.op_type in ("RMSNormalization", "SimplifiedLayerNormalization")]
    assert norm.attributes["stash_type"].as_int() == 1
    if offset:
        assert {v.dtype for v in norm.inputs} == {ir.DataType.FLOAT}
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (weight.double() + offset)
    eager = ops.rms_norm(x, weight, 1e-6, offset)
    assert eager.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(eager.double(), want, rtol=2 * unit, atol=2 * unit)
    if dtype is torch.float16 and dialect != "tensorrt":
        found, _ = run(lambda x, w: ops.rms_norm(x, w, 1e-6, offset), (x, weight), dialect)
        torch.testing.assert_close(torch.from_numpy(found).double(), want, rtol=2 * unit, atol=2 * unit)


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norms_of_half_precision_are_counted_in_float32(dialect: str, dtype: torch.dtype) -> None:
    x, weight, bias = draw(2, 5, 64, scale=300).to(dtype), draw(64, seed=1).to(dtype), draw(64, seed=2).to(dtype)
    feed = {"x": x, "w": weight, "b": bias}
    program = trace_function("n", lambda x, w, b: (torch.nn.functional.layer_norm(x, (64,), w, b, 1e-5),), feed, ("y",))
    model = export_program(drop_noops(program), DIALECTS[dialect], WeightLayout({}, b"", {}))
    (norm,) = [n for n in model.graph if n.op_type == "LayerNormalization"]
    assert {v.dtype for v in norm.inputs if v is not None} == {ir.DataType.FLOAT}
    assert model.graph.outputs[0].dtype == {HALF: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]
