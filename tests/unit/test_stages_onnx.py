"""Every stage of every row, lowered to ONNX by itself and run, keeps and mixes what its function does eagerly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from torch import Tensor

from secateur.compiler.function import trace_function
from secateur.compiler.recipe import plan_recipe
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import export_program
from secateur.exporters.weights import WeightLayout
from secateur.passes.drop_noops import drop_noops
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import StageFunction, stage_function

from .transcriptions.draw import draw_signals

ROWS = sorted(name for name, recipe in RECIPES.items() if recipe.stages)
SIDE, IMAGES = 4, 2


def stages_of(name: str) -> Iterator[StageFunction]:
    """The row's stages for two images of a batch of one, but for those that leave nothing: they are never lowered."""
    plan = plan_recipe(
        RECIPES[name], keep=0.25, images=IMAGES, tokens_per_image=SIDE * SIDE, vision_layers=24, decoder_layers=32,
        grid=(SIDE, SIDE),
    )  # fmt: skip
    return (stage_function(planned) for planned in plan.stages if planned.length_out)


def run_stage(stage: StageFunction, signals: dict[str, Tensor]) -> dict[str, Tensor]:
    (keep, mix), carry = stage.run(signals)
    found = {"keep": keep, "mix": mix, "carry": carry}
    return {name: value for name, value in found.items() if value is not None}


def run_onnx(stage: StageFunction, signals: dict[str, Tensor], names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    def function(*feed: Tensor) -> tuple[Tensor, ...]:
        return tuple(run_stage(stage, dict(zip(signals, feed, strict=True))).values())

    program = drop_noops(trace_function("stage", function, signals, names))
    model = export_program(program, DIALECTS["plain"], WeightLayout({}, b"", {}))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {port.name for port in session.get_inputs()}
    feed = {name: value.contiguous().numpy() for name, value in signals.items() if name in wanted}
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_lowered_stage_equals_eager(name: str) -> None:
    carried: Tensor | None = None
    for stage in stages_of(name):
        groups = stage.planned.groups
        if carried is not None:
            carried = carried.reshape(groups, stage.planned.length_in)
        signals = draw_signals(stage, groups, seed=stage.planned.index, carried=carried)
        signals = {signal: signals[signal] for signal in stage.signals if signal in signals}
        eager = run_stage(stage, signals)
        lowered = run_onnx(stage, signals, list(eager))
        assert lowered["keep"].tolist() == eager["keep"].tolist(), stage.planned.name
        for part in eager.keys() - {"keep"}:
            np.testing.assert_allclose(lowered[part], eager[part].numpy(), rtol=1e-4, atol=1e-5)
        if "carry" in eager:
            carried = eager["carry"].gather(1, eager["keep"])
