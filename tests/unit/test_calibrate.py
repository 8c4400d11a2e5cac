"""`calibrate`: what is measured, the file, and recipes that refer to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.calibration import Calibrated, read_calibration, read_reference
from secateur.compiler.oracle import Oracle
from secateur.compiler.pipeline import Geometry, calibrate, plan_job, write_calibrated
from secateur.passes.recipe_file import load_recipe, recipe_from_yaml, recipe_to_yaml
from secateur.passes.vocabulary import bind_stage
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.processing import Processor, RowMedia
from secateur.tools import cli

from . import tiny_model

GEOMETRY = Geometry(batch=1, images=1, text_tokens=24, new_tokens=4)
RECIPE = """
name: biased
stages:
  - site: 'decoder.layer[1]'
    score: {name: position_bias, options: {weights: OPTION}, of: [{name: last_query_attention_mean}]}
    select: top_k
    share: 0.5
    scope: whole
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index, question in enumerate(("what is it?", "how many?", "which one of them?")):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": question}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def scores(model_dir: Callable[..., Path], data: Path) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per question, FastV's scores [N] and the first token's row before the site [D], taken from the oracle by hand."""
    long = Geometry(batch=1, images=1, text_tokens=64, new_tokens=1)
    job = plan_job(pipeline.read_source(model_dir()), long, load_recipe("fastv"), 0.5)
    oracle = Oracle(job)
    site = job.stages[0].planned.site.layer
    rows = []
    for question in pipeline.read_questions(data):
        found: list[torch.Tensor] = []

        def take(module: Any, args: Any, found: list[torch.Tensor] = found) -> None:
            found.append(args[0][0, 0].clone())

        hook = oracle.layers[site].register_forward_pre_hook(take)
        processor = Processor(model_dir(), outline(job))
        ids = processor.encode(question.text)
        pixels = torch.from_numpy(processor.tower_input(RowMedia(question.images[:1]))[0])
        run = oracle.run(ids, pixels)
        hook.remove()
        rows.append((run.score["stage0"][0], found[0]))
    return rows


# -- what is measured -------------------------------------------------------------------------------------


def test_the_mean_its_inverse_the_mass_and_the_sinks(
    model_dir: Callable[..., Path], data: Path, scores: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    found = calibrate(model_dir(), data, recipe="fastv", keep=0.5, curve=False, mass=0.8, tau=1.5)
    stage = found.stages["stage0"]
    every = torch.stack([score for score, _ in scores]).double()
    mean = every.mean(0)
    assert stage.tokens == tiny_model.PATCHES
    np.testing.assert_allclose(stage.mean_score, mean, rtol=1e-4)
    assert stage.position_weights is not None
    np.testing.assert_allclose(stage.position_weights, mean.min() / mean, rtol=1e-4)
    assert max(stage.position_weights) == 1.0
    weighted = mean * torch.tensor(stage.position_weights)
    assert float(weighted.max() / weighted.min()) == pytest.approx(1.0, rel=1e-4)
    shares = [[sum(sorted(row, reverse=True)[:k]) / sum(row) for k in range(1, 17)] for row in every.tolist()]
    assert stage.count == next(k for k in range(1, 17) if np.mean([row[k - 1] for row in shares]) >= 0.8)
    huge = [{d for d in range(len(row)) if abs(row[d]) > 1.5 * float((row**2).mean()) ** 0.5} for _, row in scores]
    assert stage.sink_dims == sorted(d for d in set.union(*huge) if sum(d in one for one in huge) >= 2)
    assert stage.sink_dims
    assert (found.data.count, found.data.name, found.recipe.keep) == (3, "questions.jsonl", 0.5)


def test_a_curve_is_smooth_and_close(model_dir: Callable[..., Path], data: Path) -> None:
    stage = calibrate(model_dir(), data, recipe="fastv").stages["stage0"]
    assert stage.position_weights is not None
    height = np.log(stage.position_weights)
    np.testing.assert_allclose(np.diff(height, 3), 0, atol=1e-4)  # a parabola's third differences vanish
    fitted = np.polyval(np.polyfit(np.arange(16), -np.log(stage.mean_score), 2), np.arange(16))
    np.testing.assert_allclose(height - height[0], fitted - fitted[0], atol=1e-3)


def test_the_same_questions_make_the_same_file(model_dir: Callable[..., Path], data: Path) -> None:
    one, other = (calibrate(model_dir(), data, recipe="pyramiddrop", questions=2) for _ in range(2))
    assert one.to_bytes() == other.to_bytes()
    assert [stage.tokens for stage in one.stages.values()] == [16, 8, 4]
    fewer = calibrate(model_dir(), data, recipe="pyramiddrop", questions=1)
    assert fewer.data.sha256 != one.data.sha256


def test_weights_of_the_recipe_itself_are_put_aside(model_dir: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    path = tmp_path / "biased.yaml"
    path.write_text(RECIPE.replace("OPTION", "[1.0, 0.01]"))
    plain, biased = (calibrate(model_dir(), data, recipe=r, keep=0.5, questions=1) for r in ("fastv", str(path)))
    assert biased.stages["stage0"].mean_score == plain.stages["stage0"].mean_score


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"recipe": "none"}, "--recipe: recipe none has no score to calibrate"),
        ({"recipe": "divprune"}, "--recipe: recipe divprune has no score to calibrate"),
        ({"recipe": "fastv", "tau": 0.0}, "--tau: tau is 0"),
        ({"recipe": "fastv", "mass": 1.0}, "--mass: mass is 1"),
    ],
)
def test_what_cannot_be_measured(
    options: dict[str, Any], complaint: str, model_dir: Callable[..., Path], data: Path
) -> None:
    with pytest.raises(UserError) as error:
        calibrate(model_dir(), data, **options)
    assert str(error.value).startswith(complaint)


# -- recipes that refer to it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(model_dir: Callable[..., Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "made.json"
    path.write_bytes(calibrate(model_dir(), data, recipe="fastv", keep=0.5).to_bytes())
    return path


def test_a_bundle_carries_the_digest(
    model_dir: Callable[..., Path],
    traced: Callable[..., Any],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the measured recipe file to a bundle that equals the oracle; the weights do change the choice."""
    geometry = Geometry(batch=1, images=1, text_tokens=24, new_tokens=8)
    monkeypatch.setattr(pipeline, "trace_model", lambda source, geometry, dtype="fp32": traced())
    recipe, bundle = file.parent / "biased.yaml", tmp_path / "bundle"
    write_calibrated("fastv", recipe, file)
    pipeline.compile(model_dir(), bundle, recipe=str(recipe), keep=0.5, geometry=geometry)
    calibration, sha256 = read_calibration(file)
    assert sha256 == calibration.sha256
    manifest = read_manifest(bundle)
    assert manifest.recipe.calibrations == {"made.json": sha256}
    score = manifest.recipe.stages[0].score
    assert score is not None
    assert score.startswith("position_bias(last_query_attention_mean(")
    assert score.endswith(f"weights=file:made.json#stage0.position_weights@{sha256[:12]})")
    assert str(file.parent) not in (bundle / "manifest.json").read_text()
    found = pipeline.verify(bundle, model_dir(), recipe=str(recipe), rows=2, threads=1)
    assert found.passed, found.parity
    apart = pipeline.compare(
        "oracle", bundle, model_dir=model_dir(), recipe="fastv", keep=0.5, questions=8, threads=1, passes=False
    )
    assert apart.parity.chose_differently > 0
    assert apart.parity.computed_equally


def test_a_recipe_is_written_with_its_references(file: Path) -> None:
    recipe = load_recipe(str(write_calibrated("fastv_sink_masked", file.parent / "masked.yaml", file)))
    assert recipe.name == "fastv_sink_masked_calibrated"
    score = recipe.stages[0].score
    assert score is not None
    weights = score.options["weights"]
    assert isinstance(weights, Calibrated)
    assert list(weights) == read_calibration(file)[0].stages["stage0"].position_weights
    again = recipe_from_yaml(recipe_to_yaml(recipe), folder=file.parent)
    assert again == recipe
    assert bind_stage(again.stages[0], "test").score.options["weights"] is not None  # type: ignore[union-attr]
    with pytest.raises(UserError, match="write it beside the calibration file"):
        write_calibrated("fastv", file.parent / "elsewhere" / "r.yaml", file)
    with pytest.raises(UserError, match="measured with other stages"):
        write_calibrated("pyramiddrop", file.parent / "r.yaml", file)


def test_numbers_from_python(file: Path) -> None:
    sha256 = read_calibration(file)[1]
    found = read_reference(f"file:{file}#stage0.mean_score@{sha256}")
    assert (len(found), found.origin.field, found.origin.tokens) == (16, "mean_score", 16)


def load(option: str, folder: Path) -> Any:
    return recipe_from_yaml(RECIPE.replace("OPTION", json.dumps(option)), folder=folder)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("file:made.json", "options.weights: 'file:made.json' refers to nothing"),
        ("file:absent.json#stage0.position_weights@12345678", "absent.json: cannot read it: No such file"),
        ("file:made.json#stage0.position_weights", "the digest of made.json is missing; end the reference with @"),
        ("file:made.json#stage0.position_weights@00000000", "made.json has another digest; end the reference with @"),
        ("file:made.json#stage0.position_weights@DIGIT", "made.json has another digest"),
        ("file:made.json#stage7.position_weights@DIGEST", "no stage 'stage7' in made.json (available: stage0)"),
        ("file:made.json#stage0.weights@DIGEST", "no field 'weights' in made.json (available: mean_score, "),
        ("file:made.json#stage0.sink_dims@DIGEST", "made.json has no sink_dims for stage0: none were found"),
        ("file:other.json#stage0.mean_score@DIGEST", "other.json: not a calibration file"),
    ],
)
def test_references_that_do_not_hold(option: str, complaint: str, file: Path) -> None:
    (file.parent / "other.json").write_text("{}")
    sha256 = read_calibration(file)[1]
    with pytest.raises(UserError) as error:
        load(option.replace("DIGEST", sha256[:8]).replace("DIGIT", sha256[:2]), file.parent)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.update(schema_version=2), "not a calibration file: schema_version: Input should be 1"),
        (lambda c: c.update(more=1), "not a calibration file: more: Extra inputs are not permitted"),
        (lambda c: c["stages"]["stage0"].update(position_weights="1"), "stages.stage0.position_weights"),
        (lambda c: c["stages"]["stage0"]["position_weights"].pop(), "changed.json has 15 numbers for 16 tokens"),
    ],
)
def test_files_that_are_no_calibration(change: Callable[[Any], Any], complaint: str, file: Path) -> None:
    content = json.loads(file.read_text())
    change(content)
    changed = file.parent / "changed.json"
    changed.write_text(json.dumps(content))
    digest = hashlib.sha256(changed.read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        load(f"file:changed.json#stage0.position_weights@{digest}", file.parent)
    assert complaint in str(error.value)


def test_numbers_of_another_model_or_another_number_of_tokens(
    model_dir: Callable[..., Path], file: Path, tmp_path: Path
) -> None:
    sha256 = read_calibration(file)[1]
    recipe = load(f"file:made.json#stage0.position_weights@{sha256[:12]}", file.parent)
    with pytest.raises(UserError, match=r"stage0: position_bias\.weights: made\.json was made for another model"):
        plan_job(pipeline.read_source(model_dir("qwen2")), GEOMETRY, recipe, 0.5)
    two = Geometry(batch=1, images=2, text_tokens=24, new_tokens=4)
    with pytest.raises(UserError, match=r"made\.json holds 16 places, 32 tokens enter here"):
        plan_job(pipeline.read_source(model_dir()), two, recipe, 0.5)
    assert plan_job(pipeline.read_source(model_dir()), GEOMETRY, recipe, 0.5).stages


# -- the verb ---------------------------------------------------------------------------------------------


def test_the_verb(
    model_dir: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "made.json", tmp_path / "made.yaml"
    arguments = ["calibrate", str(model_dir()), str(data), "-o", str(out), "--questions", "2", "--tau", "2"]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, *more])
        return stop.value.code, *capsys.readouterr()  # type: ignore[return-value]

    code, shown, _ = run("--write-recipe", str(recipe))
    sha256 = read_calibration(out)[1]
    assert code == 0
    assert "fastv, keep 0.5, 2 questions of questions.jsonl" in shown
    assert f"weights  file:made.json#stage0.position_weights@{sha256[:12]}\n" in shown
    assert shown.endswith(f"recipe   {recipe}\nsha256   {sha256}\n")
    assert load_recipe(str(recipe)).stages[0].score is not None
    code, _, complaint = run()
    assert (code, complaint) == (2, f"error: {out}: exists already; choose another name, or replace it with --force\n")
    code, shown, _ = run("--force", "--json", "--quiet")
    assert (code, json.loads(shown)["sha256"]) == (0, sha256)
