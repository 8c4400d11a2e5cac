"""Every row's stage function traces at its static shape to a graph that computes the same thing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from secateur.compiler import score_ops
from secateur.compiler.function import trace_function
from secateur.compiler.plan_recipe import plan_recipe
from secateur.exporters.expand_scores import expand_scores
from secateur.passes.methods.select import max_min
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import StageFunction, stage_function

from .rows import LEARNED, SEEING, ready
from .transcriptions.draw import draw_signals

# torch's own: its export copies tree specs through a deprecated check.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ROWS = [name for name in SEEING if RECIPES[name].stages]


class StageModule(torch.nn.Module):
    """The stage function with its signals as positional inputs, in sorted order."""

    def __init__(self, stage: StageFunction) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        # What is carried from stage to stage is optional, and missing at the first one.
        names = [name for name in self.stage.signals if name != "carried" or self.stage.bound.needs(name)]
        token_map = self.stage(dict(zip(names, tensors, strict=True)))
        return [tensor for tensor in token_map if tensor is not None]


def first_stage(name: str, count: int, keep: float) -> StageFunction:
    recipe = ready(name)
    plan = plan_recipe(
        recipe, keep=keep, images=1, tokens_per_image=count, vision_layers=9, decoder_layers=32, grid=(2, count // 2)
    )
    return stage_function(plan.stages[0])


def inputs_for(stage: StageFunction, groups: int) -> tuple[torch.Tensor, ...]:
    signals = draw_signals(stage, groups, seed=7)
    return tuple(signals[name] for name in stage.signals if name in signals)


def export(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    return torch.export.export(module, inputs, strict=False).run_decompositions({})


@pytest.mark.parametrize(("keep", "groups"), [(1.0, 1), (0.25, 3), (0.03, 1)])
@pytest.mark.parametrize("name", ROWS)
def test_export_equals_eager(name: str, keep: float, groups: int) -> None:
    module = StageModule(first_stage(name, 30, keep))
    inputs = inputs_for(module.stage, groups)
    exported = export(module, inputs)
    for value in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
        assert all(isinstance(size, int) for size in value.meta["val"][0].shape)
    for got, expected in zip(exported.module()(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


# This tracer takes no tensor of a file from outside the function; the exporter, which the compiler uses, does.
@pytest.mark.parametrize("name", [name for name in ROWS if name not in LEARNED])
def test_make_fx_equals_eager(name: str) -> None:
    module = StageModule(first_stage(name, 30, 0.25))
    inputs = inputs_for(module.stage, 2)
    graph = make_fx(module, tracing_mode="fake")(*inputs)
    for got, expected in zip(graph(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("trace", [export, lambda module, inputs: make_fx(module, tracing_mode="fake")(*inputs)])
@pytest.mark.parametrize("k", [3, 14])
def test_max_min_is_one_operator_whatever_k(
    k: int, trace: Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], torch.fx.GraphModule]
) -> None:
    module = StageModule(first_stage("divprune", 28, k / 28))
    graph = trace(module, inputs_for(module.stage, 2)).graph
    assert module.stage.planned.length_out == k
    assert sum(node.target is score_ops.pick_by_fold for node in graph.nodes) == 1
    assert sum(node.target is torch.ops.aten.argmax.default for node in graph.nodes) == 1, "only for the start"


def test_max_min_is_written_out_as_one_scan() -> None:
    """TensorRT refuses an ArgMax of fewer than two dimensions."""
    stage = first_stage("divprune", 28, 0.25)
    feed = dict(zip(stage.signals, inputs_for(stage, 1), strict=True))
    traced = trace_function("divprune", lambda tokens: (stage({"tokens": tokens}).keep,), feed, ("keep",))
    plain = expand_scores(traced)
    (scan,) = plain.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan)
    body = getattr(plain.module, scan.args[0].target)
    (argmax,) = body.graph.find_nodes(op="call_function", target=torch.ops.aten.argmax.default)
    assert argmax.args[0].meta["val"].shape == (1, 28)


def test_seeded_random_is_baked_in_as_a_constant() -> None:
    module = StageModule(first_stage("random", 30, 0.25))
    inputs = inputs_for(module.stage, 2)
    exported = export(module, inputs)
    assert not any("rand" in str(node.target) for node in exported.graph.nodes)
    elsewhere = tuple(torch.full_like(value, 5.0) for value in inputs)
    assert (exported.module()(*elsewhere)[0] == module(*inputs)[0]).all()


def test_max_min_runs_where_gradients_are_recorded() -> None:
    tokens = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    expected = max_min(tokens, 5).keep
    assert (max_min(tokens.requires_grad_(), 5).keep == expected).all()
