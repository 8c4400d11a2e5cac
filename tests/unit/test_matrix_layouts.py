"""The seeded sample of `make test-matrix` on all layouts but the first: see ``test_matrix_sample.py``."""

from __future__ import annotations

import pytest
from tests.matrix.applies import Tower
from tests.matrix.cells import Cell
from tests.matrix.layouts import LAYOUTS
from tests.matrix.work import Workshop, run_cell

from secateur.compiler.pipeline import read_source
from secateur.runtime.errors import UserError

from .test_matrix_sample import CELLS, FIRST

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("matrix"))


def skip_what_is_refused(shop: Workshop, layout: str) -> None:
    """A transformers older than the family needs is refused in words that ``test_tested_versions.py`` reads."""
    try:
        read_source(shop.model(layout))
    except UserError as error:
        if not str(error).startswith("transformers: "):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.layout != FIRST], ids=str)
def test_cell(cell: Cell, shop: Workshop) -> None:
    skip_what_is_refused(shop, cell.layout)
    outcome = run_cell(cell, shop)
    assert outcome["passed"], outcome


@pytest.mark.parametrize("layout", LAYOUTS)
def test_towers_have_the_token_the_table_says(layout: str, shop: Workshop) -> None:
    skip_what_is_refused(shop, layout)
    made = shop.bundles(layout, 1, 1)
    source = made.source.at(made.geometry)
    vision = source.vision
    read_last = vision.feature_layer == vision.layers - 1
    found = Tower(
        vision.has_cls, vision.merge != 1, vision.projector_merges, read_last, vision.linear_projector,
        vision.tiles is not None, source.audio is not None,
    )  # fmt: skip
    assert found == LAYOUTS[layout].tower
    assert (made.source.family.read_media is not None) == LAYOUTS[layout].axes
