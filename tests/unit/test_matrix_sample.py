"""A seeded sample of `make test-matrix`: every row once on the LLaVA layout.

``test_matrix_layouts.py`` has the sample's cells of the other layouts, so that two workers share them.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import pytest
from tests.matrix.applies import lacks
from tests.matrix.cells import BATCHES, KEEPS, Cell, sample
from tests.matrix.layouts import LAYOUTS
from tests.matrix.work import Workshop, run_cell

from secateur.passes.recipes import RECIPES

SEED = 2026
CELLS = sample(list(RECIPES.values()), LAYOUTS, SEED)
FIRST = next(iter(LAYOUTS))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.layout == FIRST], ids=str)
def test_cell(cell: Cell, shop: Workshop) -> None:
    outcome = run_cell(cell, shop)
    assert outcome["passed"], outcome
    if cell.kind == "parity":
        assert outcome["scales"]["cache"] > 0.1, "a comparison of zeros proves nothing"


def test_every_row_is_compared_and_every_pair_of_settings_comes_up() -> None:
    compared = [cell for cell in CELLS if cell.kind == "parity"]
    fitting = {n for n, r in RECIPES.items() if r.stages and not lacks(r, LAYOUTS[FIRST].tower)}
    assert set(RECIPES) - fitting == {"none", "contextguard_proxy"}
    assert {c.recipe for c in compared if c.layout == FIRST} == fitting
    for one, other in combinations({"layout": tuple(LAYOUTS), "keep": KEEPS, "batch": BATCHES}.items(), 2):
        seen = {(getattr(c, one[0]), getattr(c, other[0])) for c in compared}
        wanted = set(product(one[1], other[1]))
        if (one[0], other[0]) == ("layout", "batch"):  # a layout with few rows is traced for one batch
            wanted = {(name, batch) for name, batch in wanted if not LAYOUTS[name].rows or (name, batch) in seen}
        assert seen == wanted, (one[0], other[0])
    few = Counter(next(c.batch for c in compared if c.layout == name) for name, o in LAYOUTS.items() if o.rows)
    assert few == dict.fromkeys(BATCHES, 6), "as many layouts with either"
    rows = {(c.recipe, c.keep) for c in compared if LAYOUTS[c.layout].rows and c.recipe == LAYOUTS[c.layout].rows[0]}
    assert {keep for _, keep in rows} == set(KEEPS), "the first row of a layout with few has either ratio"
    assert {c.layout for c in CELLS if c.kind == "identity"} == {n for n, layout in LAYOUTS.items() if not layout.rows}


def test_the_first_row_of_a_layout_with_few_is_compared() -> None:
    """Where a model hears, that is SEATS."""
    compared = {(cell.layout, cell.recipe) for cell in CELLS if cell.kind == "parity"}
    for name, layout in LAYOUTS.items():
        if layout.rows:
            assert (name, layout.rows[0]) in compared
        if layout.media.get("audio_seconds"):
            assert layout.rows[0].startswith("seats")


def test_the_sample_is_the_same_every_time() -> None:
    recipes = list(RECIPES.values())
    assert sample(recipes, LAYOUTS, SEED) == CELLS
    assert sample(recipes, LAYOUTS, SEED + 1) != CELLS
