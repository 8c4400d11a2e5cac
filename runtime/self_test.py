"""A bundle's self-test on this machine: pixels, sound, ids, features, survivors, tokens and logits, in this order.

Each step is held against what the bundle says; programs are given the bundle's own ids and tokens, so that a step that
differs does not hide the next one. Pixels cannot be given: where they differ, all that comes after them follows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from secateur.runtime.backends import open_backend
from secateur.runtime.errors import SecateurError
from secateur.runtime.kv import check_room
from secateur.runtime.probe import PixelDifference, find_largest
from secateur.runtime.processing import Processor
from secateur.runtime.request import Request
from secateur.runtime.schema import Manifest
from secateur.runtime.schema_self_test import Case, Numbers, Pixels, Sampled, SelfTest, read_self_test
from secateur.runtime.self_test_run import Ran, Seen, run_programs, see
from secateur.runtime.session import Session

_log = logging.getLogger(__name__)

State = Literal["equal", "within", "differs", "follows", "not run"]
"""``within`` the step's tolerance; ``follows`` from other pixels, which is no failure of the step itself."""
_STEPS = ("pixels", "sound", "ids", "features", "survivors", "tokens", "logits")


class Step(NamedTuple):
    """One step of one case. ``largest`` is how far the farthest value is away, or how many tokens are other ones."""

    name: str
    case: str
    state: State
    says: str = ""
    largest: float = 0.0
    tolerance: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} of {self.case}: {self.says}"


@dataclass(frozen=True)
class SelfTestReport:
    """``note`` says why programs were not run, or why nothing was."""

    steps: list[Step]
    note: str = ""

    @property
    def first(self) -> Step | None:
        """The first step that differs."""
        return next((step for step in self.steps if step.state == "differs"), None)

    @property
    def passed(self) -> bool:
        return self.first is None

    def of(self, name: str) -> list[Step]:
        return [step for step in self.steps if step.name == name]

    def as_json(self) -> dict[str, Any]:
        first = self.first
        return {
            "passed": self.passed, "first": first and first.name, "note": self.note,
            # JSON has no number for what is not finite.
            "steps": [
                step._asdict() | {"largest": step.largest if math.isfinite(step.largest) else None}
                for step in self.steps
            ],
        }  # fmt: skip

    def lines(self) -> list[str]:
        """What a person is told: a line for what agrees, and one for every step that does not."""
        if not self.steps:
            return [self.note]
        told = [said for name in _STEPS if (said := _summarize(name, self.of(name)))]
        told = ["; ".join(told)] if told else []
        if self.first is not None:
            told.append(f"the first step that differs: {self.first.name}")
        told += [f"{step}" for step in self.steps if step.state in ("differs", "follows") and step.says]
        return [*told, self.note] if self.note else told


def run(session: Session) -> SelfTestReport:
    """The self-test of an open bundle, in its own backend and threads."""
    test = read_self_test(session.path, session.manifest)
    if test is None:
        return SelfTestReport([], _lacks(session.manifest))
    why = _why_not(session.manifest, test)
    return _check(test, session.path, session.processors, None if why else session.request, why)


def check(directory: Path, manifest: Manifest, threads: int | None = None) -> SelfTestReport:
    """The self-test of a bundle that is not open. Programs run where the bundle holds numbers for them and the machine
    can. Raises :class:`BundleError` for a bundle whose files no processor or library takes."""
    test, geometries = read_self_test(directory, manifest), manifest.each_variant()
    why = _lacks(manifest) if test is None else _why_not(manifest, test)
    if why and threads is not None:
        _log.warning("threads say nothing to the self-test: no program is run")
    if test is None:
        return SelfTestReport([], why)
    processors = [Processor(directory, one) for one in geometries]
    if why:
        return _check(test, directory, processors, None, why)
    backend = open_backend(None, directory, manifest, threads=threads)

    def request(variant: int) -> Request:
        check_room(geometries[variant], f"{directory}: geometry {variant}")
        return Request(backend, manifest, variant)

    try:
        return _check(test, directory, processors, request, "")
    finally:
        backend.close()


def why_not_here(target: str, dtype: str) -> str:
    """Why this machine's CPU cannot run the programs of a target; empty where it can."""
    if target not in ("onnxruntime", "plain") or dtype != "fp32":
        return f"programs of {dtype} for {target} do not run on the CPU"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'secateur[cpu]'"
    return ""


def _why_not(manifest: Manifest, test: SelfTest) -> str:
    if all(case.numbers is None for case in test.cases):
        why = why_not_here(manifest.target, manifest.dtype) or "compile with --self-test full to have them"
        return f"the bundle holds no survivors, tokens and logits to compare: {why}"
    return why_not_here(manifest.target, manifest.dtype)


def _lacks(manifest: Manifest) -> str:
    keep = f" --keep {manifest.recipe.keep:g}" if manifest.recipe.stages else ""
    return (
        "the bundle has none; to have one, compile it again: "
        f"secateur compile MODEL_DIR -o BUNDLE --recipe {manifest.recipe.name}{keep} --target {manifest.target}"
    )


def _check(
    test: SelfTest, directory: Path, processors: Sequence[Processor], request: Callable[[int], Request] | None, why: str
) -> SelfTestReport:
    steps: list[Step] = []
    for case in test.cases:
        processor = processors[case.geometry]
        seen = _see(case, processor, directory)
        if isinstance(seen, Step):
            steps.append(seen)
            continue
        steps += _compare_inputs(case, seen, processor)
        if case.numbers is None or request is None:
            continue
        moved = next((step for step in steps if step.case == case.where and step.state in ("differs", "follows")
                      and step.name in ("pixels", "sound")), None)  # fmt: skip
        steps += _run(case, case.numbers, seen, request(case.geometry), moved)
    return SelfTestReport(steps, why)


def _see(case: Case, processor: Processor, directory: Path) -> Seen | Step:
    try:
        return see(processor, case.rows, directory)
    except SecateurError as error:
        return Step("pixels", case.where, "differs", str(error))


def _compare_inputs(case: Case, seen: Seen, processor: Processor) -> Iterator[Step]:
    yield _compare_pixels(case, case.pixels, seen)
    if case.sound is not None:
        yield compare_values("sound", case.where, case.sound, seen.input_features)
    asked: list[tuple[str, Any, Sequence[float], list[int]]] = [
        (f"row {number}", row.prompt, seen.times[number], row.ids) for number, row in enumerate(case.rows)
    ]
    if case.chat is not None:
        asked.append(("messages", case.chat.messages, seen.times[0], case.chat.ids))
    for where, prompt, times, expected in asked:
        try:
            found = processor.encode(prompt, where, times)
        except SecateurError as error:
            yield Step("ids", case.where, "differs", str(error), float(len(expected)))
            return
        if found != expected:
            yield Step("ids", case.where, "differs", f"{where}: {_first_other(found, expected)}",
                       _count_other(found, expected))  # fmt: skip
            return
    yield Step("ids", case.where, "equal")


def _compare_pixels(case: Case, expected: Pixels, seen: Seen) -> Step:
    values = compare_values("pixels", case.where, expected.values, seen.pixel_values)
    if list(seen.pixel_values.shape) != expected.values.shape:
        return values
    if hashlib.sha256(seen.levels.tobytes()).hexdigest() == expected.sha256:
        return values  # what is left is how levels are normalised
    some = seen.levels.reshape(-1)[expected.values.at]
    away = PixelDifference(expected.pillow, PIL.__version__, *find_largest(np.array(expected.levels), some))
    # Another release of Pillow resizes otherwise, and is said to; the same one makes the same pixels.
    if away.pillow != away.here:
        return Step("pixels", case.where, "follows", str(away), away.largest)
    says = (
        f"up to {away.largest} of 255 levels apart, {away.share:.0%} of those that are stored different, under the "
        f"Pillow {away.here} that made them"
    )
    return Step("pixels", case.where, "differs", says, away.largest)


def _run(case: Case, expected: Numbers, seen: Seen, request: Request, moved: Step | None) -> list[Step]:
    """``moved`` is the step before the programs that did not come out as it should."""
    try:
        ran = run_programs(request, case.rows, seen, expected.tokens)
    except SecateurError as error:
        return [Step("features", case.where, "differs", f"the programs do not run: {error}")]
    found = list(_compare_numbers(case.where, expected, ran))
    if moved is None:
        return found
    return [
        step._replace(state="follows", says=f"{step.says}; it follows from other {moved.name}")
        if step.state == "differs"
        else step
        for step in found
    ]


def _compare_numbers(where: str, expected: Numbers, ran: Ran) -> Iterator[Step]:
    yield compare_values("features", where, expected.features, ran.features)
    yield _compare_survivors(where, expected.survivors, ran.survivors)
    yield _compare_tokens(where, expected, ran)
    steps = [
        compare_values("logits", where, one, logits) for one, logits in zip(expected.logits, ran.logits, strict=True)
    ]
    # Every step has a tolerance of its own: one that differs counts before any that does not.
    number = max(range(len(steps)), key=lambda at: (steps[at].state == "differs", steps[at].largest))
    worst = steps[number]
    yield worst._replace(says=f"step {number}: {worst.says}" if worst.says else "")


def _compare_survivors(
    where: str, expected: Mapping[str, list[list[int]]], found: Mapping[str, NDArray[np.int64]]
) -> Step:
    if expected.keys() != found.keys():
        says = f"stages {', '.join(sorted(found)) or 'none'} instead of {', '.join(sorted(expected)) or 'none'}"
        return Step("survivors", where, "differs", says, float(len(expected.keys() ^ found.keys())))
    said, other = list[str](), 0
    for stage, rows in expected.items():
        for number, (want, have) in enumerate(zip(rows, found[stage].tolist(), strict=True)):
            if want == have:
                continue
            gone = sorted({*want} - {*have})
            other += (count := max(len(gone), len({*have} - {*want}), 1))
            said.append(f"{stage}, row {number}: {count} of {len(want)} are other tokens, such as {gone[:3]} gone")
    return (
        Step("survivors", where, "differs", "; ".join(said[:3]), other) if said else Step("survivors", where, "equal")
    )


def _compare_tokens(where: str, expected: Numbers, ran: Ran) -> Step:
    """Each is chosen after the bundle's own tokens. One that is not the likeliest here by less than the tolerance of
    its logits is a tie."""
    other, tied, says = 0, 0, ""
    for row, (want, have) in enumerate(zip(expected.tokens, ran.tokens, strict=True)):
        for step, (a, b) in enumerate(zip(want, have, strict=True)):
            if a == b:
                continue
            behind = float(ran.logits[step][row, b] - ran.logits[step][row, a])
            if behind <= expected.logits[step].tolerance:
                tied += 1
                continue
            says = says or f"row {row}, token {step}: {b} instead of {a}, whose logit is {behind:.2g} lower"
            other += 1
    if other:
        return Step("tokens", where, "differs", f"{other} other token(s); {says}", other)
    return Step("tokens", where, "within" if tied else "equal", f"{tied} tied" if tied else "", tied)


def compare_values(name: str, where: str, expected: Sampled, found: NDArray[Any] | None) -> Step:
    """The stored values against those of an array."""
    if found is None or list(found.shape) != expected.shape:
        shape = None if found is None else list(found.shape)
        says = f"shape {shape} instead of {expected.shape}"
        return Step(name, where, "differs", says, float("inf"), expected.tolerance)
    away = np.abs(found.reshape(-1)[expected.at].astype(np.float64) - np.array(expected.values))
    largest = float(away.max()) if np.isfinite(away).all() else float("inf")
    if largest <= expected.tolerance:
        # Half of the sixth digit is what rounding took.
        exact = largest <= 5e-6 * max(map(abs, expected.values))
        return Step(name, where, "equal" if exact else "within", "", largest, expected.tolerance)
    says = (
        f"up to {largest:.2g} away, {expected.tolerance:.2g} is allowed ({(away > expected.tolerance).sum()} of "
        f"{len(expected.at)} values)"
    )
    return Step(name, where, "differs", says, largest, expected.tolerance)


def _summarize(name: str, steps: Sequence[Step]) -> str:
    """A step over all cases, in a few words."""
    if not steps:
        return ""
    states = {step.state for step in steps}
    if "differs" in states or "follows" in states:
        return f"{name} {'DIFFER' if 'differs' in states else 'differ'}"
    largest = max(steps, key=lambda step: step.largest)
    if states == {"equal"}:
        return f"{name} equal"
    return f"{name} within {largest.largest:.1e}" if largest.tolerance else f"{name} tied"


def _first_other(found: Sequence[int], expected: Sequence[int]) -> str:
    at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    length = "" if len(found) == len(expected) else f"{len(found)} ids instead of {len(expected)}, "
    if at is None:
        return length.removesuffix(", ")
    return f"{length}id {at} is {found[at]} instead of {expected[at]}"


def _count_other(found: Sequence[int], expected: Sequence[int]) -> float:
    """Places with another id, those beyond the shorter one's end included."""
    unequal = sum(a != b for a, b in zip(found, expected, strict=False))
    return float(unequal + abs(len(found) - len(expected)))
