"""The matrix itself: which cells it has, what it keeps, and that a failing cell is not passed over."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.matrix import page
from tests.matrix import walk as walking
from tests.matrix.cells import Cell, Tower, image_counts, lacks, list_cells, sample_engines
from tests.matrix.layouts import LAYOUTS
from tests.matrix.work import NoLibraryError, try_cell

from secateur.compiler.recipe import Recipe
from secateur.passes.recipes import RECIPES
from secateur.tools.sweep.records import write_record

PARITY = {
    "passed": True, "rows": 6, "chose_equally": 5, "tied": 1, "chose_differently": 0, "mismatches": [],
    "features": 1e-6, "hidden": 2e-6, "cache": 3e-6, "logits": 4e-6, "scales": {"features": 1.0, "hidden": 1.0},
}  # fmt: skip


def record(cell: Cell, **outcome: Any) -> dict[str, Any]:
    return {"name": str(cell), "cell": cell.as_json(), "outcome": outcome}


def test_a_row_that_reads_the_cls_token_applies_only_where_there_is_one() -> None:
    assert lacks(RECIPES["fastervlm"], Tower(True)) is None
    assert lacks(RECIPES["fastervlm"], Tower(False)) == "cls_attention needs a CLS token"
    assert lacks(RECIPES["fastv"], Tower(False)) is None


def test_a_row_inside_the_tower_applies_only_where_patches_stay_apart() -> None:
    assert lacks(RECIPES["fastv"], Tower(True, merges=True)) is None
    assert lacks(RECIPES["prumerge"], Tower(True)) is None
    assert str(lacks(RECIPES["prumerge"], Tower(True, read_last=True))).endswith("reads, which is the last")
    assert lacks(RECIPES["fastervlm"], Tower(False, merges=True)) == "cls_attention needs a CLS token"
    inside = [r.name for r in RECIPES.values() if any(s.site.kind == "vision.layer" for s in r.stages)]
    assert inside
    for name in inside:
        assert lacks(RECIPES[name], Tower(True)) is None
        assert str(lacks(RECIPES[name], Tower(True, merges=True))).startswith("its stages stand between layers")


def test_a_row_that_needs_single_tiles_does_not_apply() -> None:
    for name in ("fastv", "visionzip", "divprune"):
        assert lacks(RECIPES[name], Tower(True, tiles=True)) is None
    assert str(lacks(RECIPES["tome"], Tower(True, tiles=True))).endswith("sees the tiles of an image one by one")
    assert str(lacks(RECIPES["hired"], Tower(True, tiles=True))).startswith("it needs the whole grid of patches")


def test_a_row_that_probes_the_projector_applies_only_where_it_is_no_linear_map() -> None:
    assert lacks(RECIPES["zoo_prune"], Tower(False, merges=True)) is None
    assert str(lacks(RECIPES["zoo_prune"], Tower(False, merges=True, linear=True))).startswith("probe_slopes")


def test_cells_of_a_row() -> None:
    cells = list_cells([RECIPES["fastv"], RECIPES["fastervlm"]], LAYOUTS)
    parity = {(c.recipe, c.layout, c.keep, c.batch) for c in cells if c.kind == "parity"}
    pairs = [*(("fastv", layout) for layout in LAYOUTS), ("fastervlm", "llava")]
    assert parity == {(*pair, keep, batch) for pair, keep, batch in itertools.product(pairs, (0.5, 0.1), (1, 3))}
    assert [(c.recipe, c.layout) for c in cells if c.kind == "identity"] == pairs
    assert {(c.recipe, c.layout, c.dtype) for c in cells if c.kind == "engine"} == {(*p, "fp16") for p in pairs}
    assert len({str(c) for c in cells}) == len(cells), "names are files"


def test_a_layout_with_few_rows_has_them_all_and_no_other() -> None:
    cells = list_cells(list(RECIPES.values()), LAYOUTS)
    for layout in LAYOUTS.values():
        recipes = {cell.recipe for cell in cells if cell.layout == layout.name}
        assert not set(layout.rows) - set(RECIPES)
        if layout.rows:
            applying = {name for name in layout.rows if lacks(RECIPES[name], layout.tower) is None}
            assert recipes == applying
            assert {"none", "fastv"} < applying
            assert {"divprune"} < applying


def test_rows_that_number_anew_are_no_identity_where_positions_have_axes() -> None:
    cells = list_cells([RECIPES["divprune"], RECIPES["fastv"]], LAYOUTS, engines=False)
    same = {(cell.recipe, cell.layout) for cell in cells if cell.kind == "identity"}
    assert (RECIPES["divprune"].positions, RECIPES["fastv"].positions) == ("compact", "original")
    assert ("divprune", "qwen3_vl") not in same
    assert {("fastv", "qwen3_vl"), ("divprune", "gemma3")} < same


def test_a_layout_with_media_of_its_own_has_them_in_every_cell() -> None:
    layout = LAYOUTS["qwen2_5_omni"]
    geometry = layout.geometry(batch=3)
    assert (geometry.batch, geometry.images, geometry.frames, geometry.audio_seconds) == (3, 1, 8, 4)
    assert image_counts(RECIPES["seats"]) == (1, 4)
    assert layout.image_counts(RECIPES["seats"]) == (1,)
    assert LAYOUTS["llava"].geometry(1, 4).images == 4


def test_rows_that_look_at_frames_get_several_images() -> None:
    assert image_counts(RECIPES["fastv"]) == (1,)
    assert image_counts(RECIPES["dycoke"]) == (1, 4)
    stage = replace(RECIPES["dycoke"].stages[0], scope="window", window=2)
    assert image_counts(replace(RECIPES["dycoke"], stages=(stage,))) == (4,)


def test_the_unpruned_model_is_compared_as_well() -> None:
    cells = list_cells([RECIPES["none"]], {"llava": LAYOUTS["llava"]}, engines=False)
    assert [(c.kind, c.keep, c.batch) for c in cells] == [("parity", None, 1), ("parity", None, 3)]


def test_sampled_engines_fit_their_layout() -> None:
    for seed in range(5):
        for cell in sample_engines(list(RECIPES.values()), LAYOUTS, seed):
            assert lacks(RECIPES[cell.recipe], LAYOUTS[cell.layout].tower) is None


def test_what_holds_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell("parity", name, "llava", 0.5) for name in ("fastv", "random", "divprune")]
    for cell, passed in zip(cells, (True, False, None), strict=True):
        whole = {"key": walking.key_of(cell), **record(cell, passed=passed)}
        write_record(walking.record_path(cell, tmp_path), whole)
    assert list(walking.read_held(cells, tmp_path)) == cells[:1], "only what passed is kept"
    assert walking.read_held(cells, tmp_path, fresh=True) == {}
    changed = replace(RECIPES["fastv"], positions="compact")
    monkeypatch.setitem(RECIPES, "fastv", changed)
    assert walking.read_held(cells, tmp_path) == {}, "another text of the row"


def test_the_code_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("parity", "fastv", "llava", 0.5)
    before = walking.key_of(cell)
    monkeypatch.setattr(walking, "digest_code", lambda: "other")
    assert walking.key_of(cell) != before


def test_what_goes_wrong_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cell: Cell, shop: Any) -> dict[str, Any]:
        raise ValueError("one line\nand another")

    def lack(cell: Cell, shop: Any) -> dict[str, Any]:
        raise NoLibraryError("not built: no library")

    cell = Cell("engine", "fastv", "llava", dtype="fp16")
    monkeypatch.setattr("tests.matrix.work.run_cell", fail)
    assert try_cell(cell, None) == {"passed": False, "error": "ValueError: one line"}  # type: ignore[arg-type]
    monkeypatch.setattr("tests.matrix.work.run_cell", lack)
    assert try_cell(cell, None) == {"passed": None, "error": "not built: no library"}  # type: ignore[arg-type]


def test_the_page_sums_and_names_what_failed() -> None:
    cells = [Cell("parity", "fastv", "llava", keep) for keep in (0.5, 0.1)]
    engine, same = Cell("engine", "fastv", "llava", dtype="fp16"), Cell("identity", "fastv", "llava", 1.0)
    bad = {**PARITY, "passed": False, "chose_differently": 1, "mismatches": ["stage0 row 2"], "cache": 2e-3}
    good = [record(cells[0], **PARITY), record(same, passed=True, logits=5e-6, same_tokens=9, steps=9)]
    records = [*good, record(cells[1], **bad), record(engine, passed=None, error="not built: no library")]
    skipped = {("fastv", "onevision"): "cls_attention needs a CLS token"}
    header, line, other = page.table_rows(records, skipped)
    assert line[:5] == ["fastv", "llava", "10", "2", "1"]
    assert line[5:] == ["1.0e-06", "2.0e-06", "2.0e-03", "4.0e-06", "5.0e-06", "not built: no library"]
    assert other[:3] == ["fastv", "onevision", "does not apply: cls_attention needs a CLS token"]
    assert len(line) == len(other) == len(header)
    (failed,) = page.failures(records)
    assert failed == f"{cells[1]}: 1 rows chose differently (stage0 row 2); cache differ by 2.00e-03"
    text = page.write(records, skipped)
    assert "**1 cells are not within the bar.**" in text
    assert "**1 engines were not built" in text


@pytest.mark.parametrize(
    ("kind", "outcome", "said"),
    [
        ("parity", {"passed": False, "error": "KeyError: 'x'"}, "KeyError: 'x'"),
        ("identity", {"passed": False, "logits": 1e-3, "same_tokens": 8, "steps": 9}, "8 of 9 tokens are those"),
        ("engine", {"passed": False, "programs": {"prefill": {"warnings": ["odd"]}}}, "prefill: odd"),
    ],
)
def test_every_kind_of_failure_is_explained(kind: Any, outcome: dict[str, Any], said: str) -> None:
    found = record(Cell(kind, "fastv", "llava"), **outcome)
    (line,) = page.failures([found])
    assert said in line
    assert (
        "**failed**" in " ".join(page.table_rows([found], {})[1])
        or "**(failed)**" in page.table_rows([found], {})[1][2]
    )


def test_a_recipe_without_stages_lacks_nothing() -> None:
    assert lacks(Recipe("mine", "", "", ()), Tower(False)) is None
