"""Two runs over the same rows: what each chose, what it computed with the choice held equal, what it answers.

A run is the eager oracle, the pruned programs in eager PyTorch, a freshly compiled bundle in one of the CPU's
dialects, or a bundle on disk. Where the two do not agree, the first pass that changes numbers is looked for.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secateur.compiler.common_ground import RUNS, CommonGround, OpenRun, Toolchain, layout_of
from secateur.compiler.geometry import Geometry
from secateur.compiler.inputs import Asked, RowInput
from secateur.compiler.oracle import RowRun
from secateur.compiler.output import whole_directory
from secateur.compiler.parity import TOLERANCE, Parity, compare_runs, expected_kinds, likeliest, without_infinity
from secateur.compiler.recipe import Recipe
from secateur.compiler.runs import answer
from secateur.compiler.trail import Footprint
from secateur.runtime.errors import UserError, refuse_idle

_log = logging.getLogger(__name__)


@dataclass
class Answers:
    """Greedy answers, up to the end-of-sequence token; ``differ_at`` per row is the first token that differs, None
    where all are equal."""

    differ_at: list[int | None] = field(default_factory=list)

    @property
    def equal(self) -> int:
        return sum(at is None for at in self.differ_at)

    def add(self, ours: list[int], theirs: list[int]) -> None:
        pairs = zip(ours, theirs, strict=False)
        at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
        self.differ_at.append(None if ours == theirs else at)


@dataclass(frozen=True)
class Comparison:
    """``footprints`` is None where no pass was looked at; ``comparable`` says that both runs take tokens out at the
    same places and in the same numbers."""

    a: str
    b: str
    comparable: bool
    judged: bool
    """Whether a model was there to tell ties from other choices."""
    parity: Parity
    answers: Answers
    footprints: list[Footprint] | None

    @property
    def passed(self) -> bool:
        return self.comparable and self.parity.passed

    @property
    def verdict(self) -> str:
        if not self.comparable:
            return "prune at other places, to other lengths or out of other caches"
        chose, computed = self.parity.chose_differently > 0, not self.parity.computed_equally
        if chose and not self.judged:
            return "chose differently, or met a tie: give model and recipe to tell"
        faults = [word for word, found in (("chose", chose), ("computed", computed)) if found]
        if not faults and not self.parity.complete:
            return "not everything was compared"
        return f"{' and '.join(faults)} differently" if faults else "equal"

    @property
    def first_pass(self) -> str | None:
        """The first pass that changes numbers, "trace" for the traced model itself; None if none does."""
        return self.footprints[-1].name if self.footprints and self.footprints[-1].changes else None

    def as_json(self) -> dict[str, Any]:
        return {
            "a": self.a, "b": self.b, "passed": self.passed, "verdict": self.verdict, "tolerance": TOLERANCE,
            "parity": without_infinity(self.parity.as_json()),
            "answers": {
                "rows": len(self.answers.differ_at), "equal": self.answers.equal, "differ_at": self.answers.differ_at,
            },
            "first_pass": self.first_pass,
            "passes": None if self.footprints is None else [without_infinity(f.as_json()) for f in self.footprints],
        }  # fmt: skip


def compare_named(
    a: str,
    b: str,
    tools: Toolchain,
    *,
    model_dir: Path | None = None,
    recipe: Recipe | str | None = None,
    keep: float | None = None,
    geometry: Geometry | None = None,
    questions: int | None = None,
    data: Path | Sequence[Asked] | None = None,
    seed: int | None = None,
    new_tokens: int = 4,
    force_keep: bool = True,
    passes: bool | None = None,
    out: Path | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """Compare ``a`` with ``b``, each one of ``RUNS`` or the directory of a bundle.

    ``questions`` rows come from ``data``, a JSONL file (:mod:`secateur.compiler.questions`) or questions already read;
    without it they are random by ``seed`` (0). ``recipe`` and ``geometry`` default to a bundle's own. ``force_keep``
    tells the oracle to keep what a run kept before numbers are compared. ``passes`` True looks for the first pass that
    changes numbers even where the runs agree, None only where they do not. ``out`` receives ``a.npz``, ``b.npz`` and
    ``report.json``.
    Raises UserError for runs that cannot be compared.
    """
    if data is not None:
        refuse_idle("rows of data are not random", seed=seed)
    if threads is not None and {a, b} <= {"oracle", "fx"}:
        _log.warning("threads say nothing: neither %s nor %s runs a bundle", a, b)
    ground = CommonGround((a, b), tools, model_dir, recipe, keep, geometry, threads)
    if passes and ground.job is None:
        raise UserError("passes are looked at in a model", where="--passes", fix="give --model")
    if passes and ground.cannot_follow:
        raise UserError(
            f"{ground.cannot_follow} are not looked at pass by pass", where="--passes",
            fix="leave it out, or choose a geometry with images of one size and without sound",
        )  # fmt: skip
    # Of a bundle on disk nobody knows whether it was compiled to show hidden rows; of other runs it is known.
    parity, answers = Parity(), Answers()
    if ground.job is not None and {a, b} <= set(RUNS):
        parity.expects = expected_kinds(ground.job.plan.recipe)
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(OpenRun(ground, name)) for name in (a, b))
        comparable = ours.layout == theirs.layout
        judged = ground.job is not None and comparable and ours.layout == layout_of(ground.manifest)
        manifest, batch = ground.manifest, ground.manifest.geometry.batch
        items = ground.read_rows(data, questions, seed or 0)
        steps = min(new_tokens, manifest.geometry.new_tokens)
        files: list[_Arrays] = []
        if out is not None:
            work = stack.enter_context(whole_directory(out, force=False))
            files = [stack.enter_context(_Arrays(work / f"{name}.npz")) for name in "ab"]
        bad: list[RowInput] = []

        def watch(item: RowInput, one: RowRun, other: RowRun) -> None:
            said, tokens = likeliest(one), likeliest(other)
            if said != tokens:  # the tokens that were forced are not the ones it would go on with
                tokens = answer(theirs.run, item, batch, steps)
            answers.add(*(_until_end(t, manifest.model.eos_token_ids) for t in (said, tokens)))
            sides = ((one, said), (other, tokens))
            for file, (row, given) in zip(files, sides if files else (), strict=True):
                file.add(f"row{len(answers.differ_at) - 1}", row, given)
            if not parity.passed and not bad:
                bad.append(item)
            progress("rows", min(parity.rows, len(items)), len(items))

        compare_runs(
            ours.run, theirs.run, items, batch, parity, referee=ground.oracle if judged else None,
            force_keep=force_keep and comparable, alike=comparable, greedy=steps, watch=watch,
        )  # fmt: skip
        footprints = None
        if passes is None and bad and judged and ground.cannot_follow:
            _log.warning("the first pass that changes numbers is not looked for: %s", ground.cannot_follow)
        elif passes or (passes is None and bad and judged and not {a, b} <= {"oracle"}):
            footprints = ground.follow((bad or items)[0], progress)
        found = Comparison(a, b, comparable, judged, parity, answers, footprints)
        if out is not None:
            (work / "report.json").write_text(json.dumps(found.as_json(), indent=1) + "\n")
    return found


class _Arrays:
    """An ``.npz`` file that is written row by row."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w")

    def __enter__(self) -> _Arrays:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def add(self, prefix: str, row: RowRun, tokens: list[int]) -> None:
        arrays = {"tokens": np.array(tokens), "features": row.features.numpy()}
        arrays |= {f"kept.{name}": kept.numpy() for name, kept in row.kept.items()}
        arrays |= {f"hidden.{name}": rows.numpy() for name, rows in row.hidden.items()}
        for what, tensors in (("key", row.keys), ("value", row.values), ("logits", row.logits)):
            arrays |= {f"{what}.{index}": tensor.numpy() for index, tensor in enumerate(tensors)}
        for name, array in arrays.items():
            with self._zip.open(f"{prefix}/{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]
