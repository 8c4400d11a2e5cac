"""The table of papers: every row is complete, and the command prints it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from secateur.compiler.recipe import Recipe
from secateur.passes.recipe_file import recipe_from_yaml
from secateur.passes.recipes import RECIPES, get_recipe
from secateur.runtime.errors import UserError
from secateur.tools.recipes import recipes

PAPERS = [recipe for recipe in RECIPES.values() if recipe.name not in ("none", "random")]


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda recipe: recipe.name)
def test_row_says_where_it_comes_from(recipe: Recipe) -> None:
    assert recipe.title
    assert recipe.link.startswith("https://arxiv.org/abs/")
    assert recipe.notes, "say where the static form differs from the published code"
    assert recipe.identity_at_one


def test_rows_are_called_by_their_keys() -> None:
    assert [recipe.name for recipe in RECIPES.values()] == list(RECIPES)
    for name in RECIPES:
        assert get_recipe(name) is RECIPES[name]


def test_unknown_row_lists_the_known() -> None:
    with pytest.raises(UserError) as caught:
        get_recipe("fastq")
    assert str(caught.value) == (
        "--recipe: no recipe 'fastq' "
        "(available: divprune, fastervlm, fastv, none, pyramiddrop, random, visionzip); "
        "or give the path of a .yaml file"
    )


def test_json_rows_are_recipe_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes(as_json=True) == json.loads(capsys.readouterr().out)
    for row in recipes(as_json=True):
        assert recipe_from_yaml(json.dumps(row)) == RECIPES[row["name"]]


def test_table_names_every_row_and_paper(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    recipes()
    printed = capsys.readouterr().out
    for recipe in RECIPES.values():
        assert recipe.name in printed
        assert recipe.link in printed
    assert "decoder.layer[24/32]" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_listing_the_table_needs_no_torch() -> None:
    code = "import sys, secateur.tools.recipes as r; r.recipes(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
