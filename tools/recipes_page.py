"""Writes docs/recipes.md from the table of papers: `python -m secateur.tools.recipes_page`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.passes.describe import Function, describe_recipe, describe_term, list_functions, list_signals
from secateur.passes.recipes import RECIPES
from secateur.tools.recipes import show_budget, show_sites

if TYPE_CHECKING:
    from secateur.compiler.recipe import Recipe, Stage

PAGE = Path("docs/recipes.md")
_ROLES = {"score": "Scores", "select": "Selectors", "merge": "Merges"}


def write() -> str:
    """The page, whole."""
    rows = list(RECIPES.values())
    sections = "\n".join(_write_recipe(row) for row in rows)
    functions = list_functions()
    words = "\n".join(_write_functions(_ROLES[role], [f for f in functions if f.role == role]) for role in _ROLES)
    return f"""# Recipes

Made from the table by `python -m secateur.tools.recipes_page`; edits are overwritten. `secateur recipes NAME` shows a
row on the terminal, `secateur recipes NAME --yaml` as a file to change. [Writing a recipe](writing-a-recipe.md) says
how to add one of your own.

**Keep** is the published share of visual tokens left after the last stage that leaves any; `--keep` rescales it.
**Where** names sites: `decoder.layer[2/32]` is before layer 2 (counted from 0) of a model of 32, scaled to the depth of
yours. A **published setting** fixes what is left at the end; where several stages prune, those before the last scale
with it (evenly in the logarithm of what they leave) and can leave other numbers than the paper's table for that
setting. **Evidence** says what the row was written from: the authors' code, the paper, or a reconstruction where
neither says enough.

{_overview(rows)}

{sections}
# The vocabulary

Functions that recipes name. A parameter called like a signal receives it; options are set by the recipe.

{words}
# The signals

Shapes: G groups (images, windows or rows, as the stage's scope says), N a group's prunable tokens, H heads, d a head's
width, D the stream's width, A layers, T text slots, L all slots of a row. The default of an option comes first.

{_write_signals()}
"""


def _overview(rows: Sequence[Recipe]) -> str:
    lines = [("recipe", "paper", "where", "keep", "evidence")]
    for row in rows:
        title = row.title.partition(":")[0]
        paper = f"[{title}]({row.link})" if row.link else title
        lines.append((f"[`{row.name}`](#{row.name})", paper, f"`{show_sites(row)}`", f"{row.default_keep:.3g}",
                      row.evidence))  # fmt: skip
    return _table(lines)


def _write_recipe(row: Recipe) -> str:
    title = f"[{row.title}]({row.link})" if row.link else row.title
    unchanged = "keep 1 leaves the model's output unchanged" if row.identity_at_one else "keep 1 changes the output too"
    numbering = "keep their positions" if row.positions == "original" else "are numbered anew"
    parts = [f"## {row.name}", f"{title}", f"Evidence: {row.evidence}. Survivors {numbering}; {unchanged}."]
    if row.cache == "shrink":
        parts[-1] += " The caches of earlier layers shrink to the survivors."
    if row.schedule is not None:
        parts[-1] += f" Schedule: `{row.schedule}`."
    signals = describe_recipe(row)["signals"]
    told = [{s["name"]: s["options"] for s in signals if s["stage"] == i} for i in range(len(row.stages))]
    for run in _runs(row.stages, told):
        parts.append(_write_stages(row, run, told[run[0]]))
    if row.settings:
        settings = [("model", "keep", ""), *((s.model, f"{s.keep:.3g}", s.note) for s in row.settings)]
        parts.append(f"Published settings:\n\n{_table(settings)}")
    if row.notes:
        parts.append("\n".join(textwrap.wrap(f"Note: {row.notes}", 118, break_long_words=False)))
    return "\n\n".join(parts) + "\n"


def _runs(stages: Sequence[Stage], signals: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Stages one behind the other that differ in layer and share alone, as lists of indices."""
    runs: list[list[int]] = []
    before: Any = None
    for index, stage in enumerate(stages):
        same = (replace(stage, site=replace(stage.site, layer=None), share=1.0), signals[index])
        if same == before and stage.prunes == stages[index - 1].prunes:
            runs[-1].append(index)
        else:
            runs.append([index])
        before = same
    return runs


def _write_stages(row: Recipe, run: Sequence[int], signals: dict[str, Any]) -> str:
    """The stages ``run`` of a recipe, which read ``signals``, as a list."""
    stages = [row.stages[index] for index in run]
    stage = stages[0]
    scope = {"image": "each image by itself", "whole": "all images of a row together"}.get(
        stage.scope, f"{stage.window} images at a time"
    )
    head = "Prunes" if len(row.stages) == 1 else f"Stage {run[0]}" if len(run) == 1 else f"Stages {run[0]} to {run[-1]}"
    lines = [f"{head} at `{show_sites(replace(row, stages=tuple(stages), schedule=None))}`, {scope}:", ""]
    for role, verb in (("score", "scores by"), ("select", "selects by"), ("merge", "merges by")):
        term = getattr(stage, role)
        if term is not None:
            lines.append(f"* {verb} `{term}`. {describe_term(role, term)}")
    lines.append(f"* leaves {', then '.join(show_budget(stage) for stage in stages)}.")
    if signals:
        shown = [f"`{name}`" + (f" ({_show(options)})" if options else "") for name, options in signals.items()]
        lines.append(f"* reads {', '.join(shown)}.")
    return "\n".join(lines)


def _show(options: dict[str, Any]) -> str:
    texts = {name: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in options.items()}
    return "; ".join(f"{name} {text}" for name, text in texts.items())


def _write_functions(title: str, functions: Sequence[Function]) -> str:
    lines: list[tuple[str, ...]] = [("function", "what it does", "receives", "options")]
    for f in functions:
        options = "<br>".join(f"`{name}: {kind}`" for name, kind in f.options.items())
        lines.append((f"`{f.name}`", f.summary, ", ".join(f"`{name}`" for name in f.takes), options))
    return f"## {title}\n\n{_table(lines)}\n"


def _write_signals() -> str:
    lines: list[tuple[str, ...]] = [("signal", "shape", "what it is", "sites", "options")]
    for s in list_signals():
        options = "<br>".join(f"`{name}`: {text}" for name, text in s["options"].items())
        sites = ", ".join(f"`{site}`" for site in s["sites"])
        lines.append((f"`{s['name']}`", f"`{s['shape']}`", s["doc"], sites, options))
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines]
    rule = " | ".join("---" for _ in lines[0])
    return "\n".join(f"| {row} |" for row in (rows[0], rule, *rows[1:]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.recipes_page", description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write (%(default)s)")
    options = parser.parse_args(arguments)
    options.page.write_text(write(), encoding="utf-8")


if __name__ == "__main__":
    main()
