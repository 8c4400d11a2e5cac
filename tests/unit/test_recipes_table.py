"""The table of papers: every row is complete, and the command prints it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.compiler.recipe import Recipe
from secateur.passes.methods.registry import MERGES, SCORES, SELECTORS
from secateur.passes.recipe_file import recipe_from_yaml
from secateur.passes.recipes import RECIPES, get_recipe
from secateur.passes.signal_table import SIGNALS
from secateur.runtime.errors import UserError
from secateur.tools import recipes_page
from secateur.tools.recipes import recipes

CHANGES_AT_ONE = {
    "aim",
    "prumerge",
    "prumerge_plus",
    "recoverable",
    "seats",
    "seats_qwen3_omni",
    "todre",
    "visual_exit",
}
"""Rows that merge, or drop all tokens in late layers, whatever the keep ratio."""
PAPERS = [recipe for recipe in RECIPES.values() if recipe.name not in ("none", "random")]


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda recipe: recipe.name)
def test_row_says_where_it_comes_from(recipe: Recipe) -> None:
    assert recipe.title
    assert recipe.link.startswith("https://arxiv.org/abs/")
    assert recipe.notes, "say where the static form differs from the published code"
    assert recipe.identity_at_one is (recipe.name not in CHANGES_AT_ONE)


def test_rows_are_called_by_their_keys() -> None:
    assert [recipe.name for recipe in RECIPES.values()] == list(RECIPES)
    for name in RECIPES:
        assert get_recipe(name) is RECIPES[name]


def test_unknown_row_lists_the_known() -> None:
    with pytest.raises(UserError) as caught:
        get_recipe("fastq")
    assert str(caught.value) == (
        f"--recipe: no recipe 'fastq' (available: {', '.join(sorted(RECIPES))}); or give a .yaml file, or FILE.py:NAME"
    )


def test_the_table_has_forty_rows_with_everything_a_reader_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    told = recipes(as_json=True)
    assert told == json.loads(capsys.readouterr().out)
    assert len(told) >= 40
    for row in told:
        recipe = RECIPES[row["name"]]
        assert row["evidence"] == recipe.evidence
        assert row["notes"]
        assert row["link"] == recipe.link
        assert len(row["sites"]) == len(recipe.stages)
        for signal in row["signals"]:
            assert set(signal["options"]) <= set(SIGNALS[signal["name"]].options)
    (fastv,) = [row for row in told if row["name"] == "fastv"]
    assert fastv["sites"] == ["decoder.layer[2/32]"]
    assert fastv["signals"] == [
        {"stage": 0, "name": "last_query_attention", "shape": "[G,H,N]", "options": {"projections": "previous"}}
    ]


def test_a_row_is_saved_as_a_recipe_file(capsys: pytest.CaptureFixture[str]) -> None:
    recipes("fastv", as_yaml=True)
    assert recipe_from_yaml(capsys.readouterr().out) == RECIPES["fastv"]
    with pytest.raises(UserError, match="--yaml is for one recipe; name it"):
        recipes(as_yaml=True)
    with pytest.raises(UserError, match="is composed; a recipe file holds one recipe"):
        recipes("divprune+fastv", as_yaml=True)


def test_table_names_every_row_and_paper_in_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    recipes()
    printed = capsys.readouterr().out
    for recipe in RECIPES.values():
        assert recipe.name in printed
        assert recipe.link in printed
    assert "decoder.layer[8,16,24/32]" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_one_row_is_shown_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recipes("pyramiddrop")
    printed = " ".join(capsys.readouterr().out.split())
    row = RECIPES["pyramiddrop"]
    for text in (row.title, row.link, row.evidence, row.notes, "stage 2 at decoder.layer[24/32]", "12.5 %"):
        assert text in printed
    recipes("divprune:keep=0.5+fastv:keep=0.5", as_json=True)
    assert len(json.loads(capsys.readouterr().out)["parts"]) == 2


def test_the_vocabulary_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    recipes(vocabulary=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert {f["name"] for f in told["functions"]} == {*SCORES, *SELECTORS, *MERGES}
    assert all(f["summary"] for f in told["functions"])
    assert {s["name"] for s in told["signals"]} == set(SIGNALS)
    recipes(vocabulary=True)
    assert "top_k" in capsys.readouterr().out


def test_the_page_is_what_the_table_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == recipes_page.write(), "run: python -m secateur.tools.recipes_page"


def test_the_page_has_a_section_per_row() -> None:
    lines = recipes_page.write().splitlines()
    for recipe in RECIPES.values():
        assert f"## {recipe.name}" in lines
    assert not [line for line in lines if ":func:" in line]


def test_listing_the_table_needs_no_torch() -> None:
    code = "import sys, secateur.tools.recipes as r; r.recipes(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
