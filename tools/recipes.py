"""`secateur recipes`: the table of papers."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.passes.recipe_file import load_recipe, recipe_to_yaml
from secateur.passes.recipe_module import installed_recipes
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.compiler.recipe import Recipe, Rounds, Stage

WIDTH = 100
"""Columns the table is made to be read in."""


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show one in full: a name, FILE.yaml, FILE.py:NAME, or several joined by +.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every field as JSON.")] = False,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print the one as a recipe file: save it, change it, compile with it.")
    ] = False,
    vocabulary: Annotated[
        bool, typer.Option("--vocabulary", help="List the functions and signals that recipes are written with.")
    ] = False,
) -> list[dict[str, Any]]:
    """List the published methods that can be compiled, and those of installed packages.

    \b
      secateur recipes
      secateur recipes fastv
      secateur recipes fastv --yaml > my_recipe.yaml
      secateur recipes --json
    """
    if as_yaml and (name is None or as_json or vocabulary):
        raise UserError("--yaml is for one recipe", fix="name it: secateur recipes fastv --yaml")
    if vocabulary:
        if name is not None:
            raise UserError("--vocabulary is that of all recipes", where=name, fix="leave one of them out")
        return _show_vocabulary(as_json)
    rows = list((RECIPES | installed_recipes()).values()) if name is None else [load_recipe(name)]
    if as_yaml:
        if rows[0].parts:
            raise UserError(f"{name} is composed", fix="a recipe file holds one recipe: save its parts")
        typer.echo(recipe_to_yaml(rows[0]), nl=False)
        return []
    if as_json:
        from secateur.passes.describe import describe_recipe

        data = [describe_recipe(row) for row in rows]
        typer.echo(json.dumps(data if name is None else data[0], indent=1, ensure_ascii=False))
        return data
    if name is not None:
        _print_one(rows[0])
        return []
    from rich.console import Console

    from secateur.tools.console import results

    # Into a file or a pipe as wide as it takes; rich would fold it at 80 columns.
    (results if results.is_terminal else Console(highlight=False, width=WIDTH)).print(_draw_table(rows))
    return []


def show_sites(recipe: Recipe) -> str:
    """Where a recipe acts, layers of one depth together: ``vision.layer[1-22/24], decoder.layer[8,16,24/32]``."""
    found: list[str] = []
    for (kind, depth), group in groupby((stage.site for stage in recipe.stages), lambda site: (site.kind, site.depth)):
        layers = [site.layer for site in group if site.layer is not None]
        found.append(f"{kind}[{_show_layers(layers)}{f'/{depth}' if depth else ''}]" if layers else kind)
    return ", ".join(found) or "nowhere"


def _show_layers(layers: list[int]) -> str:
    """``1-22`` for every layer from 1 to 22, ``8,16`` for the two."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _draw_table(rows: list[Recipe]) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    where = Column("where", overflow="fold")
    table = Table("recipe", "keep", where, "paper", box=None, pad_edge=False)
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for row in rows:
        table.add_row(row.name, f"{row.default_keep:.3g}", Text(show_sites(row)), Text(row.link))
    table.caption = "keep is the published ratio; `secateur recipes NAME` shows one in full"
    table.caption_justify = "left"
    return table


def _print_one(recipe: Recipe) -> None:
    """Everything the row says, a stage at a time."""
    from rich.text import Text

    from secateur.passes.describe import describe_term
    from secateur.tools.console import results
    from secateur.tools.inspect import make_table

    overview = make_table("what", "value", title=recipe.name)
    overview.show_header = False
    same = "leaves the output unchanged" if recipe.identity_at_one else "changes the output too"
    settings = [f"{s.model}: {s.keep:.3g}{f' ({s.note})' if s.note else ''}" for s in recipe.settings]
    for what, value in (
        ("title", recipe.title), ("link", recipe.link), ("evidence", recipe.evidence),
        ("positions", recipe.positions), ("cache", recipe.cache), ("keep 1", same), ("published", "\n".join(settings)),
        ("schedule", str(recipe.schedule or "")), ("notes", recipe.notes),
    ):  # fmt: skip
        if value:
            overview.add_row(what, Text(value))
    results.print(overview)
    for index, stage in enumerate(recipe.stages):
        table = make_table("what", "value", title=f"\nstage {index} at {stage.site.written}")
        table.show_header = False
        for role in ("score", "select", "merge"):
            term = getattr(stage, role)
            if term is not None:
                table.add_row(role, Text(f"{term}\n{describe_term(role, term)}"))
        table.add_row("leaves", show_budget(stage))
        table.add_row("scope", stage.scope if stage.scope != "window" else f"windows of {stage.window} images")
        for signal, options in stage.signals.items():
            table.add_row("signal", Text(", ".join([signal, *(f"{k} {v}" for k, v in options.items())])))
        results.print(table)


_ROUNDED: dict[Rounds, str] = {
    "nearest": "", "down": ", rounded down", "up": ", rounded up", "removed down": "; what it removes is rounded down",
}  # fmt: skip


def show_budget(stage: Stage) -> str:
    """How many tokens a stage leaves, in words."""
    if stage.select is None:
        return "every token: it only scores"
    if stage.count is not None:
        return f"{stage.count} tokens of each group"
    if not stage.share:
        return "none: text goes on alone"
    return f"{100 * stage.share:.3g} % of the original tokens{_ROUNDED[stage.rounds]}"


def _show_vocabulary(as_json: bool) -> list[dict[str, Any]]:
    from secateur.passes.describe import list_functions, list_signals

    functions, signals = [vars(function) for function in list_functions()], list_signals()
    if as_json:
        typer.echo(json.dumps({"functions": functions, "signals": signals}, indent=1, ensure_ascii=False))
        return [*functions, *signals]
    from rich.text import Text

    from secateur.tools.console import results
    from secateur.tools.inspect import make_table

    words = make_table("role", "function", "what it does", title="Functions")
    for f in functions:
        takes = ", ".join([*f["takes"], *(f"{k}: {v}" for k, v in f["options"].items())])
        words.add_row(f["role"], f["name"], Text(f"{f['summary']}\n({takes})"))
    table = make_table("signal", "shape", "what it is", title="\nSignals")
    for s in signals:
        options = "".join(f"\n{k}: {v}" for k, v in s["options"].items())
        table.add_row(s["name"], Text(s["shape"]), Text(f"{s['doc']} (at {', '.join(s['sites'])}){options}"))
    results.print(words)
    results.print(table)
    return [*functions, *signals]
