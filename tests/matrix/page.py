"""``docs/matrix.md``: a line per row and layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.compiler.parity import KINDS, TOLERANCE
from secateur.tools.bench.accuracy_page import markdown

from . import engine_tables
from .cells import FRAMES, SEVERAL, Layout
from .layouts import (
    AUDIO_LAYERS,
    DECODER_LAYERS,
    FEW_DECODER_LAYERS,
    FEW_TOWER_LAYERS,
    LAYOUTS,
    SIDE_PATCHES,
    TOWER_LAYERS,
)
from .work import QUESTIONS

HEADER = [
    "recipe", "layout", "kept equal", "ties", "different", "features", "hidden", "cache", "logits", "keep 1.0",
]  # fmt: skip
Record = dict[str, Any]


def table_rows(records: Sequence[Record]) -> list[list[str]]:
    """Header and a line per (row, layout) that was compared, in the order cells come."""
    pairs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["cell"]["kind"] != "engine":
            pairs.setdefault((record["cell"]["recipe"], record["cell"]["layout"]), []).append(record)
    return [HEADER, *([*pair, *_figures(found)] for pair, found in pairs.items())]


def _figures(records: Sequence[Record]) -> list[str]:
    compared = [r["outcome"] for r in records if r["cell"]["kind"] == "parity"]
    figures = [str(sum(o.get(n, 0) for o in compared)) for n in ("chose_equally", "tied", "chose_differently")]
    for kind in KINDS:
        known = [o[kind] for o in compared if kind in o and (kind != "hidden" or "hidden" in o["scales"])]
        figures.append(f"{max(known):.1e}" if known else "")
    if any("error" in o for o in compared):
        figures[0] += " **(failed)**"
    return [*figures, _verdict(records, "identity")]


def _verdict(records: Iterable[Record], kind: str) -> str:
    found = [r["outcome"] for r in records if r["cell"]["kind"] == kind]
    if not found:
        return ""
    worst = [o["logits"] for o in found if "logits" in o]
    return f"{max(worst):.1e}" if worst and all(o["passed"] for o in found) else "**failed**"


def failures(records: Iterable[Record]) -> list[str]:
    """A line per cell that failed: what it is, and what was wrong."""
    return [f"{r['name']}: {_reason(r['outcome'])}" for r in records if r["outcome"]["passed"] is False]


def _reason(outcome: Mapping[str, Any]) -> str:
    if "error" in outcome:
        return str(outcome["error"])
    said = []
    if outcome.get("chose_differently"):
        said.append(f"{outcome['chose_differently']} rows chose differently ({', '.join(outcome['mismatches'][:4])})")
    said += outcome.get("incomparable", [])[:4]
    said += [f"{kind} differ by {outcome[kind]:.2e}" for kind in KINDS if outcome.get(kind, 0.0) > TOLERANCE]
    if outcome.get("same_tokens") != outcome.get("steps"):
        said.append(f"{outcome['same_tokens']} of {outcome['steps']} tokens are those of the unpruned model")
    for name, program in outcome.get("programs", {}).items():
        said += [f"{name}: {line}" for line in (*program["warnings"], *program["lint"], *program["unlike"])]
    return "; ".join(said) or "failed"


def _describe(layout: Layout) -> str:
    said = f"`{layout.name}`: {layout.title}."
    if layout.media:
        said += f" A prompt holds {layout.geometry().media}."
    if layout.axes:
        said += " Position ids have three axes."
    if layout.rows:
        said += f" Rows compared: {', '.join(layout.rows)}."
    return said


def write(records: Sequence[Record], skipped: Mapping[tuple[str, str], str], missing: int = 0) -> str:
    """The page. ``missing``: how many cells have not been run."""
    failed = failures(records)
    unbuilt = sum(r["outcome"]["passed"] is None for r in records)
    every = "Every cell that was run" if missing else "Every cell"
    verdict = f"{every} is within the bar." if not failed else f"**{len(failed)} cells are not within the bar.**"
    if unbuilt:
        verdict += f" **{unbuilt} engines were not built, because the library is not installed.**"
    if missing:
        verdict += f" **{missing} more were not run; what would show them is left empty.**"
    listed = "".join(f"\n* {line}" for line in failed)
    layouts = "\n".join(f"* {_describe(layout)}" for layout in LAYOUTS.values())
    return f"""# Every row on every layout

Made by `make test-matrix`; edits are overwritten. {len(records)} cells. {verdict}
{listed}

Tiny models whose weights are random numbers from a seed: they show that a bundle computes what the eager model
computes, not how well a recipe does. Pixels and sound are noise. {TOWER_LAYERS} tower layers and {DECODER_LAYERS}
decoder layers; {FEW_TOWER_LAYERS} and {FEW_DECODER_LAYERS} in layouts that have a few rows, and {AUDIO_LAYERS} layers
that hear. Where nothing else is said a prompt holds an image of {SIDE_PATCHES}x{SIDE_PATCHES} visual tokens, {SEVERAL}
of them in a batch, and every row of the table is compared that applies. Rows that read learned weights get random ones.

{layouts}

## Against the oracle

Each row is compiled at keep 0.5 and 0.1, for batches of 1 and 3, for {FRAMES} images as well where it compares or
shares between them, and for {SEVERAL} in a batch of 1 where it takes them apart in the decoder. {QUESTIONS} questions
of different lengths go through the ONNX Runtime bundle and through the eager oracle. *Kept equal*, *ties* and
*different* count questions over all of these: every stage kept the oracle's tokens; scores that met within rounding
explain the choice; anything else. The next four columns are the largest absolute differences with the choice held
equal: projected features, hidden rows each decoder stage leaves, keys and values of all layers, logits after the prompt
and two forced tokens. The bar is no different choice and {TOLERANCE:g}. *keep 1.0*: where a row keeps all tokens
unchanged at that ratio, and does not number them anew where positions have several axes, the largest difference of its
logits from the unpruned model's, whose most likely tokens must be the same.

{markdown(table_rows(records))}

{engine_tables.write(records, skipped)}"""
