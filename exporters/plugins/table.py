"""The kernels as plugins: name, inputs, outputs by shape, the file that holds the kernel, and when one pays."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.exporters.plugins.launch import Launch

DOMAIN = "secateur"
Outputs = Callable[[Sequence[Any], Mapping[str, Any]], list[tuple[str, tuple[Any, ...]]]]
"""(shapes of the inputs, settings) -> (element type, shape) of every output. Sizes may be symbols: they are only put
in another place."""


@dataclass(frozen=True)
class Plugin:
    """One kernel launch as an operator. Its first output is the result; further ones of the greedy kernels are scratch
    that nobody reads, since a plugin has no other workspace. ``optional``: how many of the last inputs may be left out;
    nodes in graphs have none of those. ``settings``: the names in the one attribute of that name, JSON text (numbers
    would be rounded to float32, and several attributes reach a plugin in the order of its parser)."""

    name: str
    file: str
    inputs: tuple[str, ...]
    outputs: Outputs
    settings: tuple[str, ...]
    results: int = 1
    """How many outputs a node has."""
    optional: int = 0
    inserted: bool = True
    """Whether graphs get nodes of it; otherwise it is for :mod:`secateur.exporters.plugins.run` alone."""

    @property
    def ports(self) -> tuple[str, ...]:
        """The inputs of a node."""
        return self.inputs[: len(self.inputs) - self.optional]

    @property
    def module(self) -> Any:
        """The kernel's own module; importing it imports triton."""
        return importlib.import_module(f"secateur.exporters.plugins.{self.file}")

    def launch(
        self, shapes: Sequence[Sequence[int]], dtypes: Sequence[str], settings: Mapping[str, Any], **sizes: int
    ) -> Launch:
        """The launch for inputs of these shapes and element types; ``sizes`` replaces the kernel's own tile."""
        made: Launch = self.module.launch([tuple(s) for s in shapes], tuple(dtypes), dict(settings), **sizes)
        return made


def write_settings(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def read_settings(text: str) -> dict[str, Any]:
    """Undo :func:`write_settings`; a C string's end is no part of the text."""
    settings: dict[str, Any] = json.loads(text.rstrip("\0"))
    return settings


def _fold_outputs(shapes: Sequence[Any], settings: Mapping[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    groups, count, _ = shapes[0]
    return [("i32", (groups, settings["k"])), ("fp32", (groups, count))]


def _take_outputs(shapes: Sequence[Any], settings: Mapping[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    keep = ("i32", (shapes[0][0], settings["k"]))
    return [keep] if len(shapes) < 2 else [keep, ("rows", (shapes[0][0], settings["k"], shapes[1][2]))]


PLUGINS: Mapping[str, Plugin] = {
    p.name: p
    for p in (
        Plugin(
            "RowLogSumExp", "row_log_sum_exp", ("query", "key", "slots"), lambda s, _: [("fp32", tuple(s[0])[:3])],
            ("scale", "causal"), optional=1,
        ),
        Plugin(
            "ColumnSums", "column_sums", ("query", "key", "lse", "last", "slots"),
            lambda s, _: [("fp32", (s[0][0], s[0][1], s[1][2]))], ("scale", "causal"), optional=1,
        ),
        Plugin(
            "LastRows", "last_rows", ("query", "key", "slots"), lambda s, _: [("fp32", (*tuple(s[0])[:3], s[1][2]))],
            ("scale",), optional=1, inserted=False,
        ),
        Plugin("PickByFold", "greedy_fold", ("table", "start", "weight"), _fold_outputs, ("k", "rule", "trade"), 2),
        Plugin(
            "PickByDeterminant", "greedy_determinant", ("table", "score"),
            lambda s, o: [
                ("i32", (s[0][0], o["k"])), ("fp32", (s[0][0], o["k"], s[0][1])), ("fp32", (s[0][0], s[0][1])),
            ],
            ("k",), 3,
        ),
        Plugin(
            "PickByCoverage", "greedy_coverage", ("table", "start", "weight"),
            lambda s, o: [("i32", (s[0][0], o["k"])), *[("fp32", (s[0][0], s[0][1]))] * 2], ("k", "product"), 3,
        ),
        Plugin("RankTake", "rank_take", ("score", "rows"), _take_outputs, ("k",), optional=1),
    )
}  # fmt: skip
"""By the node's operator type. ``PickByFold`` has scratch of N numbers whether it needs it or not."""

LAUNCH_SECONDS = 3e-6
"""A step of a kernel that reads next to nothing: a reduction over a block and a dependent read. Estimated."""
LOOP_SECONDS = 25e-6
"""A step of a loop in an engine: about five launches and what turns the loop. Estimated."""
BLOCK_BYTES = 100e9
"""What one block of threads reads a second, from the second-level cache. Estimated."""


def pays(plugin: str, count: int, k: int) -> bool:
    """Whether one program doing k steps over a table of ``count`` tokens is faster than a loop whose steps have the
    whole GPU. An estimate from the three figures above until ``tools/bench/kernels.py`` has run on a GPU."""
    read = {"PickByFold": 4 * count, "PickByCoverage": 4 * count * count, "PickByDeterminant": 2 * k * count}[plugin]
    return LAUNCH_SECONDS + read / BLOCK_BYTES < LOOP_SECONDS
