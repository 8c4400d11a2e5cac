"""The part of ``docs/matrix.md`` on engines: which rows build for which layouts, and as which fused layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

from secateur.tools.bench.accuracy_page import markdown

from .cells import ENGINE_DTYPES
from .fused import NAMES
from .layouts import LAYOUTS

Record = dict[str, Any]
BUILT, UNBUILT, FAILED = "✓", "–", "**✗**"


def grid(records: Sequence[Record], skipped: Mapping[tuple[str, str], str]) -> list[list[str]]:
    """A line per row of the table and a column per layout: built in both types, in one, or not; a letter where the
    row does not apply, whose reason :func:`list_reasons` gives."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        if record["cell"]["kind"] == "engine":
            found = cells.setdefault((record["cell"]["recipe"], record["cell"]["layout"]), {})
            found[record["cell"]["dtype"]] = record["outcome"]["passed"]
    letters = _letters(skipped)
    recipes = dict.fromkeys(recipe for recipe, _ in (*cells, *skipped))
    layouts = [name for name in LAYOUTS if any(layout == name for _, layout in (*cells, *skipped))]

    def mark(pair: tuple[str, str]) -> str:
        if pair in skipped:
            return letters[skipped[pair]]
        return _mark(cells[pair]) if pair in cells else ""

    return [["recipe", *layouts], *([recipe, *(mark((recipe, layout)) for layout in layouts)] for recipe in recipes)]


def _mark(passed: Mapping[str, bool | None]) -> str:
    if all(passed.get(dtype) for dtype in ENGINE_DTYPES):
        return BUILT
    said = {True: BUILT, None: UNBUILT, False: FAILED}
    return ", ".join(f"{dtype} {said[result]}" for dtype, result in sorted(passed.items(), reverse=True))


def list_reasons(skipped: Mapping[tuple[str, str], str]) -> str:
    return "\n".join(f"* {letter}: {why}" for why, letter in _letters(skipped).items())


def _letters(skipped: Mapping[tuple[str, str], str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(skipped.values()), ascii_lowercase, strict=False))


def layers(records: Sequence[Record]) -> list[list[str]]:
    """A line per layout and stack of layers: what each of its layers became without a recipe. An engine whose layers
    are others has not passed."""
    lines = [["layout", "stack", "layers", *NAMES.values()]]
    for record in records:
        cell = record["cell"]
        if (cell["kind"], cell["recipe"], cell["dtype"]) != ("engine", "none", ENGINE_DTYPES[0]):
            continue
        programs = record["outcome"].get("programs", {})
        # Prefill and decode have the same decoder; where that were not so, both lines would stand here.
        found = {
            json.dumps([stack, counts]) for program in programs.values() for stack, counts in program["fused"].items()
        }
        for stack, counts in sorted(map(json.loads, found), key=lambda line: ("cache update" in line[1], line[0])):
            lines.append(
                [cell["layout"], f"`{stack}`", str(counts["layers"]), *(_span(counts, n) for n in NAMES.values())]
            )
    return lines


def _span(counts: Mapping[str, Any], name: str) -> str:
    least, most = counts.get(name, (0, 0))
    return "" if not most else str(least) if least == most else f"{least} to {most}"


def write(records: Sequence[Record], skipped: Mapping[tuple[str, str], str]) -> str:
    """The section, with its heading; empty where no engine was asked for."""
    engines = [record for record in records if record["cell"]["kind"] == "engine"]
    if not engines:
        return ""
    library = sorted({r["outcome"]["library"] for r in engines if "library" in r["outcome"]})
    return f"""## Engines

{len(engines)} cells: every program of every row that applies to a layout, at the row's published keep ratio and a batch
of 2, through {", ".join(library) or "TensorRT-RTX, which is not installed"}. {BUILT}: in {" and ".join(ENGINE_DTYPES)}
all of its programs become engines without a warning, the linter finds nothing, and every layer of the model becomes the
same fused layers as without a recipe, pruned or not, which are those the modules of the Hugging Face model ask for.
`fastv_omni`'s published ratio is a mean over layers that a shallow decoder cannot reach; it keeps 0.1 here.

{markdown(grid(engines, skipped))}

Where a letter stands the row does not apply:

{list_reasons(skipped)}

Fused layers that each layer becomes, as TensorRT's parser makes them (RMS normalisation has no type of its own there:
the arithmetic that stems from one node is counted once). Layers of a tower that attend in windows can be several
attentions.

{markdown(layers(engines))}
"""
