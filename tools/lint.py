"""`secateur lint`: what a backend would reject late, or take and compute wrongly or slowly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.runtime.errors import UserError, refuse_idle

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.exporters.lint_files import LintedGraph


def lint(
    graph: Annotated[
        Path | None, typer.Argument(help="An ONNX file, from any exporter, or the directory of a bundle.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="TARGET",
            help="onnxruntime, onnxruntime-cuda, plain, tensorrt or tensorrt-rtx; a bundle's own if not given.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; that of most weights if not given.")] = None,
    sm: Annotated[int | None, typer.Option(help="GPU architecture an engine is built for, such as 89.")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules instead; with --for, those of one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings or rules as JSON.")] = False,
) -> list[dict[str, Any]]:
    """Find what a backend would refuse, compute wrongly or run slowly, before a build does.

    Looks at the graph alone: no weight is read, no GPU and no backend is needed. Exit code 1 when something is found.

    \b
      secateur lint model.onnx --for tensorrt-rtx
      secateur lint BUNDLE
      secateur lint --rules
    """
    from secateur.exporters.lint_files import lint_path, list_rules
    from secateur.tools.console import results

    if rules:
        if graph is not None:
            raise UserError("--rules lists rules and looks at no graph", where=str(graph), fix="leave one of them out")
        refuse_idle("--rules looks at no graph", dtype=dtype, sm=sm)
        listed: list[dict[str, Any]] = [vars(row) for row in list_rules(target)]
        if as_json:
            typer.echo(json.dumps(listed, indent=1))
        else:
            results.print(_draw_rules(listed))
        return listed
    if graph is None:
        raise UserError("no graph is given", where="secateur lint", fix="name an ONNX file or a bundle, or add --rules")
    linted = lint_path(graph, target, dtype, sm)
    facts = [_describe(one) for one in linted]
    if as_json:
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        for one in linted:
            if one.findings:
                results.print(_draw(one))
                results.print()
            else:
                results.print(f"{_title(one)}: nothing found", soft_wrap=True)
    if any(one.findings for one in linted):
        raise typer.Exit(1)
    return facts


def _describe(one: LintedGraph) -> dict[str, Any]:
    return {
        "graph": str(one.path), "for": one.target, "dtype": one.dtype,
        "findings": [
            {"rule": f.rule, "node": f.node, "effect": f.effect, "why": f.what, "fix": f.fix} for f in one.findings
        ],
    }  # fmt: skip


def _title(one: LintedGraph) -> str:
    return f"{one.path.name} for {one.target}, {one.dtype}"


def _draw(one: LintedGraph) -> Table:
    from rich.text import Text

    from secateur.tools.inspect import make_table

    table = make_table("rule", "node", "effect", "why", "fix", title=_title(one))
    for f in one.findings:
        table.add_row(*(Text(text) for text in (f.rule, f.node or "-", f.effect, f.what, f.fix)))
    return table


def _draw_rules(rows: list[dict[str, Any]]) -> Table:
    from rich.text import Text

    from secateur.tools.inspect import make_table

    table = make_table("rule", "for", "effect", "about", title="Rules")
    for row in rows:
        table.add_row(*(Text(t) for t in (row["rule"], ", ".join(row["targets"]), row["effect"], row["about"])))
    return table
