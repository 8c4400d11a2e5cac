"""The table of what choosing tokens costs, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from secateur.tools.bench.accuracy_page import markdown

BARS = {"slice": 2.0, "greedy": 10.0}
"""Per cent of the unpruned prefill a recipe of each class may add."""
WHY = {
    "zoo_prune": "the published score runs the projector 128 times on every token, which is most of that share; the "
    "signal option `directions` sets how often (measurements.md has the share with 8 instead of 64)",
}
"""What makes a recipe miss its bar, where that is the method's own."""
HEADER = ["recipe", "class", "added, % of prefill", "bar", "stages ms", "prefill ms", "dependent loops", "images"]


def verdict(record: dict[str, Any]) -> str:
    bar = BARS.get(record["class"])
    if bar is None:
        return "none"
    return f"{bar:g} %" if record["share"] * 100 <= bar else f"{bar:g} %, **over**"


def table_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and a line per recipe, the cheapest first."""
    lines = [HEADER]
    for record in sorted(records, key=lambda r: r["share"]):
        line = [record["recipe"], record["class"], f"{100 * record['share']:.2g}", verdict(record)]
        line += [f"{record['stages_seconds'] * 1e3:.1f}", f"{record['prefill_seconds'] * 1e3:.0f}"]
        lines.append([*line, str(record["scans"]), str(record["images"])])
    return lines


def draw(records: Sequence[dict[str, Any]]) -> Table:
    header, *lines = table_rows(records)
    table = Table(title="What choosing tokens adds to prefill", title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index > 1 else "left")
    for line in lines:
        table.add_row(*line)
    return table


def write(report: dict[str, Any]) -> str:
    """The page, whole."""
    machine, records = report["machine"], report["records"]
    over = [r["recipe"] for r in records if "over" in verdict(r)]
    said = "All of them are within their bar." if not over else f"**Over the bar: {', '.join(sorted(over))}.**"
    said += "".join(f"\n`{name}`: {WHY[name]}." for name in sorted(over) if name in WHY)
    load = max((r["load"] for r in records), default=0.0)
    return f"""# What choosing tokens costs

Made by `python -m secateur.tools.bench overhead`; edits are overwritten.

Measured on {machine["cpu"]}, {machine["cores"]} cores, ONNX Runtime {machine["onnxruntime"]} with
{machine["threads"]} threads, fp32; load of the machine before a run at most {load:g}. Random weights: a decoder of 24
layers of width 896 (14 heads, 2 KV heads, MLP 4864: the shape of Qwen2-0.5B) behind a tower of CLIP-L's width (1024,
16 heads) and of {report["tower_layers"]} layers. {report["tokens"]} visual tokens, of which {report["kept"]} are left
after the last stage that leaves any; {report["text_tokens"]} text tokens; batch 1. {said}

**What is counted.** The programs are compiled as always, and every node the inserting passes add to them is taken out
into a graph of its own, with the values it reads as inputs: for scores by attention the taking of the query rows, the
product with all keys and the softmax; projections a stage applies for its signals (recipes that read the next layer's,
or a layer's again); the selector; the merge; the gathering of hidden rows and of rotary tables, or the computing of
new tables. All stages of a recipe, of the vision side and of the decoder, count together. The keys that the next layer
would have computed anyway are counted in full. Not counted is what a fused graph may save or lose around the stages.

**What it is held against.** The unpruned prefill program, from ids and features to logits and caches, without the
vision tower. The stages' graph and the unpruned prefill run in turn; both times are medians, and the share is one over
the other. What pruning saves afterwards is not subtracted.

**Classes.** *slice*: scores by some rows of an attention (the CLS token, the last query, the text), and no step that
waits for the one before. *greedy*: the selector is a loop of dependent steps. *other*: everything else: attention of
all queries, similarities of all pairs, probes of the projector. Bars: {BARS["slice"]:g} % for slice,
{BARS["greedy"]:g} % for greedy, none for other. Recipes that compare frames see {report["frames"]} images of
{report["tokens"] // report["frames"]} tokens, the others one of {report["tokens"]}.

{markdown([[*line[:1], *line[2:], line[1]] for line in table_rows(records)])}
"""
