"""Signals, which the compiled graph and the eager oracle share, against float64 readings of the whole tensors.

The walk is over the table: a new signal, or a new choice of an option, has no reading and fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.compiler.pooled import Pooled
from secateur.passes.signal_table import SIGNALS, Number, Signal, TowerLayers
from secateur.passes.signals import PatchView, SequenceView, make_probes, patch_signals, sequence_signals

from .signal_readings import DECODER, TOWER, Array, Heads, Picture, Row, resized_weights, square_weights

PROJECTIONS = ("previous", "next", "own")
NUMBERS = {"directions": 3, "step": 0.02, "seed": 5}
LAYERS = ["0", "read"]


def choices(signal: Signal, inside: bool) -> list[dict[str, Any]]:
    """Every combination of what a signal's options take at decoder sites, or at the others."""
    found: dict[str, Sequence[Any]] = {}
    for name, option in signal.options.items():
        if isinstance(option, TowerLayers):
            if not inside:
                found[name] = [LAYERS] if option.several else [["read"]]
        elif isinstance(option, Number):
            found[name] = [NUMBERS[name]]
        elif inside or name not in ("projections", "rotary"):
            found[name] = option
    return [dict(zip(found, each, strict=True)) for each in itertools.product(*found.values())]


def agree(found: Tensor, want: Array) -> None:
    assert tuple(found.shape) == want.shape
    assert found.dtype == (torch.float32 if want.dtype == np.float64 else torch.from_numpy(want).dtype)
    np.testing.assert_allclose(found.numpy(), want, rtol=2e-5, atol=2e-6)


def stage_of(name: str, options: Mapping[str, Any], groups: int, length: int) -> Any:
    planned = SimpleNamespace(groups=groups, length_in=length)
    return SimpleNamespace(planned=planned, signals=(name,), signal_options={name: options})


# -- in the decoder ---------------------------------------------------------------------------------------


def draw_row(seed: int, flags: str, pads: int, *, windows: bool, blocks: bool, gaps: bool) -> Row:
    """``flags``: a slot each, "v" a prunable token, "e" a row behind an image, "t" text; ``pads`` at the end."""
    draw = np.random.default_rng(seed)
    length, width = len(flags) + pads, 6
    prunable = np.array([flag == "v" for flag in flags] + [False] * pads)
    image = np.array([flag in "ve" for flag in flags] + [False] * pads)
    positions = np.cumsum(draw.integers(1, 4, length)) - 1 if gaps else np.arange(length)
    count = int(prunable.sum())
    heads = {
        where: Heads(
            *(draw.normal(size=(kinds, length, 3)) for kinds in (4, 2, 2, 4, 2)), 0.4 + 0.2 * at,
            (4, 7, None)[at] if windows else None,
        )
        for at, where in enumerate(PROJECTIONS)
    }  # fmt: skip
    numbers = np.where(image, np.cumsum(np.diff(image, prepend=False) & image) - 1, -1) if blocks else None
    return Row(
        *(draw.normal(size=shape) for shape in ((length, width), (length, width), (2, length, width),
                                                (2, length, width))),
        heads, prunable, image, len(flags) - 1, 2 * count, draw.integers(1, 5, count).astype(float),
        np.sort(draw.choice(2 * count, count, replace=False)), draw.normal(size=count), positions, numbers,
    )  # fmt: skip


def split_evenly(row: Row) -> Row:
    """``source`` as it is where each half of the tokens comes from one half of those that entered."""
    half = row.entered // 2
    row.source = np.concatenate([np.arange(0, half, 2), half + np.arange(0, half, 2)])[: len(row.source)]
    return row


CASES: dict[str, tuple[tuple[str, str], dict[str, bool]]] = {
    "one image and text": (("tvvvvtt", "tttvvvvt"), {}),
    "two images, gaps in the positions": (("vvtvvtt", "tvvvvt"), {"gaps": True}),
    "windows": (("tvvtvvttt", "vvttvvttttt"), {"windows": True}),
    "windows over positions": (("tvvtvvttt", "vvttvvttttt"), {"windows": True, "gaps": True}),
    "blocks": (("tvvtvvtt", "vvvvtt"), {"blocks": True}),
    "blocks through windows": (("tvvvvvvtt", "ttvvvtvvvttt"), {"blocks": True, "windows": True, "gaps": True}),
}
"""Two rows of a batch each, of different length and with images at different places."""


def draw_rows(case: str) -> list[Row]:
    flags, options = CASES[case]
    chosen = {"windows": False, "blocks": False, "gaps": False} | options
    length = max(map(len, flags)) + 1
    return [split_evenly(draw_row(7 + at, own, length - len(own), **chosen)) for at, own in enumerate(flags)]


def view(rows: Sequence[Row], extra_rows: int = 0, question: bool = False) -> SequenceView:
    """The rows as a batch at a site, its raw tensors sliced as their names say."""

    def stack(values: Sequence[Array]) -> Tensor:
        found = torch.from_numpy(np.stack(values))
        return found.float() if found.is_floating_point() else found

    raw = {"normed": stack([row.normed for row in rows])}
    for name, values in (("in", "branch_inputs"), ("out", "branch_outputs")):
        for at, part in enumerate(("attention", "mlp")):
            raw[f"{part}_{name}"] = stack([getattr(row, values)[at] for row in rows])
    scale: dict[str, float] = {}
    window: dict[str, int] = {}
    for where, kind, rotation, part in itertools.product(
        PROJECTIONS, ("query", "key", "value"), ("", "plain_"), ("", "last_", "text_", "visual_")
    ):
        if f"{rotation}{kind}" == "plain_value" or (kind != "query" and part):
            continue
        slots = {
            "": lambda row: range(row.length), "last_": lambda row: [row.last], "text_": lambda row: row.texts,
            "visual_": lambda row: row.tokens,
        }[part]  # fmt: skip
        name = f"{rotation}{part}{kind}_{where}"
        raw[name] = stack([getattr(row.heads[where], f"{rotation}{kind}")[:, list(slots(row))] for row in rows])
        scale[name] = rows[0].heads[where].scale
        if (span := rows[0].heads[where].window) is not None:
            window[name] = span
    behind = torch.tensor([row.last - int(row.image.nonzero()[0][-1]) for row in rows])
    return SequenceView(
        stack([row.hidden for row in rows]), torch.tensor([row.last for row in rows]),
        torch.tensor([row.tokens for row in rows]), torch.tensor([row.texts for row in rows]), raw, scale,
        {name: stack([getattr(row, name) for row in rows]) for name in ("size", "source", "carried")},
        rows[0].entered, extra_rows, None if rows[0].blocks is None else stack([row.blocks for row in rows]),  # type: ignore[misc]
        behind if question else None, window,
        None if (rows[0].positions == np.arange(rows[0].length)).all() else stack([row.positions for row in rows]),
    )  # fmt: skip


def hold_decoder_signal(name: str, options: Mapping[str, Any], rows: Sequence[Row], groups: int, seen: Any) -> None:
    found = sequence_signals(stage_of(name, options, groups, len(rows[0].tokens) // groups), seen)[name]
    want = [DECODER[name](row, group, groups, options) for row in rows for group in range(groups)]
    agree(found, np.stack(want))


def test_every_signal_has_a_reading() -> None:
    inside = {name for name, signal in SIGNALS.items() if "decoder.layer" in signal.sites}
    assert set(DECODER) == inside
    assert set(TOWER) == {name for name, signal in SIGNALS.items() if set(signal.sites) - {"decoder.layer"}}


@pytest.mark.parametrize("case", CASES)
def test_signals_in_the_decoder_are_what_the_table_says(case: str) -> None:
    rows = draw_rows(case)
    seen = view(rows)
    for name in DECODER:
        for options, groups in itertools.product(choices(SIGNALS[name], True), (1, 2)):
            hold_decoder_signal(name, options, rows, groups, seen)


@pytest.mark.parametrize(
    ("flags", "extra_rows", "question"),
    [(("tvvetvvett", "vvevvett"), 1, False), (("tveveett", "tttvevet"), 0, True)],
    ids=["behind every image", "between its tokens"],
)
def test_rows_behind_images_are_no_question(flags: tuple[str, str], extra_rows: int, question: bool) -> None:
    """Where such rows stand between an image's tokens, the site is told how many real rows are behind the last."""
    length = max(map(len, flags)) + 1
    rows = [
        draw_row(at, own, length - len(own), windows=False, blocks=False, gaps=False) for at, own in enumerate(flags)
    ]
    for options in choices(SIGNALS["text_rows"], True):
        hold_decoder_signal("text_rows", options, rows, 1, view(rows, extra_rows, question))


def test_a_stage_that_nothing_was_carried_to_is_shown_nothing() -> None:
    rows = draw_rows("one image and text")
    seen = view(rows)
    stage = stage_of("carried", {}, 1, len(rows[0].tokens))
    assert sequence_signals(stage, replace(seen, state={})) == {}


# -- on the vision side -----------------------------------------------------------------------------------

GRID = (2, 3)
MERGES: dict[str, tuple[Any, Array, tuple[int, int]]] = {
    "patches": (1, np.eye(6), (2, 3)),
    "squares": (2, square_weights(GRID, 2, 2), (4, 6)),
    "pairs": ((1, 2), square_weights(GRID, 1, 2), (2, 6)),
    "resized": (Pooled((3, 5)), resized_weights((3, 5), GRID), (3, 5)),
    "resized to less than half": (Pooled((5, 8)), resized_weights((5, 8), GRID), (5, 8)),
}
"""What the towers of families make tokens of: how the product is told, the weights, and rows and columns of patches."""


def draw_pictures(merge: str, cls: bool, ordered: bool) -> list[Picture]:
    draw = np.random.default_rng(3)
    weights, (rows, columns) = MERGES[merge][1:]
    count, mixing = rows * columns, draw.normal(size=(4, 5))
    order = draw.permutation(count).tolist() if ordered else list(range(count))

    def project(values: Array) -> Array:
        return np.tanh(values @ mixing)  # type: ignore[no-any-return]

    def heads() -> Heads:
        query, key, value = draw.normal(size=(3, 2, int(cls) + count, 4)) * 1.5
        return Heads(query, key, value, query, key, 0.5)

    tokens = GRID[0] * GRID[1]
    return [
        Picture(
            draw.normal(size=(tokens, 6)), {layer: heads() for layer in (0, 2)}, cls, weights, order,
            draw.integers(1, 4, tokens).astype(float), np.sort(draw.choice(9, tokens, replace=False)),
            draw.normal(size=tokens), draw.normal(size=(tokens, 4)), project,
        )
        for _ in range(3)
    ]  # fmt: skip


def single(values: Sequence[Array]) -> Tensor:
    found = torch.from_numpy(np.stack(values))
    return found.float() if found.is_floating_point() else found


def patch_view(images: Sequence[Picture], merge: str, probes: Tensor | None = None) -> PatchView:
    order = tuple(images[0].order)
    plain = order == tuple(range(len(order)))
    return PatchView(
        single([image.tokens for image in images]),
        {
            f"{kind}_{layer}": single([getattr(image.layers[layer], kind) for image in images])
            for kind in ("query", "key", "value") for layer in (0, 2)
        },
        images[0].layers[0].scale, images[0].cls,
        {name: single([getattr(image, name) for image in images]) for name in ("size", "source", "carried")},
        {"projector_inputs": single([image.rows for image in images])} | ({} if probes is None else {"probes": probes}),
        GRID, MERGES[merge][0], () if plain else order,
    )  # fmt: skip


TOWER_CASES = [(merge, cls, ordered) for merge in MERGES for cls, ordered in ((0, 0), (1, 0), (0, 1))]
"""Towers with CLS keep their patches row by row."""


@pytest.mark.parametrize(("merge", "cls", "ordered"), TOWER_CASES)
def test_signals_of_the_tower_are_what_the_table_says(merge: str, cls: int, ordered: int) -> None:
    images = draw_pictures(merge, bool(cls), bool(ordered))
    for name in TOWER:
        if name.startswith("cls_") and not cls:
            continue
        for options in choices(SIGNALS[name], False):
            hold_tower_signal(name, options, images, merge)


def hold_tower_signal(name: str, options: Mapping[str, Any], images: Sequence[Picture], merge: str) -> None:
    layers = (0, 2) if "layers" in options else (2,) if "layer" in options else ()
    probes = None
    if name == "probe_slopes":
        moved = make_probes(single([image.rows for image in images]), *(options[n] for n in NUMBERS))
        probes = single([images[0].project(rows) for rows in moved.double().numpy()])
    stage = stage_of(name, options, len(images), GRID[0] * GRID[1])
    found = patch_signals(stage, patch_view(images, merge, probes), {name: layers})[name]
    want = np.stack([TOWER[name](image, layers, options) for image in images])
    if name == "probe_slopes":
        np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=2e-4)  # differences of float32 over 0.04
        return
    agree(found, want)
