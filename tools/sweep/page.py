"""The sweep as one HTML file that needs nothing else: picture, table that sorts, failures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from secateur.tools.sweep.frontier import COLUMNS, Record, flops_left, is_bound, label, table_rows

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 52, 16, 16, 44

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --line: #ccc; --mark: #1f6fb2; --floor: #c0392b;
  --ceiling: #2e8b57; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --paper: #17171b; --line: #444; --mark: #6db3f2;
  --floor: #ff7b6b; --ceiling: #6fd19a; } }
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; } p { margin: .4rem 0; } code { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; margin: 1rem 0; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--mark); }
tr.best td { font-weight: 600; } li { overflow-wrap: anywhere; }
"""

_SCRIPT = """
document.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
  const head = button.closest("th"), body = document.querySelector("tbody");
  const up = head.getAttribute("aria-sort") !== "ascending";
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => {
    const text = row.cells[column].textContent, n = parseFloat(text);
    return isNaN(n) ? text : n;
  };
  const order = (a, b) => a === b ? 0 : a === "" ? 1 : b === "" ? -1 : (a < b) === up ? -1 : 1;
  [...body.rows].sort((a, b) => order(value(a), value(b))).forEach(row => body.append(row));
}));
"""


def write(report: Record) -> str:
    """The page, whole."""
    model = escape(report["model"])
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in COLUMNS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sweep of {model}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{model}: accuracy against FLOPs</h1>
<p>{_explain(report)}</p>
{_draw_svg(report)}
<p>A point is a recipe at one ratio: <b style="color:var(--mark)">●</b> method,
<b style="color:var(--floor)">✕</b> random, <b style="color:var(--ceiling)">▲</b> oracle-keep, ■ unpruned; touch one for
its name. The line joins the cells that no other beats; they are bold in the table. A heading sorts.</p>
<div class="wide"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{_write_rows(report)}
</tbody></table></div>
{_list_failures(report)}
<p>Model SHA-256 <code>{report["model_sha256"]}</code>, data <code>{report["data_sha256"]}</code>.</p>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _explain(report: Record) -> str:
    """What the numbers mean."""
    count, repeat = report["questions"], report["repeat"]
    lines = [
        f"{count} questions of {escape(report['data'])}; an answer is right if its text is the expected one, but for "
        "case, spacing and a final full stop.",
        f"One standard error of an accuracy is at most {50 / count**0.5:.1f} points.",
        "Agreement is the share of questions answered with the unpruned model’s very text.",
        "FLOPs are those of vision and prefill, scoring included.",
        f"Times are medians of {repeat} runs in turn with the unpruned model’s." if repeat else "",
        f"Ratios are <code>--{report['budget']}</code>.",
    ]
    return " ".join(filter(None, lines))


def _list_failures(report: Record) -> str:
    items = [f"<li><code>{escape(f['cell'])}</code>: {escape(f['reason'])}</li>" for f in report["failures"]]
    return f"<h2>Failed</h2><ul>{''.join(items)}</ul>" if items else ""


def _write_rows(report: Record) -> str:
    best = set(report["frontier"])
    lines = []
    for record, row in zip(report["cells"], table_rows(report), strict=True):
        first, *rest = (escape(text) for text in row)
        if record["link"]:
            links = record["link"].split()
            first = f'<a href="{escape(links[0])}" title="{escape(record["title"])}">{first}</a>'
        cells = "".join(f"<td>{text}</td>" for text in (first, *rest))
        lines.append(f"<tr{' class=best' if label(record) in best else ''}>{cells}</tr>")
    return "\n".join(lines)


def _draw_svg(report: Record) -> str:
    records: Sequence[Record] = report["cells"]
    shares, scores = [100 * flops_left(r) for r in records], [100 * r["accuracy"] for r in records]
    across, up = _spread(shares), _spread(scores)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - across[0]) / (across[1] - across[0])

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - up[0]) / (up[1] - up[0])

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="accuracy against FLOPs">']
    for tick in _ticks(*across):
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--line)"/>'
            f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in _ticks(*up):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">FLOPs left, %</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">accuracy, %</text>'
    )
    places = {label(r): (x(share), y(score)) for r, share, score in zip(records, shares, scores, strict=True)}
    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (places[name] for name in report["frontier"]))
    parts.append(f'<polyline points="{line}" fill="none" stroke="var(--mark)" stroke-opacity=".5" stroke-width="2"/>')
    for record, share, score in zip(records, shares, scores, strict=True):
        told = f"<title>{escape(label(record))}: accuracy {score:.1f} %, FLOPs {share:.1f} %</title>"
        parts.append(f"<g>{told}{_draw_mark(record, x(share), y(score))}</g>")
    return "\n".join([*parts, "</svg>"])


def _draw_mark(record: Record, x: float, y: float) -> str:
    if record["row"] == "none":
        return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="var(--ink)"/>'
    if record["row"] == "random":
        return (
            f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10" stroke="var(--floor)" stroke-width="2.5" '
            'fill="none"/>'
        )
    if is_bound(record):
        return f'<path d="M{x:.1f} {y - 6:.1f}l6 11h-12z" fill="var(--ceiling)"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="var(--mark)" fill-opacity=".8"/>'


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: a little more than the values take, and never nothing."""
    low, high = min(values), max(values)
    room = max(0.05 * (high - low), 1.0)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (1, 2, 5, 10, 20, 25, 50, 100) if (high - low) / s <= 8)
    first = int(low // step + 1)
    return [float(step * i) for i in range(first, int(high // step) + 1)]
