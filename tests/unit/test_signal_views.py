"""Signals from a view with numbers of our own: in which type they are made, and how far a window reaches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.passes.signal_table import SIGNALS
from secateur.passes.signals import (
    PatchView,
    Raw,
    SequenceView,
    list_tower_raws,
    patch_signals,
    raws_of,
    sequence_signals,
    tower_raw,
)

BATCH, GROUPS, EACH, HEADS, KEY_HEADS, WIDTH, DEEP = 2, 2, 3, 4, 2, 8, 32
COLUMNS = torch.tensor([[1, 2, 3, 6, 7, 8], [0, 1, 2, 4, 5, 6]])
LENGTH = 11
LAST = torch.tensor([10, 8])
TEXTS = torch.tensor([[0, 4, 5, 9, 10], [3, 7, 8, 9, 10]])
POSITIONS = torch.tensor([[0, 1, 4, 5, 9, 10, 11, 12, 13, 17, 18], [0, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]])


def stage_that_reads(name: str, **options: Any) -> Any:
    known = {option: choices[0] for option, choices in SIGNALS[name].options.items() if isinstance(choices, tuple)}
    numbers = {o: n.default for o, n in SIGNALS[name].options.items() if hasattr(n, "default")}
    return SimpleNamespace(
        planned=SimpleNamespace(groups=GROUPS, length_in=EACH), signals=(name,),
        signal_options={name: {**known, **numbers, **options}},
    )  # fmt: skip


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def make_raw(part: Raw, seed: int) -> Tensor:
    if part.kind == "normed" or part.kind.endswith(("_in", "_out")):
        return draw(BATCH, LENGTH, DEEP, seed=seed)
    rows = {"all": LENGTH, "last": 1, "text": TEXTS.shape[1], "visual": COLUMNS.shape[1]}[part.rows]
    heads = HEADS if "query" in part.kind else KEY_HEADS
    return draw(BATCH, heads, rows, WIDTH, seed=seed)


def view(stage: Any, dtype: torch.dtype, **more: Any) -> SequenceView:
    parts = raws_of(stage, stage.signals[0])
    raw = {part.name: make_raw(part, 1 + index).to(dtype) for index, part in enumerate(parts)}
    state = {
        "carried": draw(BATCH, GROUPS * EACH, seed=7).float(), "size": torch.ones(BATCH, GROUPS * EACH),
        "source": torch.arange(GROUPS * EACH).expand(BATCH, -1),
    }  # fmt: skip
    return SequenceView(
        draw(BATCH, LENGTH, DEEP, seed=9).to(dtype), LAST, COLUMNS, TEXTS, raw,
        {part.name: 0.3 for part in parts}, state, GROUPS * EACH, **more,
    )  # fmt: skip


def every_choice(name: str) -> list[dict[str, str]]:
    """The signal with its defaults, and with each other choice of each option."""
    options = {o: choices for o, choices in SIGNALS[name].options.items() if isinstance(choices, tuple)}
    return [{}, *({option: choice} for option, choices in options.items() for choice in choices[1:])]


IN_DECODER = [name for name, signal in SIGNALS.items() if "decoder.layer" in signal.sites]
AT_TOWER = [
    name for name, signal in SIGNALS.items() if set(signal.sites) & {"vision.layer", "vision.out", "projector.out"}
]


def test_every_signal_is_looked_at() -> None:
    assert set(IN_DECODER) | set(AT_TOWER) == set(SIGNALS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), [(name, o) for name in IN_DECODER for o in every_choice(name)])
def test_signals_of_half_precision_are_made_in_float32(name: str, options: dict[str, str], dtype: torch.dtype) -> None:
    """Bit by bit what the same numbers give when they arrive in float32."""
    stage = stage_that_reads(name, **options)
    seen = view(stage, dtype)
    wide = view(stage, dtype)
    wide = SequenceView(
        wide.hidden.float(), LAST, COLUMNS, TEXTS, {n: t.float() for n, t in wide.raw.items()}, wide.scale, wide.state,
        wide.entered,
    )  # fmt: skip
    found, want = sequence_signals(stage, seen)[name], sequence_signals(stage, wide)[name]
    assert found.dtype == want.dtype
    assert found.dtype in (torch.float32, torch.int64, torch.bool)
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), [(name, o) for name in AT_TOWER for o in every_choice(name)])
def test_a_towers_signals_of_half_precision_are_made_in_float32(
    name: str, options: dict[str, str], dtype: torch.dtype
) -> None:
    stage = stage_that_reads(name, **options)
    layers = {name: (0, 1) if name.endswith("_layers") else (1,)}
    made = []
    for wide in (False, True):

        def give(*shape: int, seed: int, wide: bool = wide) -> Tensor:
            value = draw(*shape, seed=seed).to(dtype)
            return value.float() if wide else value

        raw = {
            tower_raw(kind, layer): give(GROUPS, HEADS, 1 + EACH * 2, WIDTH, seed=3 * layer + len(kind))
            for kind, layer in list_tower_raws(stage, layers)
        }
        probes = 2 * int(stage.signal_options[name].get("directions", 1)) * GROUPS
        extra = {"projector_inputs": give(GROUPS, 6, WIDTH, seed=20), "probes": give(probes, 6, DEEP, seed=21)}
        state = {"carried": draw(GROUPS, 6, seed=5).float(), "size": torch.ones(GROUPS, 6),
                 "source": torch.arange(6).expand(GROUPS, 6)}  # fmt: skip
        tokens = give(GROUPS, 6, DEEP, seed=30)
        made.append(patch_signals(stage, PatchView(tokens, raw, 0.3, True, state, extra, (2, 3)), layers)[name])
    assert made[0].dtype == made[1].dtype
    assert made[0].dtype in (torch.float32, torch.int64)
    assert torch.equal(*made)


# -- windows ----------------------------------------------------------------------------------------------

ROWS = {"last_query": LAST[:, None], "text_query": TEXTS, "visual_query": COLUMNS,
        "query": torch.arange(LENGTH).expand(BATCH, LENGTH)}  # fmt: skip


def read_attention(stage: Any, seen: SequenceView, window: int) -> Tensor:
    """Float64 ``[B,H,R,L]``; who sees whom is transformers' own rule, row by row and key by key."""
    from transformers.masking_utils import sliding_window_overlay

    query, key = raws_of(stage, stage.signals[0])
    near, slots = sliding_window_overlay(window), ROWS[query.kind]
    numbers = torch.arange(LENGTH).expand(BATCH, LENGTH) if seen.positions is None else seen.positions
    keys = seen.raw[key.name].double().repeat_interleave(HEADS // KEY_HEADS, 1)
    logits = seen.raw[query.name].double() @ keys.transpose(2, 3) * seen.scale[query.name]
    for batch in range(BATCH):
        for row, slot in enumerate(slots[batch].tolist()):
            for other in range(LENGTH):
                own, its = numbers[batch, slot], numbers[batch, other]
                if other > slot or not bool(near(0, 0, own, its)):  # type: ignore[arg-type]
                    logits[batch, :, row, other] = float("-inf")
    return torch.softmax(logits, -1)


def by_groups(attention: Tensor) -> Tensor:
    """``[B,H,...,V]`` -> ``[B*groups,H,...,V/groups]``, column by column."""
    return torch.stack([attention[b, ..., g * EACH : (g + 1) * EACH] for b in range(BATCH) for g in range(GROUPS)])


def at(attention: Tensor, slots: Tensor) -> Tensor:
    return torch.stack([attention[b][..., slots[b]] for b in range(BATCH)])


READ = {
    "last_query_attention": lambda a: by_groups(at(a, COLUMNS)[:, :, 0]),
    "text_attention": lambda a: by_groups(at(a, COLUMNS)),
    "text_to_text_attention": lambda a: at(a, TEXTS).repeat_interleave(GROUPS, 0),
    "self_attention": lambda a: torch.stack(
        [at(a, COLUMNS)[b, :, g * EACH : (g + 1) * EACH, g * EACH : (g + 1) * EACH]
         for b in range(BATCH) for g in range(GROUPS)]
    ),
    "received_attention": lambda a: by_groups(
        at(torch.stack([a[b, :, : LAST[b] + 1].mean(1) for b in range(BATCH)]), COLUMNS)
    ),
}  # fmt: skip


def test_every_signal_of_attention_is_read_with_a_window() -> None:
    attends = {n for n in IN_DECODER if len(raws_of(stage_that_reads(n), n)) == 2 and "branch" not in n}
    assert attends == set(READ) | {"attention_logits"}


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["slots", "positions"])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 18, 19])
@pytest.mark.parametrize("name", READ)
def test_windows_reach_as_far_as_transformers_own(name: str, window: int, positions: Tensor | None) -> None:
    """5 and 18 are distances that occur, so that a key at either edge decides."""
    stage = stage_that_reads(name)
    query = raws_of(stage, name)[0].name
    seen = view(stage, torch.float32, window={query: window}, positions=positions)
    found, want = sequence_signals(stage, seen)[name], READ[name](read_attention(stage, seen, window))
    real = torch.ones_like(want, dtype=torch.bool)
    if name in ("text_attention", "text_to_text_attention"):  # rows of padding say nothing
        real = (LAST[:, None] >= TEXTS).repeat_interleave(GROUPS, 0)[:, None, :, None].expand_as(want)
        if name == "text_to_text_attention":
            assert found.shape == want.shape
    torch.testing.assert_close(found[real].double(), want[real], rtol=0, atol=1e-6)
    assert torch.equal(found[real] == 0, want[real] == 0), "what is outside is outside"


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["slots", "positions"])
def test_logits_outside_a_window_are_none(positions: Tensor | None) -> None:
    stage = stage_that_reads("attention_logits")
    query = raws_of(stage, "attention_logits")[0].name
    seen = view(stage, torch.float32, window={query: 5}, positions=positions)
    found = sequence_signals(stage, seen)["attention_logits"]
    want = read_attention(stage, seen, 5).repeat_interleave(GROUPS, 0)
    real = (torch.arange(LENGTH) <= LAST[:, None]).repeat_interleave(GROUPS, 0)
    hidden = torch.isneginf(found) | ~real[:, None, None]
    assert torch.equal(hidden, (want == 0) | ~real[:, None, None])
