"""A bundle's forecast on the command line: the options that go with it, and its table."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.runtime.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

DeviceMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of the GPU the bundle is for, such as 24GiB: refuse what would not fit into it.",
    ),
]
IgnoreForecast = Annotated[
    bool, typer.Option("--ignore-forecast", help="Go on where the forecast says that memory or disk will not do.")
]
_UNITS = {"": 1, **{unit: 1024**i for i, unit in enumerate(("kib", "mib", "gib", "tib"), 1)},
          **{unit: 1000**i for i, unit in enumerate(("kb", "mb", "gb", "tb"), 1)}}  # fmt: skip


def read_bytes(text: str | None, where: str) -> int | None:
    """``24GiB``, ``80 GB`` or a plain number in bytes; None for None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise UserError(f"{text!r} is no size", where=where, fix="give 24GiB, 80GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def show_forecast(needs: Any) -> None:
    """Print the forecast where progress is shown; nothing under --quiet."""
    from secateur.tools.console import notes

    if logging.getLogger("secateur").isEnabledFor(logging.INFO):
        notes.print(draw_forecast(needs))


def draw_forecast(needs: Any) -> Table:
    """A column for each geometry, and where there are several one for all of them."""
    from secateur.runtime.sizes import size_text
    from secateur.tools.inspect import make_table

    count = len(needs.geometries)
    titles = [f"geometry {number}" for number in range(count)] if count > 1 else ["bytes"]
    table = make_table("what", *titles, *(["all"] * (count > 1)), title=f"Forecast for {needs.target}")
    parts = {"caches": "caches", "activations": "activations", "buffers": "inputs and outputs"}
    named = "engines" if needs.engine_weights else "graphs"
    rows: list[tuple[str, list[int], int | None]] = [
        (named, [one.engines for one in needs.geometries], needs.engines or needs.graphs),
        ("weights on the device", [one.weights for one in needs.geometries], needs.weights),
        *((title, [getattr(one, part) for one in needs.geometries], None) for part, title in parts.items()),
        ("device memory", [one.device for one in needs.geometries], needs.device),
    ]
    for title, each, together in rows:
        total = [size_text(together) if together is not None else ""] if count > 1 else []
        table.add_row(title, *map(size_text, each), *total)
    for title, size in (("memory to compile", needs.host), ("disk", needs.disk)):
        table.add_row(title, *[""] * (count if count > 1 else 0), size_text(size))
    return table
