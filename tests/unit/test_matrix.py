"""The matrix itself: which cells it has, what it keeps, and that a failing cell is not passed over."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.matrix import __main__ as matrix
from tests.matrix import engine_tables, page
from tests.matrix import walk as walking
from tests.matrix.applies import Tower, lacks
from tests.matrix.cells import Cell, image_counts, list_cells, sample_engines
from tests.matrix.engines import NoLibraryError
from tests.matrix.fused import count_fused, differences, summarize
from tests.matrix.layouts import LAYOUTS
from tests.matrix.work import try_cell

from secateur.compiler.recipe import Recipe
from secateur.exporters.tensorrt import ParsedLayer
from secateur.passes.recipes import RECIPES
from secateur.tools.sweep.records import write_record

PARITY = {
    "passed": True, "rows": 6, "chose_equally": 5, "tied": 1, "chose_differently": 0, "mismatches": [],
    "features": 1e-6, "hidden": 2e-6, "cache": 3e-6, "logits": 4e-6, "scales": {"features": 1.0, "hidden": 1.0},
}  # fmt: skip


FINE: dict[str, list[str]] = {"warnings": [], "lint": [], "unlike": []}


def record(cell: Cell, **outcome: Any) -> dict[str, Any]:
    return {"name": str(cell), "cell": cell.as_json(), "outcome": outcome}


def test_a_row_whose_decoder_goes_on_with_what_was_seen_needs_a_score_of_what_is_heard() -> None:
    why = "its first score in the decoder is that of the tokens seen, and those heard have none"
    assert lacks(RECIPES["vflowopt"], Tower(False, hears=True)) == why
    assert lacks(RECIPES["vflowopt"], Tower(False)) is None
    assert lacks(RECIPES["seats"], Tower(False, hears=True)) is None


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
    assert str(lacks(RECIPES["zoo_prune"], Tower(False, merges=True, projected=True))).startswith("probe_slopes")


def test_a_row_that_takes_images_apart_in_the_decoder_does_not_apply_where_sound_lies_between_them() -> None:
    hears = Tower(False, merges=True, hears=True)
    for name in ("aim", "cdpruner", "dycoke", "fastv_debiased"):
        assert lacks(RECIPES[name], Tower(False, merges=True)) is None
        assert str(lacks(RECIPES[name], hears)).endswith("in the decoder, where sound lies between them")
    assert lacks(RECIPES["fastv"], hears) is None
    assert lacks(RECIPES["echoingpixels"], hears) is None


def test_a_mean_that_a_shallow_decoder_cannot_reach_is_not_built_at() -> None:
    keeps = {(c.recipe, c.layout): c.keep for c in list_cells(list(RECIPES.values()), LAYOUTS) if c.kind == "engine"}
    others = {pair: keep for pair, keep in keeps.items() if keep is not None}
    assert others == {("fastv_omni", "qwen2_5_omni"): 0.1, ("fastv_omni", "qwen3_omni"): 0.1}


def test_cells_of_a_row() -> None:
    cells = list_cells([RECIPES["fastv"], RECIPES["fastervlm"]], LAYOUTS)
    parity = {(c.recipe, c.layout, c.keep, c.batch) for c in cells if c.kind == "parity"}
    pairs = [*(("fastv", layout) for layout in LAYOUTS), ("fastervlm", "llava")]
    assert parity == {(*pair, keep, batch) for pair, keep, batch in itertools.product(pairs, (0.5, 0.1), (1, 3))}
    assert [(c.recipe, c.layout) for c in cells if c.kind == "identity"] == pairs
    built = [(c.recipe, c.layout, c.dtype) for c in cells if c.kind == "engine"]
    pairs += [("fastervlm", "llava_next"), ("fastervlm", "internvl")]  # where it is not compared
    assert sorted(built) == sorted((*pair, dtype) for pair in pairs for dtype in ("fp16", "bf16"))
    assert len({str(c) for c in cells}) == len(cells), "names are files"


def test_a_layout_with_few_rows_compares_them_all_and_no_other_and_builds_what_applies() -> None:
    cells = list_cells(list(RECIPES.values()), LAYOUTS)
    for layout in LAYOUTS.values():
        recipes = {cell.recipe for cell in cells if cell.layout == layout.name and cell.kind != "engine"}
        built = {cell.recipe for cell in cells if cell.layout == layout.name and cell.kind == "engine"}
        assert built == {name for name, row in RECIPES.items() if lacks(row, layout.tower) is None}
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
    assert (geometry.batch, geometry.images, geometry.frames, geometry.audio_seconds) == (3, 0, 8, 4)
    assert image_counts(RECIPES["seats"]) == (1, 4)
    assert layout.image_counts(RECIPES["seats"]) == (1,)
    assert LAYOUTS["llava"].geometry(1, 4).images == 4


def test_rows_that_look_at_frames_get_several_images() -> None:
    assert image_counts(RECIPES["fastv"]) == (1,)
    assert image_counts(RECIPES["dycoke"]) == (1, 4)
    stage = replace(RECIPES["dycoke"].stages[0], scope="window", window=2)
    assert image_counts(replace(RECIPES["dycoke"], stages=(stage,))) == (4,)


def test_rows_that_take_images_apart_in_the_decoder_get_several() -> None:
    for name in ("aim", "recoverable", "cdpruner"):
        assert image_counts(RECIPES[name]) == (1, 2)
        cells = list_cells([RECIPES[name]], {"llava": LAYOUTS["llava"]}, engines=False)
        assert {(c.batch, c.images) for c in cells if c.kind == "parity"} == {(1, 1), (3, 2), (1, 2)}
        assert {c.images for c in cells if c.kind == "identity"} <= {2}
        assert len({str(c) for c in cells}) == len(cells), "names are files"


def test_every_kind_of_stage_meets_several_images_in_several_rows() -> None:
    """By scope, kind of site and whether it is the decoder's entry. With one image, or one row, groups are rows."""
    met: dict[tuple[str, str, bool], set[tuple[bool, bool]]] = {}
    for cell in list_cells(list(RECIPES.values()), LAYOUTS, engines=False):
        frames = LAYOUTS[cell.layout].media.get("frames", 0)
        for stage in RECIPES[cell.recipe].stages:
            kind = (stage.scope, stage.site.kind, stage.site.layer == 0)
            met.setdefault(kind, set()).add((cell.batch > 1, cell.images > 1 or frames > 1))
    table = {(s.scope, s.site.kind, s.site.layer == 0) for row in RECIPES.values() for s in row.stages}
    assert set(met) == table
    for kind, seen in met.items():
        assert (True, True) in seen, kind
        if kind[0] in ("image", "window") and kind[1] == "decoder.layer":
            assert (False, True) in seen, kind


def test_rows_of_a_batch_hold_several_images_wherever_they_hold_images() -> None:
    for cell in list_cells(list(RECIPES.values()), LAYOUTS, engines=False):
        layout = LAYOUTS[cell.layout]
        assert cell.images > 1 or cell.batch == 1 or layout.media.get("frames"), cell
        assert layout.geometry(cell.batch, cell.images).images == (0 if layout.media.get("frames") else cell.images)


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
    assert list(walking.read_held(cells, tmp_path)) == cells
    monkeypatch.setattr(matrix, "list_cells", lambda *_: cells)
    asked: list[Cell] = []
    monkeypatch.setattr(matrix, "walk", lambda todo, *_: asked.extend(todo) or iter(()))
    page_file = tmp_path / "matrix.md"
    for arguments, again in ((["--page"], []), ([], cells[1:]), (["--fresh"], cells)):
        with suppress(SystemExit):
            matrix.main([*arguments, "--work", str(tmp_path), "--docs", str(page_file)])
        assert asked == again, arguments
        asked.clear()
    assert "3 more were not run" in page_file.read_text()
    changed = replace(RECIPES["fastv"], positions="compact")
    monkeypatch.setitem(RECIPES, "fastv", changed)
    assert walking.read_held(cells[:1], tmp_path) == {}, "another text of the row"


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
    header, line = page.table_rows(records)
    assert line[:5] == ["fastv", "llava", "10", "2", "1"]
    assert line[5:] == ["1.0e-06", "2.0e-06", "2.0e-03", "4.0e-06", "5.0e-06"]
    assert len(line) == len(header)
    (failed,) = page.failures(records)
    assert failed == f"{cells[1]}: 1 rows chose differently (stage0 row 2); cache differ by 2.00e-03"
    text = page.write(records, {("fastv", "onevision"): "cls_attention needs a CLS token"})
    assert "**1 cells are not within the bar.**" in text
    assert "**1 engines were not built" in text


def test_the_page_has_a_mark_for_every_engine_and_the_reason_for_every_other() -> None:
    def engine(recipe: str, layout: str, dtype: str, passed: bool | None, **more: Any) -> dict[str, Any]:
        return record(Cell("engine", recipe, layout, dtype=dtype), passed=passed, **more)

    stack = {"layers": 8, "attention": [1, 1], "RMS norm": [2, 3]}
    records = [
        engine("none", "llava", "fp16", True, programs={"prefill": {"fused": {"model.layers": stack}}}),
        engine("none", "llava", "bf16", False, error="x"),
        *(engine("fastv", "llava", dtype, True) for dtype in ("fp16", "bf16")),
        *(engine("fastv", "gemma3", dtype, None) for dtype in ("fp16", "bf16")),
    ]
    skipped = {("none", "gemma3"): "one reason", ("tome", "gemma3"): "another", ("tome", "llava"): "one reason"}
    assert engine_tables.grid(records, skipped) == [
        ["recipe", "llava", "gemma3"],
        ["none", "fp16 ✓, bf16 **✗**", "a"],
        ["fastv", "✓", "fp16 –, bf16 –"],
        ["tome", "a", "b"],
    ]
    assert engine_tables.list_reasons(skipped) == "* a: one reason\n* b: another"
    assert engine_tables.layers(records)[1:] == [["llava", "`model.layers`", "8", "1", "", "2 to 3", "", ""]]
    assert engine_tables.write([record(Cell("parity", "fastv", "llava"), **PARITY)], skipped) == ""


def parsed(*nodes: str, type: str = "RMS_NORMALIZATION") -> list[ParsedLayer]:
    return [ParsedLayer(type, node, None if type == "ATTENTION_INPUT" else node) for node in nodes]


def test_fused_layers_are_counted_where_they_stand() -> None:
    stack = "model.decoder.layers"
    found = count_fused([
        *parsed(f"{stack}.0.norm/RMSNormalization", f"{stack}.11.norm/RMSNormalization", f"score/{stack}.1.norm/R"),
        *parsed(f"{stack}.0.attn/Attention_AttentionInput", type="ATTENTION_INPUT"),
        *parsed("model.norm/RMSNormalization"), *parsed(f"{stack}.0.mlp/MatMul", type="MATRIX_MULTIPLY"),
    ])  # fmt: skip
    assert found == {
        f"{stack}.0": {"RMS norm": 1, "attention": 1}, f"{stack}.11": {"RMS norm": 1},
        f"score/{stack}.1": {"RMS norm": 1}, "model.norm": {"RMS norm": 1},
    }  # fmt: skip
    assert summarize(found)[stack] == {"layers": 2, "RMS norm": [1, 1], "attention": [0, 1]}


def test_a_layer_that_is_not_fused_as_the_model_asks_or_as_without_a_recipe_is_named() -> None:
    whole = {"attention": 1, "rotary": 2, "RMS norm": 2}
    layer, other, norm = "model.layers.0", "model.layers.1", {"model.norm": {"RMS norm": 1}}
    expected, unpruned = {layer: whole, other: whole}, {layer: whole, other: whole, **norm}
    score = {"score/model.layers.1": {"RMS norm": 1}}
    assert list(differences({**unpruned, **score}, expected, unpruned)) == []
    unfused = {**unpruned, other: {"attention": 1, "RMS norm": 2}}
    assert list(differences(unfused, expected, unfused)) == [
        f"{other} has 1 attention, 2 RMS norm, and the model has 2 rotary"
    ]
    assert [line.partition(" ")[0] for line in differences(unfused, expected, unpruned)] == [other, other]
    assert list(differences({layer: whole, **norm}, expected, {layer: whole, **norm})) == [
        f"{other} has no fused attention"
    ]
    assert list(differences({layer: whole, other: whole}, expected, unpruned)) == [
        "model.norm has nothing fused, and without a recipe 1 RMS norm"
    ]


def test_a_process_stays_with_a_layout_and_shares_one_that_is_long() -> None:
    cells = [Cell("parity", f"r{i}", layout) for layout, n in (("a", 3), ("b", 40), ("c", 5)) for i in range(n)]
    hands = walking.Hands(cells, 2)
    dealt: list[list[str]] = [[], []]
    idle: set[int] = set()
    while len(idle) < 2:
        for process in (0, 1, 1):  # the second is twice as fast
            cell = hands.next(process)
            dealt[process] += [cell.layout] if cell else []
            idle |= set() if cell else {process}
    assert sum(map(len, dealt)) == len(cells)
    assert [layout for layout, _ in itertools.groupby(dealt[1])] == ["c", "a", "b"]
    assert set(dealt[0]) == {"b"}


def test_cells_of_one_trace_stand_together() -> None:
    cells = list_cells([RECIPES["fastv"], RECIPES["dycoke"]], {"llava": LAYOUTS["llava"]})
    hands = walking.Hands(cells, 1)
    order = [(c.dtype, c.batch, c.images) for c in iter(lambda: hands.next(0), None)]
    assert len(order) == len(cells)
    assert len([key for key, _ in itertools.groupby(order)]) == len(set(order))


@pytest.mark.parametrize(
    ("kind", "outcome", "said"),
    [
        ("parity", {"passed": False, "error": "KeyError: 'x'"}, "KeyError: 'x'"),
        ("identity", {"passed": False, "logits": 1e-3, "same_tokens": 8, "steps": 9}, "8 of 9 tokens are those"),
        ("engine", {"passed": False, "programs": {"prefill": {**FINE, "warnings": ["odd"]}}}, "prefill: odd"),
        ("engine", {"passed": False, "programs": {"decode": {**FINE, "unlike": ["odd"]}}}, "decode: odd"),
    ],
)
def test_every_kind_of_failure_is_explained(kind: Any, outcome: dict[str, Any], said: str) -> None:
    found = record(Cell(kind, "fastv", "llava"), **outcome)
    (line,) = page.failures([found])
    assert said in line
    table = engine_tables.grid([found], {}) if kind == "engine" else page.table_rows([found])
    assert {"parity": "**(failed)**", "identity": "**failed**", "engine": "**✗**"}[kind] in " ".join(table[1])


def test_a_recipe_without_stages_lacks_nothing() -> None:
    assert lacks(Recipe("mine", "", "", ()), Tower(False)) is None
