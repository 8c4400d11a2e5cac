"""The accuracy table: its cells, its rows, its verdict; and the ceiling's road through prefill."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from secateur.compiler.pipeline import RECIPES, Geometry
from secateur.runtime.errors import UserError
from secateur.runtime.session import Session
from secateur.tools.bench import accuracy_bounds
from secateur.tools.bench.accuracy import KEEPS
from secateur.tools.bench.accuracy_page import draw, judge_ceiling, markdown, table_rows, write
from secateur.tools.sweep.bundles import Bundles
from secateur.tools.sweep.cells import ORACLE, ORACLE_COMPACT, choose_recipes, list_cells, oracle_recipe

from .rows import LEARNED, SEEING
from .tiny_model import BOS, IMAGE, write_model

KINDS = ("count", "exists")


def record(row: str, keep: float, score: float, **changes: Any) -> dict[str, Any]:
    programs = {"vision": 100, "prefill": 1000, "decode": 10}
    return {
        "row": row, "ratio": keep, "keep": keep, "accuracy": score, "questions": 1000,
        "kinds": dict.fromkeys(KINDS, score), "segments": [[1, 196], [7, round(196 * keep)]],
        "flops": programs, "unpruned_flops": programs, "right": "1" * round(20 * score) + "0" * round(20 * (1 - score)),
        **changes,
    }  # fmt: skip


RECORDS = [
    record("none", 1.0, 0.96),
    record("fastv", 1.0, 0.96),
    record("fastv", 0.25, 0.5),
    record(ORACLE, 0.5, 0.955),
]


def test_grid_has_every_recipe_at_every_ratio_and_none_once() -> None:
    cells = list_cells(choose_recipes(None), KEEPS)
    pruning = [name for name in SEEING if name != "none" and name not in LEARNED]
    assert len(cells) == 1 + (len(pruning) + 2) * len(KEEPS)
    assert {cell.row for cell in cells} == {"none", *pruning, ORACLE, ORACLE_COMPACT}
    assert len({cell.file_name for cell in cells}) == len(cells)
    assert [cell.row for cell in cells if cell.by_oracle] == [ORACLE] * len(KEEPS) + [ORACLE_COMPACT] * len(KEEPS)
    with pytest.raises(UserError, match="no recipe 'fast'"):
        choose_recipes(["fast"])


def test_table_leaves_out_what_was_not_measured() -> None:
    assert table_rows(RECORDS) == [
        ["recipe", "1", "0.5", "0.25"],
        ["none", "96.0", "", ""],
        ["fastv", "96.0", "", "50.0"],
        [ORACLE, "", "95.5", ""],
    ]
    console = Console(file=io.StringIO(), width=100)
    console.print(draw(RECORDS))
    assert "1000 held-out questions" in console.file.getvalue()
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_ceiling_is_judged_against_the_unpruned_accuracy() -> None:
    assert "reaches 99.5 % of the unpruned accuracy (at least 99.0 % wanted): as required" in judge_ceiling(RECORDS)
    assert "TOO LITTLE" in judge_ceiling([record("none", 1.0, 0.96), record(ORACLE, 0.5, 0.94)])
    assert "not compared" in judge_ceiling(RECORDS[:2])


def test_page_says_what_each_cell_costs() -> None:
    fewer = record("fastv", 0.25, 0.5, flops={"vision": 100, "prefill": 400, "decode": 10})
    page = write({"model": "ab" * 32, "questions": 1000, "geometry": {"text_tokens": 24}, "cells": [RECORDS[0], fewer]})
    assert "| fastv | 0.25 | 1 × 196, 7 × 49 | 100 (1.00×) | 400 (2.50×) | 10 (1.00×) | 50.0 |" in page
    assert "| fastv | 50.0 | 50.0 |" in page
    assert "`abababababababab…`" in page


def test_sign_test_is_the_exact_binomial_one() -> None:
    assert accuracy_bounds.sign_test(0, 0) == accuracy_bounds.sign_test(5, 5) == 1.0
    assert accuracy_bounds.sign_test(0, 5) == pytest.approx(2 / 32)
    assert accuracy_bounds.sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_rows_outside_the_bounds_are_found_and_explained_only_by_the_control() -> None:
    bounds = [record("none", 1.0, 1.0), record("random", 0.5, 0.5), record(ORACLE, 0.5, 0.7)]
    rows = [record("fitprune", 0.5, 0.1), record("fastv", 0.5, 0.45), record("aim", 0.5, 1.0), record("dart", 0.5, 0.6)]
    found = [*bounds, *rows]
    assert [s.row for s in accuracy_bounds.under_floor(found)] == ["fitprune"]
    assert [s.row for s in accuracy_bounds.level_with_floor(found)] == ["fastv"]
    assert [s.row for s in accuracy_bounds.over_ceiling(found)] == ["aim"]
    (control,) = accuracy_bounds.control_cells(found)
    assert [stage.site.layer for stage in control.recipe.stages] == [12, 18, 24]
    assert accuracy_bounds.move_later(RECIPES["divprune"]) is None
    (control,) = accuracy_bounds.control_cells([*bounds, record("pact", 0.5, 0.1)])
    assert control.recipe.stages[0].select is not None
    assert control.recipe.stages[0].select.options["candidates"] == 1.0
    (control,) = accuracy_bounds.control_cells(found)
    for accuracy in (0.15, 0.45):
        page = accuracy_bounds.write([*found, record(control.row, 0.5, accuracy)])
        assert ("won back: fitprune 0.5.**" in page) == (accuracy == 0.15)
        assert f"| fitprune | 0.5 | 10.0 | 50.0 | {100 * accuracy:.1f}, stages further in |" in page
        assert "* `fitprune`: ranks by" in page
        assert "fastv 0.5 (45.0 to 50.0)" in page
        assert "Above it: aim 100.0." in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("row", [ORACLE, ORACLE_COMPACT])
def test_oracle_features_enter_prefill_and_decode_as_in_the_eager_model(row: str, tmp_path: Path) -> None:
    """The chosen features' logits equal those of the Hugging Face decoder on the same rows and positions."""
    import torch
    from transformers import AutoModelForImageTextToText

    pytest.importorskip("onnxruntime")
    directory = write_model(tmp_path / "model")
    bundles = Bundles(directory, Geometry(batch=1, images=1, text_tokens=10, new_tokens=4), tmp_path / "work")
    kept, text = np.array([1, 2, 7, 12]), [40, 41, 42, 43]
    with bundles.borrow(oracle_recipe(row), 0.25) as bundle, Session(bundle, threads=1) as session:
        request = session.request()
        pixels = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            features = model.model.get_image_features(pixel_values=torch.from_numpy(pixels)).pooler_output[0]
        ids = np.zeros((1, session.manifest.geometry.sequence), np.int64)
        ids[0, :9] = [BOS, *[IMAGE] * len(kept), *text]
        chosen = features[kept][None].numpy()
        first = session.prefill(request, ids, np.array([9]), features=chosen, kept=kept[None])
        second = session.decode(request, np.array([50]))
    places = [0, *(1 + kept), *range(17, 21), 21] if row == ORACLE else list(range(10))
    words = model.get_input_embeddings()(torch.tensor([BOS, *text, 50]))
    rows = torch.cat([words[:1], features[kept], words[1:]])[None]
    with torch.no_grad():
        hidden = model.model.language_model(inputs_embeds=rows, position_ids=torch.tensor([places])).last_hidden_state
        wanted = model.lm_head(hidden[0, -2:]).numpy()
    assert np.abs(first[0] - wanted[0]).max() < 1e-4
    assert np.abs(second[0] - wanted[1]).max() < 1e-4
