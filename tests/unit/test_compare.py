"""`compare`: runs that agree, choices told from numbers, and the pass at fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.compiler import passlist, pipeline, score_ops
from secateur.compiler.bundle import outline
from secateur.compiler.inputs import RowInput, random_rows, respace
from secateur.compiler.parity import TOLERANCE
from secateur.compiler.pipeline import PASSES, Geometry, Pass, compare, plan_job, read_questions
from secateur.compiler.program import Program, ProgramSet, args_of
from secateur.compiler.recording import load_recording_model
from secateur.compiler.trail import follow_passes
from secateur.passes.edit import aten, is_call
from secateur.passes.recipe_file import load_recipe
from secateur.runtime.errors import UserError
from secateur.tools import cli

from . import tiny_onevision

GEOMETRY = Geometry(batch=1, images=1, text_tokens=24, new_tokens=8)
TWO_STAGES = """
name: two
stages:
  - {{site: vision.out, score: {{name: seeded_random, options: {{seed: {seed}}}}}, select: top_k, share: 0.5}}
  - site: 'decoder.layer[1]'
    score: {{name: last_query_attention_mean, options: {{heads: max}}}}
    select: top_k
    share: 0.25
    scope: whole
"""


@pytest.fixture
def model(model_dir: Callable[..., Path], traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory whose trace is not made again."""
    monkeypatch.setattr(pipeline, "trace_model", lambda source, geometry, dtype="fp32": traced())
    return model_dir()


@pytest.fixture
def two_stages(tmp_path: Path) -> Callable[[int], str]:
    """A recipe file of two stages, the first by chance; ``two_stages(seed)`` -> its path."""

    def write(seed: int) -> str:
        path = tmp_path / f"two-{seed}.yaml"
        path.write_text(TWO_STAGES.format(seed=seed))
        return str(path)

    return write


def run(a: str | Path, b: str | Path, model: Path, **how: Any) -> Any:
    return compare(a, b, model_dir=model, **{"geometry": GEOMETRY, "questions": 3, "threads": 1, **how})


def largest(found: Any) -> float:
    return max(found.parity.kind(kind).largest for kind in found.parity.scales)


# -- runs that agree --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [("oracle", "fx"), ("fx", "plain"), ("plain", "onnxruntime")])
def test_every_kind_of_run_computes_the_same(
    a: str, b: str, model: Path, two_stages: Callable[[int], str], tmp_path: Path
) -> None:
    out = tmp_path / "compared"
    found = run(a, b, model, recipe=two_stages(3), out=out)
    assert found.passed
    assert (found.verdict, found.footprints, found.answers.differ_at) == ("equal", None, [None] * 3)
    assert set(found.parity.stages) == {"stage0", "stage1"}
    assert {d for d in found.parity.differences if "." not in d or d.endswith(".stage1")} == {
        "features",
        "hidden.stage1",
    }
    assert [n for n in found.parity.differences if n.startswith("logits")] == [f"logits.{i}" for i in range(4)]
    assert 0 < largest(found) <= TOLERANCE * 10
    report = json.loads((out / "report.json").read_text())
    assert report == found.as_json()
    stored = [np.load(out / f"{name}.npz") for name in "ab"]
    assert set(stored[0].files) == set(stored[1].files)
    assert {"row0/kept.stage1", "row2/logits.3", "row1/key.3", "row0/tokens", "row0/hidden.stage1"} <= set(
        stored[0].files
    )
    for name in stored[0].files:
        np.testing.assert_allclose(stored[0][name], stored[1][name], rtol=0, atol=1e-3)


def test_answers_are_those_of_the_run_itself(model: Path, two_stages: Callable[[int], str], tmp_path: Path) -> None:
    """Two recipes that keep other tokens: each goes on with what it finds likeliest, not with what was forced."""
    recipe, bundle = two_stages(3), tmp_path / "bundle"
    pipeline.compile(model, bundle, recipe=two_stages(4), geometry=GEOMETRY)
    run("oracle", bundle, model, recipe=recipe, out=tmp_path / "compared", questions=4)
    run("oracle", bundle, model, recipe=two_stages(4), out=tmp_path / "itself", questions=4)
    other, itself = (np.load(tmp_path / name / "b.npz") for name in ("compared", "itself"))
    for row in range(4):
        np.testing.assert_array_equal(other[f"row{row}/tokens"], itself[f"row{row}/tokens"])


def test_a_stage_that_leaves_nothing_shows_no_choice(model: Path, tmp_path: Path) -> None:
    """Every pass is looked at: none is blamed for what the run says it does not give."""
    recipe = tmp_path / "leaves.yaml"
    stages = "{site: 'decoder.layer[1]', score: seeded_random, select: top_k, share: 0.5, scope: whole}"
    gone = "{site: 'decoder.layer[3]', select: nothing, share: 0.0, scope: whole}"
    recipe.write_text(f"name: leaves\nstages:\n  - {stages}\n  - {gone}\n")
    found = run("oracle", "fx", model, recipe=str(recipe), questions=1, passes=True)
    assert found.passed
    assert set(found.parity.stages) == {"stage0"}
    assert {"hidden.stage0", "hidden.stage1"} < set(found.parity.differences)
    assert found.first_pass is None
    assert [step.name for step in found.footprints] == ["trace", *(step.name for step in PASSES)]


# -- choices and numbers ----------------------------------------------------------------------------------


def test_another_choice_is_not_another_computation(
    model: Path, two_stages: Callable[[int], str], tmp_path: Path
) -> None:
    """The first stage keeps other random tokens; the second ranks what is left as the oracle does."""
    bundle = tmp_path / "bundle"
    pipeline.compile(model, bundle, recipe=two_stages(4), geometry=GEOMETRY)
    found = run("oracle", bundle, model, recipe=two_stages(3))
    assert found.verdict == "chose differently"
    assert not found.passed
    first, second = (found.parity.stages[name] for name in ("stage0", "stage1"))
    assert (first.equal, first.different, second.different, second.equal) == (0, 3, 0, 3)
    assert 0 < sum(first.jaccard) < 3
    assert sum(second.jaccard) < 3
    assert found.parity.mismatches == [f"stage0 row {row}" for row in range(3)]
    assert found.first_pass is None
    assert found.footprints is not None, "the compiler is looked at, and found innocent"
    assert not any(step.changes for step in found.footprints)
    free = run("oracle", bundle, model, recipe=two_stages(3), force_keep=False, passes=False)
    assert free.verdict == "chose and computed differently"
    assert free.footprints is None


def test_bundles_are_compared_without_a_model(model: Path, two_stages: Callable[[int], str], tmp_path: Path) -> None:
    one, other, whole = (tmp_path / name for name in ("one", "other", "whole"))
    for path, recipe in ((one, two_stages(3)), (other, two_stages(4)), (whole, "none")):
        pipeline.compile(model, path, recipe=recipe, geometry=GEOMETRY)
    assert compare(one, one, questions=2, threads=1).passed
    found = compare(one, other, questions=2, threads=1)
    assert found.verdict == "chose differently, or met a tie: give model and recipe to tell"
    assert not found.passed
    apart = compare(one, whole, questions=2, threads=1)
    assert apart.verdict == "prune at other places, to other lengths or out of other caches"
    assert not apart.passed
    assert apart.parity.logits > 0, "the same questions, answered with other tokens"


# -- the pass at fault ------------------------------------------------------------------------------------


def scale_weight(program: Program) -> Program:
    """A fault: the last matrix the program reads, half as large again."""
    module = program.edit()
    linear = [n for n in module.graph.nodes if is_call(n, aten.linear.default)][-1]
    weight = args_of(linear)[1]
    with module.graph.inserting_before(linear):
        scaled = module.graph.call_function(aten.mul.Tensor, (weight, 1.5))
    scaled.meta = {"val": weight.meta["val"], "layer": linear.meta.get("layer")}
    linear.replace_input_with(weight, scaled)
    return program.with_module(module)


def prefer_the_worst(program: Program) -> Program:
    """A fault: what is ranked is turned around before it is cut."""
    module = program.edit()
    for node in [n for n in module.graph.nodes if is_call(n, score_ops.top_rows)]:
        ranked = args_of(node)[0]
        with module.graph.inserting_before(node):
            turned = module.graph.call_function(aten.neg.default, (ranked,))
        turned.meta = {"val": ranked.meta["val"]}
        node.replace_input_with(ranked, turned)
    return program.with_module(module)


def with_fault(name: str, program: str, fault: Callable[[Program], Program]) -> tuple[Pass, ...]:
    """The pass list whose pass ``name`` also does ``fault`` to one of the programs it leaves."""
    (index,) = [i for i, step in enumerate(PASSES) if step.name == name]
    good = PASSES[index]

    def bad(programs: ProgramSet, job: Any) -> ProgramSet:
        left = good.run(programs, job)
        return left.update(fault(left[program]))

    return (*PASSES[:index], replace(good, run=bad), *PASSES[index + 1 :])


def plant(monkeypatch: pytest.MonkeyPatch, passes: tuple[Pass, ...]) -> None:
    """Another list for what runs the passes, and for what looks for the first that changes numbers."""
    for module in (passlist, pipeline):
        monkeypatch.setattr(module, "PASSES", passes)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("drop_noops", "vision"), ("fold_rms_norm", "head"), ("fold_rotary", "decoder"),
        ("insert_vision_stages", "vision"), ("split_phases", "prefill_decoder"),
        ("insert_decoder_stages", "prefill_decoder"), ("attach_caches", "decode_decoder"),
        ("join_phases", "prefill"), ("refresh_shapes", "decode"),
    ],
)  # fmt: skip
def test_the_pass_that_scales_a_weight_is_named(
    name: str, program: str, model: Path, two_stages: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, with_fault(name, program, scale_weight))
    found = run("oracle", "fx", model, recipe=two_stages(3), questions=2)
    assert not found.passed
    assert not found.parity.computed_equally
    assert found.first_pass == name
    assert found.footprints[0].name == "trace"


def test_the_pass_that_ranks_otherwise_is_named(
    model: Path, two_stages: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = with_fault("insert_decoder_stages", "prefill_decoder", prefer_the_worst)
    plant(monkeypatch, faulty)
    found = run("oracle", "fx", model, recipe=two_stages(3), questions=2)
    assert found.verdict == "chose differently"
    assert found.first_pass == "insert_decoder_stages"
    assert found.parity.stages["stage0"].equal == 2
    assert found.parity.stages["stage1"].different == 2


def test_a_fault_behind_the_passes_is_not_theirs(
    model: Path, two_stages: Callable[[int], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle whose weights were changed on disk: all passes are clean, and it is said where to look."""
    bundle, recipe = tmp_path / "bundle", two_stages(3)
    pipeline.compile(model, bundle, recipe=recipe, geometry=GEOMETRY)
    weights = bundle / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    values = np.frombuffer(bytes(raw[start:]), np.float32).copy()
    values[::100] *= 1.5
    weights.write_bytes(bytes(raw[:start]) + values.tobytes())
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["compare", "oracle", str(bundle), "--model", str(model), "--recipe", recipe, "--questions", "2",
             "--threads", "1"]
        )  # fmt: skip
    shown = capsys.readouterr().out
    assert stop.value.code == 1
    assert "none changes numbers: look at the export, the backend, or how a bundle was made" in shown
    assert f"verdict  oracle and {bundle}:" in shown
    assert "computed differently" in shown


@pytest.fixture(scope="module")
def two_images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trace of LLaVA-OneVision for two images, each with a row behind it, in a batch of two."""
    source = pipeline.read_source(tiny_onevision.write_model(tmp_path_factory.mktemp("two") / "model"))
    return pipeline.trace_model(source, Geometry(batch=2, images=2, text_tokens=16, new_tokens=4))


@pytest.mark.parametrize("recipe", ["none", "vision"])
def test_no_pass_changes_numbers_where_rows_follow_each_image(recipe: str, two_images: Any, tmp_path: Path) -> None:
    source = two_images.source
    if recipe == "vision":
        stage = "{site: projector.out, score: {name: seeded_random, options: {seed: 3}}, select: top_k, share: 0.5}"
        path = tmp_path / "vision.yaml"
        path.write_text(f"name: vision\nstages:\n  - {stage}\n")
        recipe = str(path)
    job = plan_job(source, two_images.geometry, load_recipe(recipe), None)
    item = random_rows(outline(job), 1, 1, seed=1)[0]
    steps = follow_passes(two_images, job, PASSES, load_recording_model(source), item)
    assert [step.name for step in steps] == ["trace", *(step.name for step in PASSES)]
    assert not any(step.changes for step in steps), [step.as_json() for step in steps]
    assert {step.against for step in steps} == {"the oracle", "the pass before"}


# -- rows -------------------------------------------------------------------------------------------------


def test_rows_come_from_a_file(model: Path, tmp_path: Path) -> None:
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"image": "0.png", "question": "which?", "answer": "b", "more": 1}\n\n{"image": ["1.png"], "question": "?"}\n'
    )
    assert [q.answer for q in read_questions(data)] == ["b", None]
    assert len(read_questions(data, 1)) == 1
    found = run("oracle", "fx", model, recipe="fastv", data=data, questions=None)
    assert found.passed
    assert found.parity.rows == 2
    data.write_text('{"image": ["0.png", "1.png"], "question": "which?"}\n')
    with pytest.raises(UserError, match=r"data.jsonl:1: 2 image\(s\), the comparison is for 1 per row"):
        run("oracle", "fx", model, data=data)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ("[1]", "not a JSON object"),
        ('{"image": "a.png"}', "no field 'question' (available: image)"),
        ('{"image": 1, "question": "?"}', "image must be a path or a list of paths"),
        ('{"image": [], "question": "?"}', "image must be a path or a list of paths"),
        ('{"image": "a.png", "question": 2}', "question and answer must be text"),
        ('{"image": "absent.png", "question": "?"}', "no image "),
        ("\udcff".encode("utf-8", "surrogateescape"), "not a text file in UTF-8"),
        ("", "no question in it"),
    ],
)
def test_lines_that_are_no_questions(line: str | bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    data = tmp_path / "data.jsonl"
    data.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(UserError) as error:
        read_questions(data)
    assert complaint in str(error.value)
    assert str(data) in str(error.value)


def test_a_row_is_given_room_for_other_features() -> None:
    item = RowInput([5, 3, 3, 6, 3, 3, 7], np.zeros(0), ())
    assert list(respace(item, 3, [2], [1]).input_ids) == [5, 3, 6, 3, 7]
    assert list(respace(item, 3, [2], [3]).input_ids) == [5, 3, 3, 3, 6, 3, 3, 3, 7]


# -- what cannot be compared ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "options", "complaint"),
    [
        (("oracle", "elsewhere"), {}, "no run 'elsewhere' (available: oracle, fx, plain, onnxruntime)"),
        (("oracle", "fx"), {"model_dir": None}, "--model: run 'oracle' needs the model"),
        (("oracle", "fx"), {"keep": 0.5, "recipe": None}, "--keep: a keep ratio needs a recipe"),
        (("fx", "BUNDLE"), {"geometry": Geometry(1, 2, 24, 8)}, "compiled for images 1, the other run for 2"),
        (("BUNDLE", "BUNDLE"), {"recipe": "random"}, None),
        (("BUNDLE", "BUNDLE"), {"model_dir": None, "passes": True}, "--passes: passes are looked at in a model"),
    ],
)
def test_refusals(
    runs: tuple[str, str], options: dict[str, Any], complaint: str | None, model: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    if "BUNDLE" in runs:
        pipeline.compile(model, bundle, recipe="fastv", geometry=GEOMETRY)
    how = {"model_dir": model, "geometry": None, "questions": 1, "threads": 1, "recipe": None, **options}
    named = [str(bundle) if run == "BUNDLE" else run for run in runs]
    if complaint is None:  # another recipe than the bundles': nobody to judge, and nothing to judge either
        assert compare(*named, **how).verdict == "equal"
        return
    with pytest.raises(UserError) as error:
        compare(*named, **how)
    assert complaint in str(error.value)


def test_an_output_that_exists_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        run("oracle", "fx", model, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_report_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "oracle", "fx", "--model", str(model), "--recipe", "fastv", "--keep", "0.5", "--questions"]
    sizes = ["--text-tokens", "24", "--new-tokens", "8"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "1", *sizes, "--answer-tokens", "2", "--json", "--quiet"])
    report = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert (report["verdict"], report["first_pass"], report["passes"]) == ("equal", None, None)
    assert report["parity"]["stages"]["stage0"] == {
        "equal": 1,
        "tied": 0,
        "different": 0,
        "jaccard": 1.0,
        "lowest_jaccard": 1.0,
    }
