"""Engines of a part of `make test-matrix`, without a GPU: built with TensorRT-RTX, and fused alike in all layers.

One row of each kind on the first layout, and a seeded few on others; the whole matrix builds every row for every layout
in both half precisions.
"""

from __future__ import annotations

import pytest
from tests.matrix.applies import lacks
from tests.matrix.cells import OTHERS, Cell, sample_engines
from tests.matrix.layouts import LAYOUTS
from tests.matrix.work import Workshop, run_cell

from secateur.passes.recipes import RECIPES

pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
pytest.importorskip("polygraphy", reason="needs the extra tensorrt-rtx")
pytestmark = pytest.mark.filterwarnings("ignore")

FIRST = next(iter(LAYOUTS))
KINDS = ("pyramiddrop", "visionzip", "divprune", "seats")
"""Several stages in the decoder, one behind the tower, one whose selection takes dependent steps, and one that leaves
no visual token to the last layers and shrinks what caches hold."""
CELLS = [
    *(Cell("engine", name, FIRST, None, 2, 1, "fp16") for name in KINDS),
    *sample_engines(
        [row for name, row in RECIPES.items() if name not in KINDS],
        {name: layout for name, layout in LAYOUTS.items() if name != FIRST}, seed=2026,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_engines_build_and_every_layer_is_fused(cell: Cell, shop: Workshop) -> None:
    outcome = run_cell(cell, shop)
    assert outcome["passed"], outcome
    fused = outcome["programs"]["prefill"]["fused"]
    (decoder,) = (stack for stack in fused.values() if "cache update" in stack)
    assert [decoder[name] for name in ("attention", "rotary", "cache update")] == [[1, 1], [2, 2], [2, 2]]
    assert decoder["RMS norm"][0] == decoder["RMS norm"][1] >= 2
    assert outcome["programs"]["vision"]["fused"], "the layers of the tower are counted"


def test_the_sample_has_layouts_of_both_kinds_and_both_half_precisions() -> None:
    drawn = {cell.layout for cell in CELLS}
    assert {name for name, layout in LAYOUTS.items() if not layout.rows} <= drawn <= set(LAYOUTS)
    assert sum(bool(LAYOUTS[name].rows) for name in drawn) == OTHERS
    assert {cell.dtype for cell in CELLS} == {"fp16", "bf16"}
    assert not any(lacks(RECIPES[cell.recipe], LAYOUTS[cell.layout].tower) for cell in CELLS)
