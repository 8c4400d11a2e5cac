"""A bundle's self-test: what it holds, and that every thing that can be wrong on a machine is named, with how far."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image
from typer.testing import CliRunner

from secateur.compiler.self_test import add_self_test, check_level
from secateur.runtime import self_test
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.manifest import read_manifest, write_manifest
from secateur.runtime.schema_self_test import SELF_TEST
from secateur.runtime.session import Session
from secateur.runtime.weight_file import read_header
from secateur.tools.cli import app

STEPS = ["pixels", "ids", "features", "survivors", "tokens", "logits"]


@pytest.fixture(scope="module")
def made(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two rows with its self-test. Do not change it."""
    out = Path(tiny.build(tmp_path_factory.mktemp("tested") / "bundle", tiny.Tiny(batch=2, text_tokens=64)))
    write_manifest(out, add_self_test(out, read_manifest(out), "full"))
    return out


@pytest.fixture
def tested(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def verify(bundle: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON, and what a person is told."""
    told = CliRunner().invoke(app, ["verify", str(bundle), "--json"])
    shown = CliRunner().invoke(app, ["verify", str(bundle)])
    assert told.exit_code == shown.exit_code
    return told.exit_code, json.loads(told.output)["self_test"], shown.output


def steps_of(found: dict[str, Any], *states: str) -> list[str]:
    return list(dict.fromkeys(step["name"] for step in found["steps"] if step["state"] in states))


def rewrite(tiny: ModuleType, bundle: Path, change: Any) -> None:
    """Change the self-test's file and sign the bundle anew."""
    path = bundle / SELF_TEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    tiny.relist(bundle)


def numbers(content: dict[str, Any]) -> dict[str, Any]:
    return next(case["numbers"] for case in content["cases"] if case["name"] == "exact")  # type: ignore[no-any-return]


def test_a_whole_bundle_passes_every_step(made: Path) -> None:
    code, found, shown = verify(made)
    assert (code, found["passed"], found["first"], found["note"]) == (0, True, None, "")
    assert [step["name"] for step in found["steps"] if step["case"] == "geometry 0, exact"] == STEPS
    assert [step["name"] for step in found["steps"] if step["case"] == "geometry 0, resized"] == STEPS[:2]
    assert steps_of(found, "equal") == STEPS
    assert "test     pixels equal; ids equal; features equal; survivors equal; tokens equal; logits equal" in shown
    with Session(made, threads=2) as session:
        assert self_test.run(session).passed


def test_what_a_host_finds(made: Path) -> None:
    """Files that the manifest lists, levels that the digest covers, logits of every decode step."""
    manifest, content = json.loads((made / "manifest.json").read_text()), json.loads((made / SELF_TEST).read_text())
    assert manifest["self_test"] == SELF_TEST
    case = next(case for case in content["cases"] if case["name"] == "exact")
    files = [file for row in case["rows"] for file in row["images"]]
    assert len({*files}) == 2
    assert {*files, SELF_TEST} < manifest["files"].keys()
    assert sum(path.stat().st_size for path in (made / "self_test").iterdir()) < 20_000
    assert len(case["rows"][0]["ids"]) > len(case["rows"][1]["ids"])
    assert case["rows"][0]["text"] == "user: <image>Describe what is shown here.assistant:"
    assert case["chat"]["text"] == "user: Look closely.<image>Describe what is shown here.assistant:"
    # The tiny bundle's processor only resizes and normalises: the levels of pictures of its size are the pictures'.
    levels = [np.asarray(Image.open(made / file)).transpose(2, 0, 1) for file in files]
    assert hashlib.sha256(np.stack(levels).tobytes()).hexdigest() == case["pixels"]["sha256"]
    steps = case["numbers"]["logits"]
    assert [len(row) for row in case["numbers"]["tokens"]] == [len(steps)] * 2 == [8, 8]
    for step, logits in enumerate(steps):
        best = {}
        for at, value in zip(logits["at"], logits["values"], strict=True):
            row, token = divmod(at, 260)
            best[row] = max(best.get(row, (-np.inf, -1)), (value, token))
        assert [best[row][1] for row in (0, 1)] == [tokens[step] for tokens in case["numbers"]["tokens"]]


def test_the_numbers_are_those_of_a_session(made: Path, tiny: ModuleType) -> None:
    """A prompt and its picture through the public road: the same tokens and survivors, from the bundle's own model."""
    case = next(c for c in json.loads((made / SELF_TEST).read_text())["cases"] if c["name"] == "exact")
    with Session(made) as session:
        found = session.generate(
            [row["prompt"] for row in case["rows"]], [[made / row["images"][0]] for row in case["rows"]],
            max_new_tokens=8, ignore_eos=True, temperature=0,
        )  # fmt: skip
    assert [one.tokens for one in found] == case["numbers"]["tokens"]
    assert {name: kept.tolist() for name, kept in found[0].metrics.kept.items()} == case["numbers"]["survivors"]


def test_the_same_bytes_with_any_number_of_threads(
    made: Path, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    out = tiny.build(tmp_path / "bundle", tiny.Tiny(batch=2, text_tokens=64))
    write_manifest(out, add_self_test(out, read_manifest(out), "auto"))
    for path in sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file()):
        assert (out / path).read_bytes() == (made / path).read_bytes(), path


def test_without_numbers_it_says_how_to_have_them(tiny: ModuleType, bundle: Path) -> None:
    write_manifest(bundle, add_self_test(bundle, read_manifest(bundle), "inputs"))
    code, found, shown = verify(bundle)
    assert (code, steps_of(found, "equal")) == (0, STEPS[:2])
    assert "no survivors, tokens and logits to compare: compile with --self-test full to have them" in shown


def test_a_bundle_without_one_names_the_command(bundle: Path) -> None:
    code, found, shown = verify(bundle)
    assert (code, found["passed"], found["steps"]) == (0, True, [])
    assert "test     the bundle has none; to have one, compile it again: secateur compile MODEL_DIR -o BUNDLE" in shown


def test_a_machine_without_the_library(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    code, found, shown = verify(made)
    assert (code, steps_of(found, "equal")) == (0, STEPS[:2])
    assert "onnxruntime is not installed: pip install 'secateur[cpu]'" in shown
    with pytest.raises(UserError, match="--self-test full: onnxruntime is not installed"):
        check_level("full", "plain", "fp32")


@pytest.mark.parametrize(("target", "dtype"), [("onnxruntime-cuda", "fp16"), ("tensorrt", "fp16"), ("plain", "bf16")])
def test_targets_that_do_not_run_here(tiny: ModuleType, bundle: Path, target: str, dtype: str) -> None:
    with pytest.raises(UserError, match=f"programs of {dtype} for {target} do not run on the CPU.*--self-test inputs"):
        check_level("full", target, dtype)
    manifest = read_manifest(bundle).model_copy(update={"target": target, "dtype": dtype})
    added = add_self_test(bundle, manifest, "auto")
    assert added.self_test == SELF_TEST
    assert "numbers" not in (bundle / SELF_TEST).read_text()


def test_a_large_model_is_not_run(bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("secateur.compiler.self_test.MOST_FLOPS", 1)
    with caplog.at_level("INFO", "secateur"):
        add_self_test(bundle, read_manifest(bundle), "auto")
    assert "they would take 0 GFLOPs, more than 0; --self-test full makes them" in caplog.text
    assert "numbers" not in (bundle / SELF_TEST).read_text()


def test_no_such_level() -> None:
    with pytest.raises(UserError, match=r"--self-test: no self-test 'some' \(available: auto, full, inputs, none\)"):
        check_level("some", "onnxruntime", "fp32")


def test_programs_that_do_not_run(tiny: ModuleType, tmp_path: Path, caplog: Any) -> None:
    """``full`` refuses the bundle, ``auto`` leaves the numbers out and says so; nothing is left over."""
    out = tiny.build(tmp_path / "bundle", tiny.Tiny(nan=True))
    with pytest.raises(Exception, match="not finite numbers"):
        add_self_test(out, read_manifest(out), "full")
    write_manifest(out, add_self_test(out, read_manifest(out), "auto"))
    assert "the self-test holds no survivors, tokens and logits: program prefill: the outputs are not" in caplog.text
    assert verify(out)[0] == 0


# -- faults --------------------------------------------------------------------------------------------------------


def resize_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another filter for every resize, as another release of Pillow has another order of its passes."""
    real = Image.Image.resize

    def resize(self: Image.Image, size: Any, resample: Any = None, *how: Any, **more: Any) -> Image.Image:
        return real(self, size, Image.Resampling.NEAREST, *how, **more)

    monkeypatch.setattr(Image.Image, "resize", resize)


def test_pixels_of_another_machine(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize_otherwise(monkeypatch)
    code, found, shown = verify(made)
    assert (code, found["first"]) == (1, "pixels")
    step = found["steps"][0]
    assert (step["case"], step["state"]) == ("geometry 0, resized", "differs")
    assert 5 < step["largest"] <= 255
    assert f"pixels of geometry 0, resized: up to {step['largest']:.0f} of 255 levels apart" in shown
    # Pictures of the compiled size are not resized: what programs make of them is compared all the same.
    assert steps_of(found, "differs") == ["pixels"]
    assert "logits equal" in shown


def test_pixels_of_another_pillow(tiny: ModuleType, tested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(content: dict[str, Any]) -> None:
        for case in content["cases"]:
            case["pixels"]["pillow"] = "1.0"

    rewrite(tiny, tested, older)
    resize_otherwise(monkeypatch)
    code, found, shown = verify(tested)
    assert (code, found["first"], steps_of(found, "follows")) == (0, None, ["pixels"])
    assert f"Pillow {PIL.__version__} makes other pixels than Pillow 1.0" in shown


def test_programs_behind_other_pixels_are_not_blamed(tiny: ModuleType, tested: Path) -> None:
    """A tower whose pictures are resized even where they have the compiled size, or a picture that was exchanged."""
    content = json.loads((tested / SELF_TEST).read_text())
    file = next(c for c in content["cases"] if c["name"] == "exact")["rows"][0]["images"][0]
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tested / file)
    tiny.relist(tested)
    code, found, shown = verify(tested)
    assert (code, found["first"], steps_of(found, "differs")) == (1, "pixels", ["pixels"])
    assert "features" in steps_of(found, "follows")
    assert "it follows from other pixels" in shown


def test_another_normalisation(tiny: ModuleType, tested: Path) -> None:
    path = tested / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "image_std": [s * 1.01 for s in settings.get("image_std") or [0.5] * 3]}))
    tiny.relist(tested)
    code, found, shown = verify(tested)
    assert (code, found["first"]) == (1, "pixels")
    assert "is allowed (" in shown


def test_another_tokenizer(tiny: ModuleType, tested: Path) -> None:
    path = tested / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["D"], vocabulary["h"] = vocabulary["h"], vocabulary["D"]
    path.write_text(json.dumps(content))
    tiny.relist(tested)
    code, found, shown = verify(tested)
    assert (code, found["first"]) == (1, "ids")
    # The programs are given the stored ids.
    assert steps_of(found, "differs") == ["ids"]
    assert "ids of geometry 0, resized: row 0: id " in shown
    assert "logits equal" in shown


def test_another_template(tiny: ModuleType, tested: Path) -> None:
    path = tested / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant:", "answer:"))
    tiny.relist(tested)
    _, found, shown = verify(tested)
    assert found["first"] == "ids"
    assert "ids instead of" in shown


def test_other_weights(tiny: ModuleType, tested: Path) -> None:
    """One weight of the head, whose file is signed anew."""
    path = next(tested.glob("*.safetensors"))
    place = read_header(path).tensors["head"].offset
    values = np.memmap(path, np.float32, "r+", place, 16 * 260)
    values *= 1.01
    values.flush()
    tiny.relist(tested)
    code, found, shown = verify(tested)
    assert (code, found["first"]) == (1, "logits")
    assert steps_of(found, "differs") == ["logits"]
    assert "the first step that differs: logits" in shown


def test_other_survivors(tiny: ModuleType, tested: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        stages = numbers(content)["survivors"]
        name = sorted(stages)[0]
        stages[name][1][0] = next(place for place in range(4) if place not in stages[name][1])

    rewrite(tiny, tested, change)
    code, found, shown = verify(tested)
    assert (code, found["first"], steps_of(found, "differs")) == (1, "survivors", ["survivors"])
    assert "row 1: 1 of 3 are other tokens" in shown or "row 1: 1 of 1 are other tokens" in shown


def test_other_tokens(tiny: ModuleType, tested: Path) -> None:
    """The last one, which no later step is given."""

    def change(content: dict[str, Any]) -> None:
        numbers(content)["tokens"][0][-1] = 17

    rewrite(tiny, tested, change)
    code, found, shown = verify(tested)
    assert (code, found["first"], steps_of(found, "differs")) == (1, "tokens", ["tokens"])
    assert "1 other token(s); row 0, token 7: " in shown


@pytest.mark.parametrize("step", [0, 7])
def test_logits_that_are_twice_the_tolerance_away(tiny: ModuleType, tested: Path, step: int) -> None:
    def change(content: dict[str, Any]) -> None:
        one = numbers(content)["logits"][step]
        one["values"][3] += 2 * one["tolerance"]

    rewrite(tiny, tested, change)
    code, found, shown = verify(tested)
    assert (code, found["first"], steps_of(found, "differs")) == (1, "logits", ["logits"])
    told = next(s for s in found["steps"] if s["name"] == "logits")
    assert f"step {step}: up to {told['largest']:.2g} away, {told['tolerance']:.2g} is allowed (1 of " in shown
    assert abs(told["largest"] / told["tolerance"] - 2) < 0.1


@pytest.mark.parametrize("other", ["values", "shape"])
def test_a_step_within_its_tolerance_does_not_hide_one_that_differs(tiny: ModuleType, tested: Path, other: str) -> None:
    """Tolerances differ from step to step: the larger difference need not be the one that counts."""

    def change(content: dict[str, Any]) -> None:
        first, second, *_ = numbers(content)["logits"]
        if other == "shape":
            first["shape"] = [*first["shape"][:-1], first["shape"][-1] + 1]
        else:
            first["tolerance"] /= 4
            first["values"][3] += 1.5 * first["tolerance"]
        second["values"][3] += 0.9 * second["tolerance"]

    rewrite(tiny, tested, change)
    code, found, shown = verify(tested)
    assert (code, found["first"], steps_of(found, "differs")) == (1, "logits", ["logits"])
    assert "step 0: " in shown
    json.dumps(found, allow_nan=False)


def test_rounding_is_within_the_tolerance(tiny: ModuleType, tested: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        one = numbers(content)["logits"][2]
        one["values"] = [value + 0.5 * one["tolerance"] for value in one["values"]]

    rewrite(tiny, tested, change)
    code, found, shown = verify(tested)
    assert (code, steps_of(found, "within")) == (0, ["logits"])
    assert "logits within " in shown


# -- bad files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format=2), "has format 2, this secateur reads up to 1; upgrade with: pip install"),
        (lambda c: c.update(format=0), "format: "),
        (lambda c: c["cases"][0].update(geometry=3), "no geometry 3"),
        (lambda c: c["cases"][0]["rows"].pop(), "its rows do not fit the geometry"),
        (lambda c: c["cases"][0]["rows"][0].update(images=["self_test/x.png"]), "x.png is not listed in files"),
        (lambda c: c["cases"][0]["rows"][0].update(images=["../x.png"]), "leaves the bundle"),
        (lambda c: c["cases"][0]["rows"][0].update(ids=[1] * 1000), "its rows do not fit the geometry"),
        (lambda c: numbers(c)["tokens"].pop(), "its tokens do not fit the geometry"),
        (lambda c: numbers(c)["tokens"][0].__setitem__(0, 10**6), "token 1000000 of 260"),
        (lambda c: numbers(c)["logits"][0]["values"].pop(), "do not fit the shape"),
        (lambda c: numbers(c)["features"]["at"].__setitem__(-1, 10**9), "do not fit the shape"),
        (lambda c: [rows.pop() for rows in numbers(c)["survivors"].values()], "its survivors do not fit"),
        (lambda c: c["cases"][0]["pixels"]["levels"].pop(), " levels at "),
    ],
)  # fmt: skip
def test_self_tests_that_cannot_be(tiny: ModuleType, tested: Path, change: Any, says: str) -> None:
    rewrite(tiny, tested, change)
    with pytest.raises(BundleError, match=says) as caught:
        self_test.check(tested, read_manifest(tested))
    assert "\n" not in str(caught.value)
    shown = CliRunner().invoke(app, ["verify", str(tested)])
    assert shown.exit_code == 2


def test_a_file_that_the_manifest_does_not_list(tiny: ModuleType, bundle: Path) -> None:
    tiny.resign(bundle, self_test="self_test.json")
    with pytest.raises(BundleError, match=r"self_test.json is not listed in files"):
        read_manifest(bundle)
