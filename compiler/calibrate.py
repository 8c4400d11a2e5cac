"""Measure a model on questions: what a recipe's scores owe to a token's place, to sinks, and how fast they fall."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur
from secateur.compiler.bundle import outline
from secateur.compiler.calibration import (
    CalibratedModel,
    CalibratedRecipe,
    Calibration,
    CalibrationData,
    StageCalibration,
    read_calibration,
    read_reference,
)
from secateur.compiler.geometry import Geometry, Sizes
from secateur.compiler.inputs import Asked, question_rows
from secateur.compiler.judge import run_oracle
from secateur.compiler.oracle import Oracle
from secateur.compiler.processor_files import open_processor
from secateur.compiler.pruned import Job
from secateur.compiler.questions import read_questions
from secateur.compiler.recipe import Recipe, Stage, Term
from secateur.compiler.trace import read_source
from secateur.passes.recipe_file import load_recipe, recipe_to_yaml
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import hash_file

TAU = 20.0
"""How many times the root mean square of its row an entry of a sink dimension is at least."""
MASS = 0.9
_ROOM = 1 << 16
"""Text tokens a prompt may have: the oracle needs no bucket."""
_DIGITS = 6
_DEGREE = 2


@dataclass
class _Measured:
    """Sums over the rows seen of one stage: ``score [N]``, ``shares [N]`` of the k highest scores in all of them, and
    ``sinks [D]`` rows whose first token is huge there."""

    groups: int = 0
    score: Tensor = field(default_factory=lambda: torch.zeros(()))
    shares: Tensor | None = field(default_factory=lambda: torch.zeros(()))
    firsts: int = 0
    sinks: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, score: Tensor) -> None:
        """``score [G,N]`` of one row."""
        wide = score.double()
        self.groups += len(wide)
        self.score = self.score + wide.sum(0)
        if self.shares is not None and bool((wide >= 0).all()) and bool((wide.sum(1) > 0).all()):
            held = wide.sort(1, descending=True).values.cumsum(1)
            self.shares = self.shares + (held / held[:, -1:]).sum(0)
        else:
            self.shares = None


def calibrate_model(
    model_dir: Path,
    data: Path | Sequence[Asked],
    plan: Callable[..., Job],
    *,
    recipe: Recipe | str,
    keep: float | None = None,
    questions: int | None = None,
    tau: float = TAU,
    mass: float = MASS,
    curve: bool = True,
    image_size: Sizes | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Calibration:
    """Run a recipe's stages on the first ``questions`` of ``data`` in the eager oracle and measure their scores.

    A recipe's own position weights are put aside while it is measured. ``curve`` draws a smooth curve through the mean
    scores, as few questions leave what they show in the means; see :class:`StageCalibration` for ``tau`` and
    ``mass``, and :class:`Geometry` for ``image_size``. ``plan`` is the pipeline's ``plan_job``. The
    answers to the questions are not read. Raises UserError for a recipe without a score.
    """
    for name, value, low, high in (("tau", tau, 0.0, float("inf")), ("mass", mass, 0.0, 1.0)):
        if not low < value < high:
            raise UserError(f"{name} is {value:g}", where=f"--{name}", fix="give a number above 0, for mass below 1")
    source = read_source(model_dir)
    asked = read_questions(data, questions) if isinstance(data, Path) else data[:questions]
    geometry = Geometry(1, len(asked[0].images), text_tokens=_ROOM, new_tokens=1, image_size=image_size)
    row = load_recipe(recipe) if isinstance(recipe, str) else recipe
    job = plan(source, geometry, _map_terms(row, _put_weights_aside), keep if row.stages else None)
    scored = [stage for stage in job.stages if stage.bound.score is not None]
    if not scored:
        raise UserError(f"recipe {row.name} has no score to calibrate", where="--recipe")
    if job.sizes and any(stage in scored for stage in job.vision_stages):
        raise UserError(
            f"recipe {row.name} scores before the decoder, where images of several sizes are apart",
            where="--image-size", fix="calibrate with images of one size",
        )  # fmt: skip
    manifest = outline(job)
    items = question_rows(open_processor(model_dir, manifest), geometry.images, asked)
    oracle = Oracle(job)
    measured = {stage.planned.name: _Measured() for stage in scored}
    progress("questions", 0, len(items))
    for done, item in enumerate(items, 1):
        with _watch_first_token(oracle, measured, tau, item.input_ids[0] == manifest.model.image_token_id):
            seen = run_oracle(oracle, item)
        for name, found in measured.items():
            found.add(seen.score[name])
        progress("questions", done, len(items))
    text = str(job.plan)
    name = data.name if isinstance(data, Path) else "questions"
    return Calibration(
        secateur=secateur.__version__,
        model=CalibratedModel(source=manifest.model.source, config_sha256=hash_file(model_dir / "config.json")),
        recipe=CalibratedRecipe(
            name=row.name, keep=float(job.plan.keep), plan=text.splitlines(),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        ),
        data=CalibrationData(name=name, count=len(asked), sha256=_digest(asked)),
        stages={s.planned.name: _describe(s.planned, measured[s.planned.name], tau, mass, curve) for s in scored},
    )  # fmt: skip


def write_calibrated(recipe: Recipe | str, path: Path, calibration: Path) -> Path:
    """The recipe with a calibration's numbers as a recipe file at ``path`` that refers to the file beside or below it:
    every decoder stage weighted by place, and sinks masked by dimension where the recipe masks sinks."""
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if recipe.parts:
        raise UserError(f"{recipe.name} is composed", where="--write-recipe", fix="calibrate its parts one by one")
    if not calibration.resolve().is_relative_to(path.resolve().parent):
        raise UserError(
            f"it could not refer to {calibration}", where=str(path), fix="write it beside the calibration file"
        )
    below = calibration.resolve().relative_to(path.resolve().parent).as_posix()
    made, _ = read_calibration(calibration)
    if len(made.recipe.plan) - 1 != len(recipe.stages):
        raise UserError(
            f"{made.recipe.name} was measured with other stages than it has", where="--write-recipe",
            fix="refer to the numbers in a recipe file of your own",
        )  # fmt: skip

    def refer(stage: str, name: str) -> Any:
        return read_reference(made.refer(below, stage, name), path.parent)

    stages = []
    for index, stage in enumerate(recipe.stages):
        name = f"stage{index}"
        found = made.stages.get(name)
        if found is not None and stage.score is not None:
            dims = refer(name, "sink_dims") if found.sink_dims else None
            weights = refer(name, "position_weights") if found.position_weights else None
            stage = replace(stage, score=_put_in(stage, dims, weights))
        stages.append(stage)
    text = recipe_to_yaml(replace(recipe, name=f"{recipe.name}_calibrated", stages=tuple(stages), settings=()))
    path.write_text(text, encoding="utf-8")
    return path


def _put_in(stage: Stage, dims: Any, weights: Any) -> Term:
    assert stage.score is not None
    placed = False

    def change(term: Term) -> Term:
        nonlocal placed
        if term.name == "sink_mask" and dims is not None:
            return replace(term, options={**term.options, "dims": dims})
        if term.name == "position_bias" and weights is not None:
            placed = True
            return replace(term, options={**term.options, "weights": weights})
        return term

    score = _map_term(stage.score, change)
    if weights is None or placed or stage.site.kind != "decoder.layer":
        return score
    return Term("position_bias", {"weights": weights}, of=(score,))


def _put_weights_aside(term: Term) -> Term:
    return replace(term, options={**term.options, "weights": [1.0]}) if term.name == "position_bias" else term


def _map_terms(recipe: Recipe, change: Callable[[Term], Term]) -> Recipe:
    """The recipe with every score changed, of composed ones in their parts as well."""
    stages = tuple(replace(s, score=_map_term(s.score, change) if s.score else None) for s in recipe.stages)
    parts = tuple(replace(part, recipe=_map_terms(part.recipe, change)) for part in recipe.parts)
    return replace(recipe, stages=stages, parts=parts)


def _map_term(term: Term, change: Callable[[Term], Term]) -> Term:
    return change(replace(term, of=tuple(_map_term(inner, change) for inner in term.of)))


@contextmanager
def _watch_first_token(oracle: Oracle, measured: dict[str, _Measured], tau: float, is_image: bool) -> Any:
    """Count, per decoder stage, in which dimensions the prompt's first token is huge; an image's is no sink by rights.

    No stage removes or moves a first token that is text.
    """

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            row = args[0][0, 0].float()
            if not is_image and name not in seen:
                seen.add(name)
                huge = row.abs() * torch.rsqrt((row * row).mean() + 1e-6) > tau
                measured[name].firsts += 1
                measured[name].sinks = measured[name].sinks + huge

        return hook

    seen: set[str] = set()
    places = [s.planned for s in oracle.job.decoder_stages if s.planned.name in measured]
    hooks = [oracle.layers[p.site.layer or 0].register_forward_pre_hook(count(p.name)) for p in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _describe(planned: Any, found: _Measured, tau: float, mass: float, curve: bool) -> StageCalibration:
    mean = found.score / found.groups
    weights = _invert(mean, curve).tolist() if float(mean.min()) > 0 else None
    count = None
    if found.shares is not None:
        count = min(int((found.shares / found.groups < mass).sum()) + 1, planned.length_in)
    dims = None
    if planned.site.kind == "decoder.layer":
        dims = torch.nonzero(found.sinks * 2 > found.firsts).flatten().tolist() if found.firsts else []
    return StageCalibration(
        site=str(planned.site), tokens=planned.length_in, mean_score=_short(mean.tolist()),
        curve=curve, position_weights=None if weights is None else _short(weights), mass=mass, count=count, tau=tau,
        sink_dims=dims,
    )  # fmt: skip


def _invert(mean: Tensor, curve: bool) -> Tensor:
    """Weights ``[N]`` that even out means ``[N]``, the largest 1."""
    height = mean.log()
    if curve:
        place = torch.linspace(-1, 1, len(mean), dtype=mean.dtype)
        powers = torch.stack([place**n for n in range(min(_DEGREE, len(mean) - 1) + 1)], 1)
        height = powers @ torch.linalg.lstsq(powers, height[:, None]).solution[:, 0]
    return (height.min() - height).exp()


def _short(values: Sequence[float]) -> list[float]:
    """Six digits: more are noise, and the file is read by people."""
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def _digest(asked: Sequence[Asked]) -> str:
    found = hashlib.sha256()
    for question in asked:
        for image in question.images:
            content = hash_file(image) if isinstance(image, Path) else np.asarray(image).tobytes().hex()
            found.update(content.encode())
        found.update(json.dumps(question.text).encode())
    return found.hexdigest()
