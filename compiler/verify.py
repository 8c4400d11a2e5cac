"""``verify``: are the files those that were written, and does the bundle compute what the model computes?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.compiler.geometry import Geometry
from secateur.compiler.parity import Parity, RowInput, batches, compare_batch
from secateur.compiler.pruned import Job
from secateur.compiler.trace import Source, read_source
from secateur.passes.recipe_file import load_recipe
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import Manifest, check_files, hash_file, read_manifest


@dataclass(frozen=True)
class Verification:
    """``parity`` is None when only the files were checked."""

    bundle: Path
    files: int
    bytes: int
    parity: Parity | None

    @property
    def passed(self) -> bool:
        return self.parity is None or self.parity.passed

    def as_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle), "files": self.files, "bytes": self.bytes, "passed": self.passed,
            "parity": self.parity.as_json() if self.parity else None,
        }  # fmt: skip


def verify_bundle(
    bundle: Path,
    model_dir: Path | None,
    plan: Callable[..., Job],
    *,
    recipe: str | None = None,
    rows: int = 8,
    new_tokens: int = 4,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Hash every file; with ``model_dir`` also compare ``rows`` seeded random rows with the Hugging Face model.

    ``plan`` is the pipeline's ``plan_job``; ``recipe`` names the table row or YAML file when the manifest's name is
    not a row of the table. Raises BundleError for a file that is not what the manifest says, UserError when bundle,
    recipe and model do not belong together.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, "full")
    size = sum(f.bytes for f in manifest.files.values())
    if model_dir is None:
        return Verification(bundle, len(manifest.files), size, None)
    if manifest.target not in ("onnxruntime", "plain") or manifest.dtype != "fp32":
        raise UserError(
            f"a {manifest.dtype} bundle for {manifest.target} cannot be compared on the CPU",
            where=str(bundle),
            fix="compile the same recipe with --target onnxruntime and verify that",
        )
    from secateur.compiler.oracle import Oracle
    from secateur.runtime.session import Session

    job = recover_job(manifest, read_source(model_dir), plan, recipe)
    parity = Parity()
    seen: dict[Any, Any] = {}
    batch = manifest.geometry.batch
    with Session(bundle, threads=threads) as session:
        oracle = Oracle(job)
        items = random_rows(manifest, rows, new_tokens, seed)
        for done, chunk in enumerate(batches(items, batch)):
            compare_batch(session, oracle, chunk, parity, seen)
            progress(min((done + 1) * batch, rows), rows)
    return Verification(bundle, len(manifest.files), size, parity)


def recover_job(manifest: Manifest, source: Source, plan: Callable[..., Job], recipe: str | None) -> Job:
    """The job a bundle was compiled from; its digests must match the manifest's."""
    where = str(source.path)
    if hash_file(source.path / "config.json") != manifest.model.config_sha256:
        raise UserError("config.json is not the one the bundle was compiled from", where=where, fix="give that model")
    sizes = manifest.geometry
    geometry = Geometry(sizes.batch, sizes.images, sizes.text_tokens, sizes.new_tokens)
    row = load_recipe(recipe or manifest.recipe.name)
    job = plan(source, geometry, row, manifest.recipe.keep if row.stages else None)
    if hashlib.sha256(str(job.plan).encode()).hexdigest() != manifest.recipe.sha256:
        raise UserError(
            f"recipe {row.name} is not the one the bundle was compiled with", where="--recipe",
            fix="give the recipe file it was compiled with, or compile again",
        )  # fmt: skip
    return job


def random_rows(manifest: Manifest, rows: int, new_tokens: int, seed: int) -> list[RowInput]:
    """Seeded rows of different length: random text around the images' placeholders, noise for pixels."""
    sizes, model = manifest.geometry, manifest.model
    rng = np.random.default_rng(seed)
    special = {model.image_token_id, model.pad_token_id, *model.eos_token_ids}
    words = np.array([t for t in range(model.vocab_size) if t not in special])
    items = []
    for _ in range(rows):
        count = int(rng.integers(min(2, sizes.text_tokens), sizes.text_tokens + 1))
        text = rng.choice(words, count).tolist()
        # An image may stand anywhere but last: the model answers the text behind it.
        cuts = sorted(int(rng.integers(0, count)) for _ in range(sizes.images))
        image = [model.image_token_id] * sizes.features_per_image
        ids = text[: cuts[0]]
        for start, end in zip(cuts, [*cuts[1:], count], strict=True):
            ids = ids + image + text[start:end]
        shape = (sizes.images, 3, sizes.image_height, sizes.image_width)
        steps = min(new_tokens, sizes.new_tokens)
        items.append(RowInput(ids, rng.standard_normal(shape).astype(np.float32), rng.choice(words, steps).tolist()))
    return items
