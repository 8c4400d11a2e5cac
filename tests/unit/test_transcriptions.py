"""Every row of the table keeps and mixes the tokens that its paper's definition names, worked out in slow loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.compiler.layout import Layout
from secateur.compiler.plan_recipe import PlannedRecipe, plan_recipe
from secateur.passes.recipes import RECIPES
from secateur.passes.stage import stage_function

from .rows import SEEING, ready
from .transcriptions import Transcription, View, decoder, decoder_attention, omni, seats, tower, tower_attention
from .transcriptions.draw import draw_signals

TRANSCRIPTIONS: dict[str, Transcription] = (
    decoder_attention.ROWS | decoder.ROWS | seats.ROWS | omni.ROWS | tower_attention.ROWS | tower.ROWS
)
NOT_PAPERS = {"none", "random"}
SEEN = sorted(set(SEEING) - NOT_PAPERS)


def test_every_row_has_a_transcription() -> None:
    assert set(TRANSCRIPTIONS) == set(RECIPES) - NOT_PAPERS


@pytest.mark.parametrize(("side", "images"), [(4, 1), (6, 4)], ids=["one image", "four images"])
@pytest.mark.parametrize("keep", [0.06, 0.12, 0.5, 0.96, None, 1.0])
@pytest.mark.parametrize("name", SEEN)
def test_row_follows_its_paper(name: str, keep: float | None, side: int, images: int) -> None:
    if keep is None:
        keep = max(RECIPES[name].default_keep, 1 / side**2)
    plan = plan_recipe(
        ready(name), keep=keep, images=images, tokens_per_image=side * side, vision_layers=9, decoder_layers=32,
        grid=(side, side),
    )  # fmt: skip
    follow(name, plan)


@pytest.mark.parametrize("name", SEEN)
def test_row_follows_its_paper_on_a_grid_with_an_inside(name: str) -> None:
    """Wide enough for windows, neighbours on all sides and anchors that do not touch the border."""
    plan = plan_recipe(
        ready(name), keep=0.25, images=1, tokens_per_image=144, vision_layers=9, decoder_layers=32, grid=(12, 12)
    )
    follow(name, plan)


@pytest.mark.parametrize("keep", [0.06, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", [*omni.ROWS, *seats.ROWS])
def test_row_follows_its_paper_with_sound(name: str, keep: float) -> None:
    """Two windows of two moments and a third of one, each ending with its sound."""
    frames = [*[0] * 6, *[1] * 6, *[0] * 4, *[1] * 5, *[2] * 6, *[3] * 6, *[2] * 4, *[3] * 5, *[4] * 6, *[4] * 4]
    kinds = [*[0] * 12, *[1] * 9, *[0] * 12, *[1] * 9, *[0] * 6, *[1] * 4]
    layout, row = Layout(tuple(frames), tuple(kinds)), ready(name)
    rates = (1.0, 1.0) if name in seats.ROWS else row.rates
    plan = plan_recipe(
        row if rates is None else row.with_rates(rates), keep=keep, images=1, tokens_per_image=len(frames),
        vision_layers=9, decoder_layers=32,
    )  # fmt: skip
    follow(name, replace(plan, stages=tuple(replace(stage, layout=layout) for stage in plan.stages)))


def follow(name: str, plan: PlannedRecipe) -> None:
    """Run the stages on drawn signals beside the transcription, what they carry handed on."""
    carried: torch.Tensor | None = None
    for planned in plan.stages:
        stage = stage_function(planned)
        groups = planned.groups * 2  # two rows of a batch
        if carried is not None:
            carried = carried.reshape(groups, planned.length_in)
        signals = draw_signals(stage, groups, seed=planned.length_in + planned.index, carried=carried)
        (kept, mix), carry = stage.run(signals)
        assert kept.shape == (groups, planned.length_out)
        assert kept.dtype == torch.int64
        for group in range(groups):
            one = {signal: value[group].numpy() for signal, value in signals.items()}
            assert planned.layout is not None
            view = View(planned.index, planned.length_out, planned.grid, one, *planned.layout)
            expected = TRANSCRIPTIONS[name](view)
            assert kept[group].tolist() == list(expected.keep), f"{planned.name} group {group}"
            assert (mix is None) == (expected.rows is None)
            if mix is not None and expected.rows is not None:
                rows = (mix[group] @ signals["tokens"][group]).numpy()
                np.testing.assert_allclose(rows, expected.rows, rtol=1e-4, atol=1e-4)
            if expected.carry is not None:
                assert carry is not None
                np.testing.assert_allclose(carry[group].numpy(), np.array(expected.carry), rtol=1e-4, atol=1e-6)
        carried = None if carry is None else carry.gather(1, kept)
