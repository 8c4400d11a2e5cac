"""``verify``: are the files those that were written, and does the bundle compute what the model computes?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.compiler.geometry import Geometry
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Parity, compare_runs, without_infinity
from secateur.compiler.pruned import Job
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, OracleRun
from secateur.compiler.trace import Source, read_source
from secateur.passes.check_function import digest_plan
from secateur.passes.recipe_file import load_recipe
from secateur.runtime.errors import UserError, refuse_idle
from secateur.runtime.manifest import Manifest, check_files, hash_file, read_manifest
from secateur.runtime.probe import PixelDifference, find_difference
from secateur.runtime.self_test import SelfTestReport, check
from secateur.runtime.session import Session

ROWS = 8


@dataclass(frozen=True)
class Verification:
    """``parity`` is None when only the files were checked."""

    bundle: Path
    files: int
    bytes: int
    parity: Parity | None
    pixels: PixelDifference | None
    """How pictures come out differently here; None if they do not."""
    self_test: SelfTestReport

    @property
    def passed(self) -> bool:
        return self.self_test.passed and (self.parity is None or self.parity.passed)

    def as_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle), "files": self.files, "bytes": self.bytes, "passed": self.passed,
            "parity": without_infinity(self.parity.as_json()) if self.parity else None,
            "pixels": self.pixels.as_json() if self.pixels else None,
            "self_test": self.self_test.as_json(),
        }  # fmt: skip


def verify_bundle(
    bundle: Path,
    model_dir: Path | None,
    plan: Callable[..., Job],
    *,
    recipe: str | None = None,
    rows: int | None = None,
    new_tokens: int = 4,
    seed: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Hash every file and run the self-test; with ``model_dir`` also compare ``rows`` (8) seeded random rows with the
    Hugging Face model, as many for every geometry of the bundle.

    ``plan`` is the pipeline's ``plan_job``; ``recipe`` names the table row or YAML file when the manifest's name is
    not a row of the table. Raises BundleError for a file that is not what the manifest says, UserError when bundle,
    recipe and model do not belong together.
    """
    if model_dir is None:
        refuse_idle("no model is compared without model_dir", recipe=recipe, rows=rows, seed=seed)
    rows, seed = rows or ROWS, seed or 0
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, "full")
    size = sum(f.bytes for f in manifest.files.values())
    pixels, tested = find_difference(bundle, manifest), check(bundle, manifest, threads)
    if model_dir is None:
        return Verification(bundle, len(manifest.files), size, None, pixels, tested)
    check_comparable(manifest, str(bundle))
    source, geometries = read_source(model_dir), manifest.each_variant()
    jobs = [recover_job(one, source, plan, recipe) for one in geometries]
    model, parity, total = load_recording_model(source), Parity(), rows * len(jobs)
    with Session(bundle, threads=threads) as session:
        for index, (job, one) in enumerate(zip(jobs, geometries, strict=True)):
            oracle = Oracle(job, model)
            compare_runs(
                OracleRun(oracle), CompiledRun(one, session.request(index)), random_rows(one, rows, new_tokens, seed),
                one.geometry.batch, parity, referee=oracle,
                watch=lambda item, ours, theirs: progress(min(parity.rows, total), total),
            )  # fmt: skip
    return Verification(bundle, len(manifest.files), size, parity, pixels, tested)


def check_comparable(manifest: Manifest, where: str) -> None:
    """Refuse a bundle whose programs the CPU cannot run at the oracle's precision."""
    if manifest.target not in ("onnxruntime", "plain") or manifest.dtype != "fp32":
        raise UserError(
            f"a {manifest.dtype} bundle for {manifest.target} cannot be compared on the CPU",
            where=where,
            fix="compile the same recipe with --target onnxruntime and compare that",
        )


def check_model(manifest: Manifest, source: Source) -> None:
    """Refuse a model whose configuration is not the one a bundle was compiled from."""
    if hash_file(source.path / "config.json") != manifest.model.config_sha256:
        raise UserError(
            "config.json is not the one the bundle was compiled from", where=str(source.path), fix="give that model"
        )


def recover_job(manifest: Manifest, source: Source, plan: Callable[..., Job], recipe: str | None) -> Job:
    """The job a bundle was compiled from; its digests must match the manifest's."""
    check_model(manifest, source)
    geometry = Geometry.of(manifest)
    row = load_recipe(recipe or manifest.recipe.name)
    job = plan(source, geometry, row, manifest.recipe.keep if row.stages else None)
    if digest_plan(job.plan, job.stages) != manifest.recipe.sha256:
        raise UserError(
            f"recipe {row.name} is not the one the bundle was compiled with", where="--recipe",
            fix="give the recipe file it was compiled with, or compile again",
        )  # fmt: skip
    return job
