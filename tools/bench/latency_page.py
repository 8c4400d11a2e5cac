"""The latency tables, on the terminal and as a page."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from secateur.tools.bench.accuracy_page import markdown

NAMES = {"prefill": "prefill", "ttft": "first token", "tpot": "next token"}
"""What is shown, by the name in :data:`secateur.tools.measure.TIMES`."""


def table_rows(model: dict[str, Any]) -> list[list[str]]:
    """Header and a line per cell; each time as milliseconds, ratio of times / ratio of FLOPs, and the share saved."""
    header = ["recipe", "keep", "visual tokens"]
    for name in NAMES.values():
        header += [f"{name} ms", "time / FLOPs", "saved"]
    lines = [header]
    if model["cells"]:
        # The unpruned bundle runs beside every pruned one; the spread of its medians shows how steady the machine was.
        line = ["none", "", ""]
        for name in NAMES:
            medians = [cell["unpruned_seconds"][name] * 1e3 for cell in model["cells"]]
            line += [f"{min(medians):.2f} to {max(medians):.2f}", "", ""]
        lines.append(line)
    for cell in model["cells"]:
        line = [cell["recipe"], f"{cell['keep']:g}", ", ".join(str(count) for count in cell["visual_tokens"])]
        for name in NAMES:
            ratio = cell["ratios"][name]
            saved = "" if ratio["saved"] is None else f"{100 * ratio['saved']:.0f} %"
            line += [f"{cell['seconds'][name] * 1e3:.2f}", f"{ratio['time']:.2f} / {ratio['flops']:.2f}", saved]
        lines.append(line)
    return lines


def draw(model: dict[str, Any]) -> Table:
    columns = (0, 1, 3, 4, 5, 6, 7, 9, 10)  # what fits a terminal; the page has all
    header, *lines = [[line[index] for index in columns] for line in table_rows(model)]
    title = f"{model['name']} model ({model['kind']}), medians of {model['repeat']} runs"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
        min_width=len(title),  # a title is wrapped to its table
    )  # fmt: skip
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for line in lines:
        table.add_row(*line)
    return table


def write(report: dict[str, Any]) -> str:
    """The page, whole."""
    machine = report["machine"]
    parts = [
        f"""# Time against FLOPs

Made by `make bench` (`python -m secateur.tools.bench latency`); edits are overwritten.

Measured on {machine["cpu"]}, {machine["cores"]} cores, ONNX Runtime {machine["onnxruntime"]} with
{machine["threads"]} threads, fp32. Every pruned bundle ran in turn with the unpruned one (A B A B); times are medians.
Beside the ratio of times (unpruned over pruned) stands the ratio of FLOPs, scoring included: what the recipe promised.
"Saved" is the share of the saved FLOPs that became saved time, (1 - 1/time ratio) / (1 - 1/FLOPs ratio); it is left out
where less than a tenth of the FLOPs is saved. Visual tokens are those of each run of decoder layers. "First token"
includes preprocessing and the vision tower, which most recipes leave as it is. The line `none` gives the range of the
unpruned bundle's medians over all pairs.
"""
    ]
    for model in report["models"]:
        load = max((cell["load"] for cell in model["cells"]), default=0.0)
        geometry = model["geometry"]
        parts.append(
            f"""## {model["name"].capitalize()} model ({model["kind"]})

{_describe(model["name"])} {geometry["text_tokens"]} text tokens, {geometry["new_tokens"]} new tokens,
{model["repeat"]} runs per cell; load of the machine before the runs at most {load:g}.

{markdown(table_rows(model))}
"""
        )
    return "\n".join(parts)


def _describe(name: str) -> str:
    if name == "demo":
        return "`demo/model`: 196 visual tokens, 8 decoder layers of width 192. At this size fixed costs weigh most."
    return (
        "Random weights, so only the times mean anything: 576 visual tokens, 24 decoder layers of width 896 (14 heads, "
        "2 KV heads, MLP 4864), a tower of 12 layers of width 512."
    )
