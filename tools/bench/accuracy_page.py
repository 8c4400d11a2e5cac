"""The accuracy table, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from secateur.tools.bench import accuracy_bounds
from secateur.tools.inspect import flops_text
from secateur.tools.sweep.cells import ORACLE, ORACLE_COMPACT

Record = dict[str, Any]
CEILING = 0.99
"""What the ceiling at keep 0.5 must reach of the unpruned accuracy; below it the pruning pass is wrong."""
CEILING_KEEP = 0.5
KINDS_KEEP = 0.25


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def grid(records: Sequence[Record]) -> tuple[list[str], list[float], dict[tuple[str, float], Record]]:
    """Rows and keep ratios in the order they first occur, and the records by both."""
    found = {(r["row"], r["ratio"]): r for r in records}
    rows = list(dict.fromkeys(row for row, _ in found))
    keeps = sorted({keep for _, keep in found}, reverse=True)
    return rows, keeps, found


def table_rows(records: Sequence[Record]) -> list[list[str]]:
    """Header and one line per row: accuracy in per cent at each keep ratio."""
    rows, keeps, found = grid(records)
    lines = [["recipe", *(f"{keep:g}" for keep in keeps)]]
    for row in rows:
        cells = [found.get((row, keep)) for keep in keeps]
        lines.append([row, *(percent(cell["accuracy"]) if cell else "" for cell in cells)])
    return lines


def draw(records: Sequence[Record]) -> Table:
    header, *lines = table_rows(records)
    count = records[0]["questions"]
    title = f"Accuracy in % on {count} held-out questions, by share of visual tokens kept"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
        min_width=len(title),  # a title is wrapped to its table
    )  # fmt: skip
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for line in lines:
        table.add_row(*line)
    return table


def judge_ceiling(records: Sequence[Record]) -> str:
    """One line: what share of the unpruned accuracy the ceiling reaches."""
    _, _, found = grid(records)
    whole, ceiling = found.get(("none", 1.0)), found.get((ORACLE, CEILING_KEEP))
    if not whole or not ceiling or not whole["accuracy"]:
        return f"{ORACLE} at {CEILING_KEEP:g} was not compared with the unpruned model."
    share = ceiling["accuracy"] / whole["accuracy"]
    verdict = "as required" if share >= CEILING else "TOO LITTLE: the pruning pass or the model is wrong"
    return (
        f"{ORACLE} at {CEILING_KEEP:g} reaches {percent(share)} % of the unpruned accuracy "
        f"(at least {percent(CEILING)} % wanted): {verdict}."
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    header, *body = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def write(report: Record) -> str:
    """The page, whole."""
    every, geometry = report["cells"], report["geometry"]
    records = [r for r in every if not accuracy_bounds.is_control(r)]
    return f"""# Accuracy against keep ratio

Made by `make bench` (`python -m secateur.tools.bench accuracy`); edits are overwritten.

The demo model (`demo/model`, SHA-256 over its files `{report["model"][:16]}…`) answers {report["questions"]} held-out
questions about scenes it was not trained on, each through a bundle compiled for that recipe and keep ratio and run on
ONNX Runtime. An answer is right if it is the one right word and then ends. The keep ratio is the share of the visual
tokens left after the recipe's last stage. One standard error is at most {_standard_error(report["questions"])} points.

Accuracy in %:

{markdown(table_rows(records))}

`{ORACLE}` is the ceiling: the patches with most ink, which the scene generator knows, are taken from the unpruned
tower's features and enter the pruned decoder, at their original positions or (`{ORACLE_COMPACT}`) numbered anew.
{judge_ceiling(records)}
`none` has no keep ratio to vary. Where a recipe differs from `none` at keep 1, it does more than remove tokens.

![Accuracy against FLOPs](frontier.png)

{accuracy_bounds.write(every)}

## By kind of question, keep {KINDS_KEEP:g}

{markdown(_kind_rows(records))}

## What each cell costs

Visual tokens as layers × tokens, in decoder order; FLOPs of one image and question ({geometry["text_tokens"]} text
tokens), scoring included, and in brackets how many times fewer than unpruned. Fewer FLOPs are not yet less time: see
the latency page.

{markdown(_cost_rows(records))}
"""


def _standard_error(questions: int) -> str:
    return f"{100 * 0.5 / questions**0.5:.1f}"


def _kind_rows(records: Sequence[Record]) -> list[list[str]]:
    rows, _, found = grid(records)
    kinds = list(records[0]["kinds"])
    lines = [["recipe", *(kind.replace("_", " ") for kind in kinds)]]
    for row in rows:
        record = found.get((row, KINDS_KEEP)) or (found.get((row, 1.0)) if row == "none" else None)
        if record:
            lines.append([row, *(percent(record["kinds"][kind]) for kind in kinds)])
    return lines


def _cost_rows(records: Sequence[Record]) -> list[list[str]]:
    lines = [["recipe", "keep", "visual tokens", "vision", "prefill", "decode step", "accuracy"]]
    for record in records:
        if record["row"] in (ORACLE, ORACLE_COMPACT):
            continue
        segments = ", ".join(f"{layers} × {tokens}" for layers, tokens in record["segments"])
        flops, whole = record["flops"], record["unpruned_flops"]
        costs = [f"{flops_text(flops[p])} ({whole[p] / flops[p]:.2f}×)" for p in ("vision", "prefill", "decode")]
        lines.append([record["row"], f"{record['ratio']:g}", segments, *costs, percent(record["accuracy"])])
    return lines
