"""`secateur recipes`: the table of papers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur.passes.recipe_file import recipe_to_data
from secateur.passes.recipes import RECIPES


def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print every field as JSON.")] = False,
) -> list[dict[str, Any]]:
    """List the published methods that can be compiled.

    Each row --json shows is the content of a recipe file (YAML reads JSON): save one, change it, compile with it.

    \b
      secateur recipes
      secateur recipes --json
    """
    rows = [recipe_to_data(recipe) for recipe in RECIPES.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        Console().print(_draw_table(rows))
    return rows


def _draw_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("recipe", "keep", "where", "paper", box=None, pad_edge=False)
    for row in rows:
        sites = "\n".join(stage["site"] for stage in row["stages"]) or "nowhere"
        paper = f"{row['title']}\n{row['link']}".strip()
        table.add_row(row["name"], f"{RECIPES[row['name']].default_keep:.3g}", Text(sites), Text(paper))
    return table
