"""The cells no other cell beats, as data, as a table and as a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]
COLUMNS = (
    "recipe",
    "ratio",
    "accuracy %",
    "agreement %",
    "FLOPs left %",
    "prefill ms",
    "prefill faster",
    "both faster",
)

_log = logging.getLogger(__name__)


def flops_left(record: Record) -> float:
    """FLOPs of vision and prefill over those of the unpruned model."""
    own, whole = record["flops"], record["unpruned_flops"]
    left: float = (own["vision"] + own["prefill"]) / (whole["vision"] + whole["prefill"])
    return left


def label(record: Record) -> str:
    return "none" if record["row"] == "none" else f"{record['row']} {record['ratio']:g}"


def is_bound(record: Record) -> bool:
    """Whether a cell is a point of comparison, not a method."""
    return str(record["row"]).startswith("oracle-keep") or record["row"] == "random"


def find_frontier(records: Sequence[Record]) -> list[str]:
    """Labels of the cells, oracles aside, than which none has fewer FLOPs and at least the accuracy; cheapest first."""
    found: list[Record] = []
    for record in sorted(records, key=lambda r: (flops_left(r), -r["accuracy"])):
        if str(record["row"]).startswith("oracle-keep"):
            continue
        if not found or record["accuracy"] > found[-1]["accuracy"]:
            found.append(record)
    return [label(record) for record in found]


def table_rows(report: Record) -> list[list[str]]:
    """A line per cell, in the order of :data:`COLUMNS`; what was not measured is empty."""
    rows = []
    for record in report["cells"]:
        times = record["times"]
        rows.append([
            record["row"], "" if record["row"] == "none" else f"{record['ratio']:g}",
            f"{100 * record['accuracy']:.1f}",
            "" if record["agreement"] is None else f"{100 * record['agreement']:.1f}",
            f"{100 * flops_left(record):.1f}",
            f"{1e3 * times['seconds']['prefill']:.2f}" if times else "",
            f"{times['ratio']['prefill']:.2f}×" if times else "",
            f"{times['ratio']['both']:.2f}×" if times else "",
        ])  # fmt: skip
    return rows


def draw(report: Record) -> Table:
    from secateur.tools.inspect import make_table

    title = f"{report['model']} on {report['questions']} questions of {report['data']}, ratios are --{report['budget']}"
    table = make_table(*COLUMNS, title=title)
    table.columns[0].min_width = 20
    for column in table.columns[1:]:
        column.justify = "right"
    best = set(report["frontier"])
    for row, record in zip(table_rows(report), report["cells"], strict=True):
        table.add_row(*row, style="bold" if label(record) in best else None)
    return table


def check_plot() -> None:
    """Say before anything is measured that there will be no picture."""
    if find_spec("matplotlib") is None:
        _log.warning("matplotlib is not installed: no frontier.png; pip install 'secateur[sweep]' and run this again")


def plot(report: Record, path: Path) -> list[str]:
    """Accuracy against FLOPs as a PNG; the names of the files written, none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = report["cells"]
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups = {
        "recipes": [r for r in records if not is_bound(r) and r["row"] != "none"],
        "random": [r for r in records if r["row"] == "random"],
        "oracle-keep": [r for r in records if str(r["row"]).startswith("oracle-keep")],
        "unpruned": [r for r in records if r["row"] == "none"],
    }
    looks = {"recipes": ("o", "tab:blue"), "random": ("x", "tab:red"), "oracle-keep": ("^", "tab:green"),
             "unpruned": ("s", "black")}  # fmt: skip
    for name, group in groups.items():
        marker, colour = looks[name]
        if group:
            axes.scatter(*_points(group), marker=marker, color=colour, label=name, s=28, zorder=3)
    best = [next(r for r in records if label(r) == name) for name in report["frontier"]]
    axes.step(*_points(best), where="post", color="tab:blue", alpha=0.4, label="frontier", zorder=2)
    for record in best:
        axes.annotate(label(record), (100 * flops_left(record), 100 * record["accuracy"]), fontsize=7,
                      xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axes.set_xlabel("vision and prefill FLOPs, % of unpruned")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{report['model']}: {report['questions']} questions of {report['data']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path)
    return [path.name]


def _points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    return [100 * flops_left(r) for r in records], [100 * r["accuracy"] for r in records]
