"""What two runs do not both give, or give in different shapes, is a failure that says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.compiler.inputs import RowInput
from secateur.compiler.oracle import RowRun
from secateur.compiler.parity import (
    ALWAYS,
    KINDS,
    Parity,
    compare_row,
    compare_runs,
    expected_kinds,
    without_infinity,
)
from secateur.passes.recipes import RECIPES
from secateur.tools.parity import passed
from secateur.tools.verify import _draw

ITEM = RowInput([1, 2], None, ())  # type: ignore[arg-type]  # nothing reads the pixels


def row() -> RowRun:
    """Two layers, the second shorter, one stage, two steps."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return RowRun(
        kept={"stage0": torch.tensor([0, 2])}, hidden={"stage0": some(5, 4)}, features=some(3, 4),
        keys=[some(2, 7, 4), some(2, 5, 4)], values=[some(2, 7, 4), some(2, 5, 4)], logits=[some(9), some(9)],
    )  # fmt: skip


def compare(ours: RowRun, theirs: RowRun, **how: Any) -> Parity:
    found = Parity(expects=KINDS)
    compare_row(ITEM, ((False, ours), (True, theirs)), found, None, **how)
    return found


def shorten(name: str) -> RowRun:
    """A row whose every tensor of a field has one row less."""
    value = getattr(row(), name)
    if isinstance(value, Tensor):
        return replace(row(), **{name: value[:-1]})
    if isinstance(value, dict):
        return replace(row(), **{name: {key: one[:-1] for key, one in value.items()}})
    return replace(row(), **{name: [one[..., :-1] if one.dim() == 1 else one[..., :-1, :] for one in value]})


def drop(name: str) -> RowRun:
    return replace(row(), **{name: type(getattr(row(), name))() if name != "features" else torch.empty(0)})


def drop_last(name: str) -> RowRun:
    return replace(row(), **{name: getattr(row(), name)[:-1]})


def add(name: str) -> RowRun:
    value = getattr(row(), name)
    more = {**value, "stage1": value["stage0"][:1] * 0} if isinstance(value, dict) else [*value, value[-1]]
    return replace(row(), **{name: more})


# What is compared of a row, and what each is called; the rest of the fields say how the row came about.
COMPARED = {
    "kept": ["kept.stage0"], "hidden": ["hidden.stage0"], "features": ["features"], "keys": ["key.0", "key.1"],
    "values": ["value.0", "value.1"], "logits": ["logits.0", "logits.1"],
}  # fmt: skip
NOT_COMPARED = {"score", "signals", "sizes", "planes", "omits"}


def test_every_field_of_a_row_is_compared_or_named_here() -> None:
    assert {one.name for one in fields(RowRun)} == set(COMPARED) | NOT_COMPARED
    assert {f"kept.{stage}" for stage in row().kept} | set(row().tensors()) == {
        name for names in COMPARED.values() for name in names
    }


def test_equal_rows_pass() -> None:
    found = compare(row(), row())
    assert (found.passed, found.complete, found.incomparable, found.worst[1]) == (True, True, {}, 0.0)
    assert set(found.scales) == set(KINDS)


CHANGES: list[tuple[Callable[[str], RowRun], tuple[str, ...]]] = [
    (shorten, tuple(COMPARED)), (drop, tuple(COMPARED)), (drop_last, ("keys", "values", "logits")),
    (add, ("kept", "hidden", "keys", "values", "logits")),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name"), [(change, name) for change, names in CHANGES for name in names])
@pytest.mark.parametrize("second", [False, True])
def test_another_shape_or_a_missing_tensor_fails(change: Callable[[str], RowRun], name: str, second: bool) -> None:
    changed = change(name)
    found = compare(row(), changed) if second else compare(changed, row())
    assert not found.passed
    assert not found.complete
    if change in (shorten, drop):
        assert set(COMPARED[name]) <= set(found.incomparable)
    assert found.incomparable
    assert all(line.endswith("(row 0)") for line in found.incomparable.values())
    if name != "kept":
        assert not found.computed_equally
        kind = {"keys": "cache", "values": "cache"}.get(name, name)
        assert found.kind(kind).largest == found.worst[1] == float("inf")


def test_both_shapes_are_said() -> None:
    found = compare(row(), shorten("keys"))
    assert found.say_incomparable() == [
        "key.0: [2, 6, 4] in the second run, [2, 7, 4] in the first (row 0)",
        "key.1: [2, 4, 4] in the second run, [2, 5, 4] in the first (row 0)",
    ]
    missing = compare(row(), drop_last("values"))
    assert missing.say_incomparable() == ["value.1: nothing in the second run, [2, 5, 4] in the first (row 0)"]
    assert compare(row(), drop("kept")).say_incomparable() == [
        "kept.stage0: 2 tokens in the first run, no choice in the second (row 0)"
    ]
    assert "unlike   key.1: [2, 4, 4] in the second run" in _draw(found.as_json())
    assert "NOT equal" in _draw(found.as_json())


@pytest.mark.parametrize("name", ["hidden", "keys", "values", "logits", "kept"])
def test_what_a_run_says_it_omits_is_no_failure(name: str) -> None:
    said = {"keys": "key", "values": "value", "kept": "kept.stage0"}.get(name, name)
    less = replace(drop(name), omits=frozenset({said}))
    for found in (compare(row(), less), compare(less, row())):
        assert found.incomparable == {}
        kind = {"keys": "cache", "values": "cache"}.get(name, name)
        assert found.complete == (kind in found.scales or name == "kept"), "a kind that is expected must come up"
    part = replace(drop_last("logits"), omits=frozenset({"logits.1"}))
    assert compare(row(), part).passed


def test_an_expected_kind_that_neither_run_gives_is_said() -> None:
    less = replace(drop("hidden"), omits=frozenset({"hidden"}))
    found = compare(less, less)
    assert not found.passed
    assert found.say_incomparable() == ["hidden: nothing of it was compared"]
    assert replace(found, expects=ALWAYS).passed
    assert not Parity().passed
    nothing = compare(RowRun(), RowRun())
    assert not nothing.passed
    assert set(nothing.incomparable) == {"features", "key", "value", "logits"}


def test_runs_that_prune_differently_are_compared_where_they_can_be() -> None:
    found = compare(row(), shorten("keys"), alike=False)
    assert found.incomparable == {}
    assert {"value.0", "logits.1", "features"} < set(found.differences)
    assert "key.0" not in found.differences


def test_a_choice_of_another_number_of_tokens_is_judged_by_nobody() -> None:
    """No referee is asked whether scores were tied where not even the lengths are equal."""
    found = Parity()
    other = replace(row(), kept={"stage0": torch.tensor([0])})
    compare_row(ITEM, ((False, row()), (True, other)), found, referee=object())  # type: ignore[arg-type]
    assert found.chose_differently == 1
    assert found.say_incomparable()[0] == "kept.stage0: 2 tokens in the first run, 1 tokens in the second (row 0)"


def test_a_value_that_is_no_number_fails() -> None:
    other = row()
    other.logits[1][3] = float("nan")
    found = compare(row(), other)
    assert found.logits == float("inf")
    assert not found.passed


def test_what_is_not_finite_is_written_in_json_that_everybody_reads() -> None:
    other = row()
    other.logits[1][3] = float("nan")
    for found in (compare(row(), other), compare(row(), shorten("keys"))):
        facts = json.loads(json.dumps(without_infinity(found.as_json()), allow_nan=False))
        assert not facts["passed"]
        assert {"largest": None, "relative": None} in facts["differences"].values()
        assert None in (facts["logits"], facts["cache"])


class Answers:
    """A run that answers every row alike."""

    defines = False

    def __init__(self, answer: RowRun, rows: int | None = None) -> None:
        self.answer, self.rows = answer, rows

    def run(self, batch: Any, greedy: int = 0) -> list[RowRun]:
        return [self.answer] * (len(batch) if self.rows is None else self.rows)


def test_every_row_is_answered_by_both() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare_runs(Answers(row()), Answers(row(), rows=1), [ITEM] * 2, 2, Parity())
    found = Parity(expects=KINDS)
    compare_runs(Answers(row()), Answers(row()), [], 2, found)
    assert not found.passed, "no row shows nothing"


def test_the_parity_page_passes_no_line_in_which_nothing_was_compared() -> None:
    whole = compare(row(), row()).as_json()
    assert passed([{"kind": "compare", "outcome": {"1": whole}}])
    for bad in (compare(row(), shorten("keys")), compare(row(), drop("values")), Parity()):
        outcome = json.loads(json.dumps(bad.as_json()))
        assert not passed([{"kind": "compare", "outcome": {"1": whole, "3": outcome}}])
    assert not passed([{"kind": "compare", "outcome": {}}])
    assert not passed([{"kind": "identity", "outcome": {"rows": 0, "same_tokens": 0, "logits": 0.0}}])
    assert not passed([])


def test_hidden_rows_are_expected_where_stages_stand_in_the_decoder() -> None:
    assert expected_kinds(RECIPES["fastv"]) == KINDS
    assert expected_kinds(RECIPES["divprune"]) == expected_kinds(RECIPES["none"]) == ALWAYS
