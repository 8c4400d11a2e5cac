"""Every stage of every row, exported to ONNX and run by ONNX Runtime, does what the eager function does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.compiler.function import trace_function
from secateur.compiler.plan_recipe import plan_recipe
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import export_program
from secateur.exporters.weights import WeightLayout
from secateur.passes.drop_noops import drop_noops
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import StageFunction, stage_function

from .rows import SEEING, ready
from .transcriptions.draw import draw_signals

ROWS = [name for name in SEEING if RECIPES[name].stages]


def call(stage: StageFunction, signals: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the stage returns, by name."""
    (keep, mix), carry = stage.run(signals)
    return {name: value for name, value in (("keep", keep), ("mix", mix), ("carry", carry)) if value is not None}


def run_onnx(stage: StageFunction, signals: dict[str, Tensor], dialect: str) -> dict[str, np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx_ir as ir

    names = list(call(stage, signals))
    program = trace_function(
        stage.planned.name,
        lambda *values: tuple(call(stage, dict(zip(signals, values, strict=True))).values()),
        signals,
        names,
    )
    model = ir.to_proto(export_program(drop_noops(program), DIALECTS[dialect], WeightLayout({}, b"", {})))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {port.name for port in session.get_inputs()}
    feed = {name: value.contiguous().numpy() for name, value in signals.items() if name in wanted}
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("dialect", ["plain", "tensorrt"])
@pytest.mark.parametrize("name", ROWS)
def test_onnx_runtime_does_what_the_stage_does(name: str, dialect: str) -> None:
    """What a dialect writes of attention and caches is not in a stage, so ONNX Runtime takes TensorRT's graphs too."""
    plan = plan_recipe(
        ready(name), keep=0.3, images=4, tokens_per_image=36, vision_layers=9, decoder_layers=32, grid=(6, 6)
    )
    carried: Tensor | None = None
    for planned in plan.stages:
        stage = stage_function(planned)
        if not planned.length_out:
            continue  # nothing is left to compare
        if carried is not None:
            carried = carried.reshape(planned.groups, planned.length_in)
        signals = draw_signals(stage, planned.groups, seed=planned.index, carried=carried)
        signals = {name: signals[name] for name in stage.signals if name in signals}
        expected = call(stage, signals)
        for output, value in run_onnx(stage, signals, dialect).items():
            torch.testing.assert_close(torch.from_numpy(value), expected[output], rtol=1e-4, atol=1e-5)
        carried = expected["carry"].gather(1, expected["keep"]) if "carry" in expected else None
