"""What two compared runs stand on: the model, the job, one trace, one loaded checkpoint, the same rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from secateur.compiler.bundle import outline
from secateur.compiler.geometry import Geometry
from secateur.compiler.inputs import Asked, RowInput, question_rows, random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Run
from secateur.compiler.processor_files import open_processor
from secateur.compiler.pruned import Job, Pruned
from secateur.compiler.questions import read_questions
from secateur.compiler.recipe import Recipe
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Respaced, Weights
from secateur.compiler.trace import Source, Traced, read_source
from secateur.compiler.trail import Footprint, Step, follow_passes
from secateur.compiler.verify import check_comparable, check_model, recover_job
from secateur.passes.recipe_file import load_recipe
from secateur.runtime.backends.cores import bound_threads
from secateur.runtime.errors import UserError
from secateur.runtime.leftovers import held_directory
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


class CommonGround:
    """Made once for both runs, each part when it is first asked for. ``job`` is None for two bundles without a model;
    ``manifest`` says what the rows are for."""

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
        self.tools, self.threads = tools, None if threads is None else bound_threads(threads)
        self.bundles, self.variants = _read_bundles(names, geometry)
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

    def read_rows(self, data: Path | Sequence[Asked] | None, count: int | None, seed: int) -> list[RowInput]:
        if data is None:
            return random_rows(self.manifest, count or RANDOM_ROWS, 0, seed)
        opened = Processor if self.job is None else open_processor
        processor = opened(self.directory, self.manifest)
        asked = read_questions(data, count) if isinstance(data, Path) else data[:count]
        return question_rows(processor, self.manifest.geometry.images, asked)

    @property
    def cannot_follow(self) -> str:
        """Why the passes of this model cannot be looked at one by one; empty if they can."""
        assert self.job is not None
        if self.job.source.audio is not None:
            return "programs of a model that hears"
        return "programs of several image sizes" if self.job.sizes else ""

    def follow(self, item: RowInput, progress: Callable[[str, int, int], None]) -> list[Footprint]:
        assert self.job is not None
        names = ["trace", *(step.name for step in self.tools.passes)]
        return follow_passes(
            self.traced, self.job, self.tools.passes, self.model, item,
            lambda name: progress(f"pass: {name}", names.index(name), len(names)),
        )  # fmt: skip


class OpenRun:
    """One run while it is open; ``layout`` says where it takes out how many tokens."""

    def __init__(self, ground: CommonGround, name: str) -> None:
        self.ground, self.name = ground, name
        self._stack = ExitStack()

    def __enter__(self) -> OpenRun:
        ground, name = self.ground, self.name
        manifest = ground.bundles.get(name, ground.manifest)
        self.layout = layout_of(manifest)
        run = self._open(manifest)
        before, after = (m.geometry.features_of_images for m in (ground.manifest, manifest))
        if before != after:
            run = Respaced(run, manifest.model.image_token_id, before, after)
        self.run = run
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, manifest: Manifest) -> Run:
        ground, name = self.ground, self.name
        if name == "oracle":
            return OracleRun(ground.oracle)
        if name == "fx":
            pruned = ground.pruned
            programs = pruned.programs.programs
            backend = EagerBackend(programs, Weights(pruned.job.source, pruned.traced.model))
            told = outline(pruned.job, pruned.programs)
            return CompiledRun(told, Request(backend, told))
        path = Path(name)
        if name in RUNS:
            folder = self._stack.enter_context(held_directory(Path(tempfile.gettempdir()), "secateur-compare-"))
            path = ground.tools.compile(ground.pruned, name, Path(folder) / "bundle")
        session = self._stack.enter_context(Session(path, threads=ground.threads))
        request = session.request(ground.variants.get(name, 0))
        return CompiledRun(request.manifest, request)


def _read_bundles(names: Sequence[str], geometry: Geometry | None) -> tuple[dict[str, Manifest], dict[str, int]]:
    """What each bundle says of the geometry that is compared, and which of its geometries that is: ``geometry``, else
    the first that all of them have, else the first."""
    whole: dict[str, Manifest] = {}
    for name in names:
        if name in RUNS:
            continue
        if not Path(name).is_dir():
            raise UserError(f"no run {name!r}", available=RUNS, fix="or give the directory of a bundle")
        whole[name] = read_manifest(Path(name))
        check_comparable(whole[name], name)
    sizes = {name: [Geometry.of(one) for one in manifest.each_variant()] for name, manifest in whole.items()}
    wanted = geometry
    if wanted is None and sizes:
        first, *others = sizes.values()
        wanted = next((one for one in first if all(one in other for other in others)), None)
    chosen = {name: own.index(wanted) if wanted in own else 0 for name, own in sizes.items()}
    return {name: manifest.variant(chosen[name]) for name, manifest in whole.items()}, chosen


def _geometry_of(manifests: Sequence[Manifest]) -> Geometry:
    if not manifests:
        return Geometry()
    return Geometry.of(manifests[0])


def _check_geometry(bundles: dict[str, Manifest], wanted: Geometry | None, other: Manifest) -> None:
    """Every run must take the same rows."""
    for name, manifest in bundles.items():
        for size, own in vars(Geometry.of(manifest)).items():
            against = vars(wanted or Geometry.of(other))[size]
            if own != against:
                raise UserError(
                    f"compiled for {size} {own}, the other run for {against}", where=name,
                    fix="compile both for one geometry, or leave its options out",
                )  # fmt: skip
        if manifest.model.vocab_size != other.model.vocab_size:
            raise UserError("the two runs are of different models", where=name, fix="compare bundles of one model")


def layout_of(manifest: Manifest) -> list[tuple[object, ...]]:
    """Where a bundle takes out how many tokens, and whether stages inside it shorten earlier caches."""
    stages = [(s.name, s.site, s.groups, s.length_in, s.length_out, s.chooses) for s in manifest.recipe.stages]
    inside = any(s.site.startswith("decoder.") for s in manifest.recipe.stages)
    return [*stages, *([(manifest.recipe.cache,)] if inside else [])]
