"""The core of every comparison: did two runs choose the same tokens, and with the choice held equal, did they compute
the same numbers?

A run that kept other tokens than the eager oracle is judged stage by stage, each stage on what the run's own earlier
choices left: tied where scores met within the tolerance of :mod:`secateur.compiler.ties`, different otherwise. Its
numbers are then held against the oracle told to keep the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur.compiler.inputs import RowInput, batches
from secateur.compiler.judge import Verdict, judge, run_oracle
from secateur.compiler.oracle import Oracle, RowRun
from secateur.compiler.recipe import Recipe

TOLERANCE = 1e-4
"""Largest difference allowed at fp32 in features, hidden rows, keys, values and logits, where the largest
magnitude compared is at most 1; in proportion to it above: about 800 units in the last place."""

KINDS = ("features", "hidden", "cache", "logits")
ALWAYS = ("features", "cache", "logits")
"""Kinds that every comparison has; hidden rows only where stages stand in the decoder and programs show them."""
_RANK: dict[Verdict, int] = {"equal": 0, "tied": 1, "different": 2}


def expected_kinds(recipe: Recipe) -> tuple[str, ...]:
    """What must come up where a recipe's programs were compiled to show hidden rows at sites."""
    return KINDS if any(s.site.kind == "decoder.layer" and s.select for s in recipe.stages) else ALWAYS


class Run(Protocol):
    """Something that answers rows. ``defines`` says that it is the oracle, whose choice is the definition."""

    @property
    def defines(self) -> bool: ...

    def run(self, batch: Sequence[RowInput], greedy: int = 0) -> list[RowRun]:
        """Prefill and decode of the forced tokens; behind them ``greedy`` tokens are chosen, each the likeliest, and
        all but the last decoded. All rows of a batch force the same number of tokens."""


def without_infinity(facts: Any) -> Any:
    """``facts`` with None for what JSON has no number for: differences of values that are not finite, or that cannot be
    compared."""
    if isinstance(facts, dict):
        return {name: without_infinity(value) for name, value in facts.items()}
    if isinstance(facts, list):
        return [without_infinity(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


@dataclass
class Difference:
    """``largest`` absolute difference, and the largest magnitude of what was compared."""

    largest: float = 0.0
    scale: float = 0.0

    @property
    def relative(self) -> float:
        if self.largest == float("inf"):
            return self.largest
        return self.largest / self.scale if self.scale else float(self.largest > 0)


@dataclass
class Overlap:
    """Rows by how one stage chose in them; ``jaccard`` per row is common survivors over all of either run."""

    equal: int = 0
    tied: int = 0
    different: int = 0
    jaccard: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        mean = sum(self.jaccard) / len(self.jaccard) if self.jaccard else 1.0
        counts = {"equal": self.equal, "tied": self.tied, "different": self.different}
        return {**counts, "jaccard": mean, "lowest_jaccard": min(self.jaccard, default=1.0)}


@dataclass
class Parity:
    """Sums over compared rows. Differences are largest absolute ones, with the choice of tokens held equal."""

    rows: int = 0
    chose_equally: int = 0
    tied: int = 0
    """Rows that kept other tokens where scores met within the tie tolerance."""
    chose_differently: int = 0
    stages: dict[str, Overlap] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    """By what was compared: ``features``, ``hidden.<stage>``, ``key.<layer>``, ``value.<layer>``, ``logits.<step>``."""
    mismatches: list[str] = field(default_factory=list)
    incomparable: dict[str, str] = field(default_factory=dict)
    """By name as in ``differences``, and ``kept.<stage>``: what only one run gives, or gives in another shape, with the
    first row where it does. Its difference is infinite."""
    expects: Sequence[str] = ALWAYS
    """The kinds of which something must have been compared."""

    @property
    def features(self) -> float:
        return self.kind("features").largest

    @property
    def hidden(self) -> float:
        return self.kind("hidden").largest

    @property
    def cache(self) -> float:
        return self.kind("cache").largest

    @property
    def logits(self) -> float:
        return self.kind("logits").largest

    @property
    def scales(self) -> dict[str, float]:
        """Largest magnitude among the values compared, by kind."""
        return {kind: self.kind(kind).scale for kind in KINDS if any(_kind(n) == kind for n in self.differences)}

    def kind(self, kind: str) -> Difference:
        """The worst of a kind over layers, stages and steps."""
        found = [d for name, d in self.differences.items() if _kind(name) == kind]
        return Difference(max((d.largest for d in found), default=0.0), max((d.scale for d in found), default=0.0))

    @property
    def computed_equally(self) -> bool:
        """Whether whatever was compared is within the tolerance, and both runs gave all of it."""
        within = all(self.kind(kind).largest <= TOLERANCE * max(1.0, scale) for kind, scale in self.scales.items())
        return within and not self.incomparable

    @property
    def complete(self) -> bool:
        """Whether there were rows, and everything that was to be compared in them could be."""
        return self.rows > 0 and not self.incomparable and set(self.expects) <= set(self.scales)

    @property
    def passed(self) -> bool:
        return self.complete and self.chose_differently == 0 and self.computed_equally

    def worst_of(self, kind: str) -> str:
        """The layer, stage or step of a kind that differs most."""
        return max((n for n in self.differences if _kind(n) == kind), key=lambda n: self.differences[n].largest)

    @property
    def worst(self) -> tuple[str, float]:
        """What differs most for its kind's magnitude, and by how much."""
        scales = self.scales
        ranked = {n: d.largest / max(1.0, scales[_kind(n)]) for n, d in self.differences.items()}
        name = max(ranked, key=lambda n: ranked[n], default="")
        return name, self.differences[name].largest if name else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows, "chose_equally": self.chose_equally, "tied": self.tied,
            "chose_differently": self.chose_differently,
            **{kind: self.kind(kind).largest for kind in KINDS},
            "scales": self.scales, "mismatches": self.mismatches, "incomparable": self.say_incomparable(),
            "complete": self.complete, "passed": self.passed,
            "stages": {name: overlap.as_json() for name, overlap in self.stages.items()},
            "differences": {
                name: {"largest": d.largest, "relative": d.relative} for name, d in self.differences.items()
            },
        }  # fmt: skip

    def say_incomparable(self) -> list[str]:
        """A line for each thing that one run lacks or gives in another shape, and for each kind that is missing."""
        lines = [f"{name}: {words}" for name, words in self.incomparable.items()]
        missing = [kind for kind in self.expects if kind not in self.scales]
        return lines + [f"{kind}: nothing of it was compared" for kind in missing if self.rows]

    def note(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        """Two tensors of one shape, which hold something."""
        difference = float((ours - theirs).abs().max())
        # NaN compares false with everything: let it fail, not vanish in max().
        difference = float("inf") if difference != difference else difference
        entry = self.differences.setdefault(what, Difference())
        entry.largest = max(entry.largest, difference)
        entry.scale = max(entry.scale, float(theirs.abs().max()))

    def note_incomparable(self, what: str, words: str) -> None:
        self.incomparable.setdefault(what, f"{words} (row {self.rows - 1})")
        if not what.startswith("kept."):
            self.differences.setdefault(what, Difference()).largest = float("inf")

    def note_row(
        self, ours: RowRun, theirs: RowRun, who: tuple[str, str] = ("one run", "the other"), alike: bool = True
    ) -> None:
        """Everything both runs give. What only one gives is a failure, unless the other says that it omits it, and so
        is another shape. Where the runs are not ``alike``, since they prune differently, what has one shape is
        compared and the rest is passed over."""
        one, other = ours.tensors(), theirs.tensors()
        omitted = ours.omits | theirs.omits
        for name in dict.fromkeys((*one, *other)):
            if name in omitted or name.partition(".")[0] in omitted:
                continue
            if name in one and name in other and one[name].shape == other[name].shape and one[name].numel():
                self.note(name, one[name], other[name])
            elif alike:
                found = [list(side[name].shape) if name in side else "nothing" for side in (one, other)]
                self.note_incomparable(name, f"{found[0]} in {who[0]}, {found[1]} in {who[1]}")

    def note_unlike_choices(self, unlike: Mapping[str, str]) -> None:
        """A row in which stages kept other numbers of tokens; nobody can say then that scores were tied."""
        self.mismatches += [f"{name.removeprefix('kept.')} row {self.rows}" for name in unlike]
        self.rows += 1
        self.chose_differently += 1
        for name, words in unlike.items():
            self.note_incomparable(name, words)

    def note_choices(self, verdicts: Mapping[str, Verdict], ours: RowRun, theirs: RowRun) -> None:
        row, worst = self.rows, max(verdicts.values(), key=_RANK.__getitem__, default="equal")
        self.rows += 1
        self.chose_equally += worst == "equal"
        self.tied += worst == "tied"
        self.chose_differently += worst == "different"
        one, other = survivors(ours), survivors(theirs)
        for name, verdict in verdicts.items():
            overlap = self.stages.setdefault(name, Overlap())
            setattr(overlap, verdict, getattr(overlap, verdict) + 1)
            overlap.jaccard.append(len(one[name] & other[name]) / max(1, len(one[name] | other[name])))
            if verdict == "different":
                self.mismatches.append(f"{name} row {row}")


def survivors(row: RowRun) -> dict[str, set[int]]:
    """Stage -> the row's original visual tokens that are left after it."""
    found: dict[str, set[int]] = {}
    tokens: Tensor | None = None
    for name, kept in row.kept.items():
        tokens = kept if tokens is None else tokens[kept]
        found[name] = set(tokens.tolist())
    return found


def compare_runs(
    ours: Run,
    theirs: Run,
    items: Sequence[RowInput],
    size: int,
    into: Parity,
    *,
    referee: Oracle | None = None,
    force_keep: bool = True,
    alike: bool = True,
    greedy: int = 0,
    watch: Callable[[RowInput, RowRun, RowRun], None] = lambda item, ours, theirs: None,
) -> None:
    """Run ``items`` through both in batches of ``size`` and add to ``into``; ``watch`` sees every row.

    ``referee`` judges choices that differ. Without ``force_keep`` numbers are compared as they come. Runs that are not
    ``alike`` take tokens out at other places or in other numbers: only what has one shape is compared. With ``greedy``
    the rows decode that many tokens: what ``ours`` finds likeliest is forced upon ``theirs``.
    """
    for batch in batches(items, size):
        found = ours.run(batch, greedy)
        if greedy:
            batch = [replace(i, forced_tokens=likeliest(row)[:-1]) for i, row in zip(batch, found, strict=True)]
        for item, one, other in zip(batch, found, theirs.run(batch), strict=True):
            compare_row(item, ((ours.defines, one), (theirs.defines, other)), into, referee, force_keep, alike)
            watch(item, one, other)


def likeliest(row: RowRun) -> list[int]:
    return [int(step.argmax()) for step in row.logits]


def compare_row(
    item: RowInput,
    sides: tuple[tuple[bool, RowRun], tuple[bool, RowRun]],
    into: Parity,
    referee: Oracle | None,
    force_keep: bool = True,
    alike: bool = True,
) -> None:
    """One row of two runs, each with whether it is the oracle's. ``alike`` as in :func:`compare_runs`."""
    (_, ours), (_, theirs) = sides
    who = ("the second run", "the first")
    chosen = [name for name in ours.kept if name in theirs.kept]
    if alike and (unlike := _find_unlike_choices(ours, theirs)):
        into.note_unlike_choices(unlike)
        into.note_row(theirs, ours, who)
        return
    if all(torch.equal(ours.kept[name], theirs.kept[name]) for name in chosen):
        into.note_choices(dict.fromkeys(chosen, "equal"), ours, theirs)
        into.note_row(theirs, ours, who, alike)
        return
    verdicts: dict[str, Verdict] = {}
    if referee is None:
        equal = True
        for name in chosen:  # what stands behind another choice chose among other tokens
            equal = equal and torch.equal(ours.kept[name], theirs.kept[name])
            verdicts[name] = "equal" if equal else "different"
        into.note_choices(verdicts, ours, theirs)
    else:
        free = next((row for defines, row in sides if defines), None) or run_oracle(referee, item)
        verdicts = dict.fromkeys(chosen, "equal")
        settled = []
        for defines, row in sides:
            if defines:
                continue
            judged, reference = judge(referee, item, {n: row.kept[n] for n in chosen}, free)
            verdicts = {n: max(v, judged[n], key=_RANK.__getitem__) for n, v in verdicts.items()}
            settled.append((row, reference))
        into.note_choices(verdicts, ours, theirs)
        if force_keep:
            for row, reference in settled:
                into.note_row(row, reference, ("the run", "the oracle told to keep the same"), alike)
    if not force_keep:
        into.note_row(theirs, ours, who, alike)


def _find_unlike_choices(ours: RowRun, theirs: RowRun) -> dict[str, str]:
    """Stages at which only one run chose without the other's saying so, or the runs chose other numbers of tokens."""
    found = {}
    for name in dict.fromkeys((*ours.kept, *theirs.kept)):
        counts = [len(row.kept[name]) if name in row.kept else None for row in (ours, theirs)]
        if counts[0] != counts[1] and f"kept.{name}" not in ours.omits | theirs.omits:
            first, second = ("no choice" if n is None else f"{n} tokens" for n in counts)
            found[f"kept.{name}"] = f"{first} in the first run, {second} in the second"
    return found


def _kind(name: str) -> str:
    kind = name.partition(".")[0]
    return "cache" if kind in ("key", "value") else kind
