"""Two runs over the same rows: what each chose, what it computed with the choice held equal, what it answers.

A run is the eager oracle, the pruned programs in eager PyTorch, a freshly compiled bundle in one of the CPU's
dialects, or a bundle on disk. Where the two do not agree, the first pass that changes numbers is looked for.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from secateur.compiler.bundle import outline
from secateur.compiler.geometry import Geometry
from secateur.compiler.inputs import RowInput, question_rows, random_rows
from secateur.compiler.oracle import Oracle, RowRun, load_recording_model
from secateur.compiler.output import whole_directory
from secateur.compiler.parity import TOLERANCE, Parity, Run, compare_runs, likeliest
from secateur.compiler.pruned import Job, Pruned
from secateur.compiler.questions import read_questions
from secateur.compiler.recipe import Recipe
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Respaced, Weights, answer
from secateur.compiler.trace import Source, Traced, read_source
from secateur.compiler.trail import Footprint, Step, follow_passes
from secateur.compiler.verify import check_comparable, check_model, recover_job
from secateur.passes.recipe_file import load_recipe
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import Manifest, read_manifest
from secateur.runtime.processing import Processor
from secateur.runtime.request import Request
from secateur.runtime.session import Session

RUNS = ("oracle", "fx", "plain", "onnxruntime")
RANDOM_ROWS = 8


class Toolchain(NamedTuple):
    """The pipeline's steps. ``compile`` builds a bundle of pruned programs: (pruned, target, directory)."""

    plan: Callable[..., Job]
    trace: Callable[[Source, Geometry], Traced]
    prune: Callable[..., Pruned]
    compile: Callable[[Pruned, str, Path], Path]
    passes: Sequence[Step]


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
            return "prune at other places or to other lengths"
        chose, computed = self.parity.chose_differently > 0, not self.parity.computed_equally
        if chose and not self.judged:
            return "chose differently, or met a tie: give the model to tell"
        faults = [word for word, found in (("chose", chose), ("computed", computed)) if found]
        return f"{' and '.join(faults)} differently" if faults else "equal"

    @property
    def first_pass(self) -> str | None:
        """The first pass that changes numbers, "trace" for the traced model itself; None if none does."""
        return self.footprints[-1].name if self.footprints and self.footprints[-1].changes else None

    def as_json(self) -> dict[str, Any]:
        return {
            "a": self.a, "b": self.b, "passed": self.passed, "verdict": self.verdict, "tolerance": TOLERANCE,
            "parity": self.parity.as_json(),
            "answers": {
                "rows": len(self.answers.differ_at), "equal": self.answers.equal, "differ_at": self.answers.differ_at,
            },
            "first_pass": self.first_pass,
            "passes": None if self.footprints is None else [f.as_json() for f in self.footprints],
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
    data: Path | None = None,
    seed: int = 0,
    new_tokens: int = 4,
    force_keep: bool = True,
    passes: bool | None = None,
    out: Path | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """Compare ``a`` with ``b``, each one of ``RUNS`` or the directory of a bundle.

    ``questions`` rows come from the JSONL file ``data`` (:mod:`secateur.compiler.questions`), or else are random by
    ``seed``. ``recipe`` and ``geometry`` default to a bundle's own. ``force_keep`` tells the oracle to keep what a run
    kept before numbers are compared. ``passes`` True looks for the first pass that changes numbers even where the
    runs agree, None only where they do not. ``out`` receives ``a.npz``, ``b.npz`` and ``report.json``.
    Raises UserError for runs that cannot be compared.
    """
    bench = _Bench((a, b), tools, model_dir, recipe, keep, geometry, threads)
    parity, answers = Parity(), Answers()
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(_Opened(bench, name)) for name in (a, b))
        comparable = ours.layout == theirs.layout
        judged = bench.job is not None and comparable and ours.layout == _layout(bench.manifest)
        manifest, batch = bench.manifest, bench.manifest.geometry.batch
        items = bench.read_rows(data, questions, seed, new_tokens)
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
            for file, row, given in zip(files, (one, other), (said, tokens), strict=False):
                file.add(f"row{len(answers.differ_at) - 1}", row, given)
            if not parity.passed and not bad:
                bad.append(item)
            progress("rows", min(parity.rows, len(items)), len(items))

        compare_runs(
            ours.run, theirs.run, items, batch, parity, referee=bench.oracle if judged else None,
            force_keep=force_keep and comparable, greedy=steps, watch=watch,
        )  # fmt: skip
        footprints = None
        if passes or (passes is None and bad and judged and not {a, b} <= {"oracle"}):
            footprints = bench.follow((bad or items)[0], progress)
        found = Comparison(a, b, comparable, judged, parity, answers, footprints)
        if out is not None:
            (work / "report.json").write_text(json.dumps(found.as_json(), indent=1) + "\n")
    return found


class _Bench:
    """What both runs share: the model, the job, one trace, one loaded checkpoint."""

    def __init__(
        self,
        names: tuple[str, str],
        tools: Toolchain,
        model_dir: Path | None,
        recipe: Recipe | str | None,
        keep: float | None,
        geometry: Geometry | None,
        threads: int | None,
    ) -> None:
        self.tools, self.threads, self.bundles = tools, threads, _read_bundles(names)
        needs = [name for name in names if name in RUNS]
        if model_dir is None and (needs or recipe is not None):
            raise UserError(
                f"run {needs[0]!r} needs the model" if needs else "a recipe needs the model it is for",
                where="--model",
                fix="give its directory",
            )
        if keep is not None and recipe is None:
            raise UserError("a keep ratio needs a recipe", where="--keep", fix="give --recipe as well")
        self.job: Job | None = None
        manifests = list(self.bundles.values())
        if model_dir is not None:
            source = read_source(model_dir)
            for manifest in manifests:
                check_model(manifest, source)
            if recipe is None and manifests:
                self.job = recover_job(manifests[0], source, tools.plan, None)
            else:
                row = load_recipe(recipe or "none") if isinstance(recipe, (str, type(None))) else recipe
                self.job = tools.plan(source, geometry or _geometry_of(manifests), row, keep)
        self.manifest = manifests[0] if self.job is None else outline(self.job)
        self.directory = model_dir or Path(next(iter(self.bundles)))
        _check_geometry(self.bundles, geometry, self.manifest)

    @cached_property
    def model(self) -> Any:
        assert self.job is not None
        return load_recording_model(self.job.source)

    @cached_property
    def oracle(self) -> Oracle:
        assert self.job is not None
        return Oracle(self.job, self.model)

    @cached_property
    def traced(self) -> Traced:
        assert self.job is not None
        return self.tools.trace(self.job.source, self.job.geometry)

    @cached_property
    def pruned(self) -> Pruned:
        """The job's programs, with the hidden rows at sites among their results."""
        assert self.job is not None
        plan = self.job.plan
        return self.tools.prune(self.traced, plan.recipe, plan.keep if plan.recipe.stages else None, expose=True)

    def read_rows(self, data: Path | None, count: int | None, seed: int, new_tokens: int) -> list[RowInput]:
        if data is None:
            drawn = random_rows(self.manifest, count or RANDOM_ROWS, new_tokens, seed)
            return [replace(item, forced_tokens=()) for item in drawn]
        processor = Processor(self.directory, self.manifest)
        return question_rows(processor, self.manifest.geometry.images, read_questions(data, count))

    def follow(self, item: RowInput, progress: Callable[[str, int, int], None]) -> list[Footprint]:
        if self.job is None:
            raise UserError("passes are looked at in a model", where="--passes", fix="give --model")
        names = ["trace", *(step.name for step in self.tools.passes)]
        return follow_passes(
            self.traced, self.job, self.tools.passes, self.model, item,
            lambda name: progress(f"pass: {name}", names.index(name), len(names)),
        )  # fmt: skip


class _Opened:
    """One run while it is open; ``layout`` says where it takes out how many tokens."""

    def __init__(self, bench: _Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self._stack = ExitStack()

    def __enter__(self) -> _Opened:
        bench, name = self.bench, self.name
        manifest = bench.bundles.get(name, bench.manifest)
        self.layout = _layout(manifest)
        run = self._open(manifest)
        before, after = (m.geometry.features_per_image for m in (bench.manifest, manifest))
        if before != after:
            run = Respaced(run, manifest.model.image_token_id, before, after)
        self.run = run
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, manifest: Manifest) -> Run:
        bench, name = self.bench, self.name
        if name == "oracle":
            return OracleRun(bench.oracle)
        if name == "fx":
            pruned = bench.pruned
            programs = pruned.programs.programs
            backend = EagerBackend(programs, Weights(pruned.job.source, pruned.traced.model))
            told = outline(pruned.job, pruned.programs)
            return CompiledRun(told, Request(backend, told))
        path = Path(name)
        if name in RUNS:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="secateur-compare-"))
            path = bench.tools.compile(bench.pruned, name, Path(folder) / "bundle")
        session = self._stack.enter_context(Session(path, threads=bench.threads))
        return CompiledRun(session.manifest, session.request())


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


def _read_bundles(names: Sequence[str]) -> dict[str, Manifest]:
    found = {}
    for name in names:
        if name in RUNS:
            continue
        if not Path(name).is_dir():
            raise UserError(f"no run {name!r}", available=RUNS, fix="or give the directory of a bundle")
        found[name] = read_manifest(Path(name))
        check_comparable(found[name], name)
    return found


def _geometry_of(manifests: Sequence[Manifest]) -> Geometry:
    if not manifests:
        return Geometry()
    sizes = manifests[0].geometry
    return Geometry(sizes.batch, sizes.images, sizes.text_tokens, sizes.new_tokens)


def _check_geometry(bundles: dict[str, Manifest], wanted: Geometry | None, other: Manifest) -> None:
    """Every run must take the same rows."""
    for name, manifest in bundles.items():
        for size in ("batch", "images", "text_tokens", "new_tokens", "image_height", "image_width"):
            own = getattr(manifest.geometry, size)
            asked = getattr(wanted, size, None) if wanted else None
            against = getattr(other.geometry, size) if asked is None else asked
            if own != against:
                raise UserError(
                    f"compiled for {size} {own}, the other run for {against}", where=name,
                    fix="compile both for one geometry, or leave its options out",
                )  # fmt: skip
        if manifest.model.vocab_size != other.model.vocab_size:
            raise UserError("the two runs are of different models", where=name, fix="compare bundles of one model")


def _layout(manifest: Manifest) -> list[tuple[object, ...]]:
    return [(s.name, s.site, s.groups, s.length_in, s.length_out, s.chooses) for s in manifest.recipe.stages]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]
