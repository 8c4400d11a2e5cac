"""Compiling several geometries into one bundle, and how they are written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.geometry_text import read_geometries
from secateur.compiler.pipeline import Geometry, verify
from secateur.runtime.errors import UserError
from secateur.runtime.kv import cache_bytes
from secateur.runtime.manifest import check_files, read_manifest
from secateur.runtime.session import Session
from secateur.tools import cli

SHORT = Geometry(text_tokens=24, new_tokens=8)
LONG = Geometry(text_tokens=40, new_tokens=16)
PAIR = Geometry(images=2, text_tokens=24, new_tokens=8)
ALL = (SHORT, LONG, PAIR)
PROGRAMS = ("vision", "prefill", "decode")


@pytest.fixture(scope="module")
def compiled(
    model_dir: Callable[..., Path], traced: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``compiled(*geometries, weights="stream")`` -> a bundle of FastV made of the session's traces; do not change."""
    root = tmp_path_factory.mktemp("geometries")
    made: dict[tuple[object, ...], Path] = {}

    def trace(source: Any, geometry: Geometry, dtype: str) -> Any:
        found = traced(batch=geometry.batch, images=geometry.images)
        return replace(found, source=source.at(geometry), geometry=geometry)

    def make(*geometries: Geometry, weights: str = "stream") -> Path:
        key = (geometries, weights)
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "trace_model", trace)
                made[key] = root / str(len(made))
                pipeline.compile(model_dir(), made[key], recipe="fastv", geometry=geometries, weights=weights)
        return made[key]

    return make


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(count)
    return [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


# -- bundles ----------------------------------------------------------------------------------------------


def test_geometries_share_the_weights_and_equal_graphs(compiled: Callable[..., Path]) -> None:
    bundle = compiled(*ALL)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, "full")
    assert manifest.weights == ["weights.safetensors"]
    assert {p.name for p in bundle.glob("*.onnx")} == {
        *(f"{name}.onnx" for name in PROGRAMS),
        "prefill.1.onnx", "decode.1.onnx",  # the tower sees what it sees in the first geometry
        *(f"{name}.2.onnx" for name in PROGRAMS),
    }  # fmt: skip
    assert [one.programs["vision"].graph for one in manifest.each_variant()] == [
        "vision.onnx", "vision.onnx", "vision.2.onnx",
    ]  # fmt: skip
    assert [Geometry.of(one) for one in manifest.each_variant()] == list(ALL)
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "manifest.json"}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_is_what_a_bundle_of_its_own_is(compiled: Callable[..., Path], number: int) -> None:
    whole, alone = compiled(*ALL), compiled(ALL[number])
    view, own = read_manifest(whole).variant(number), read_manifest(alone)
    for name in PROGRAMS:
        graph, other = view.programs[name].graph, own.programs[name].graph
        assert (whole / graph).read_bytes() == (alone / other).read_bytes()
    assert (whole / "weights.safetensors").read_bytes() == (alone / "weights.safetensors").read_bytes()
    left_out = {"programs", "files", "manifest_sha256"}
    assert view.model_dump(exclude=left_out) == own.model_dump(exclude=left_out)
    assert {n: (p.inputs, p.outputs, p.flops, p.unpruned_flops) for n, p in view.programs.items()} == {
        n: (p.inputs, p.outputs, p.flops, p.unpruned_flops) for n, p in own.programs.items()
    }


def test_prompts_run_in_the_smallest_and_say_what_a_bundle_of_its_own_says(compiled: Callable[..., Path]) -> None:
    asked = [("what", 1, 8, 0), ("what", 1, 9, 1), ("<image>" + "w" * 30, 1, 8, 1), ("what", 2, 8, 2)]
    with Session(compiled(*ALL), threads=1) as session:
        for text, images, count, number in asked:
            how = {"max_new_tokens": count, "ignore_eos": True}
            answer = session.generate(text, pictures(images), **how)
            assert answer.metrics.variant == number
            with Session(compiled(ALL[number]), threads=1) as own:
                assert own.generate(text, pictures(images), **how).tokens == answer.tokens
        with pytest.raises(UserError, match=r"no compiled geometry fits 1 prompt.s. with 2 image.s. and 9 new tokens"):
            session.generate("what", pictures(2), max_new_tokens=9)


def test_the_same_geometries_give_the_same_bytes(
    compiled: Callable[..., Path], model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """This one traces by itself, once for the two that differ in lengths of text."""
    told: list[str] = []
    geometries = [SHORT, LONG]
    out = tmp_path / "out"
    pipeline.compile(model_dir(), out, recipe="fastv", geometry=geometries, progress=lambda what, *_: told.append(what))
    first = compiled(SHORT, LONG)
    made, before = ({path.relative_to(one): path for path in one.rglob("*") if path.is_file()} for one in (out, first))
    assert made.keys() == before.keys()
    for name, path in made.items():
        assert path.read_bytes() == before[name].read_bytes(), name
    steps = [f"{step}, geometry {number}" for step in ("trace", "prune", "export") for number in (0, 1)]
    assert list(dict.fromkeys(told)) == [*steps, "weights", "self-test"]


def test_geometries_by_reference_point_into_the_same_files(compiled: Callable[..., Path]) -> None:
    bundle = compiled(SHORT, PAIR, weights="reference")
    manifest = read_manifest(bundle)
    assert manifest.weights == ["weights/model.safetensors"]
    assert (bundle / "weights/model.safetensors").stat().st_nlink > 1
    with Session(bundle, threads=1) as session, Session(compiled(*ALL), threads=1) as streamed:
        for count in (1, 2):
            answers = [one.generate("what", pictures(count), max_new_tokens=4) for one in (session, streamed)]
            assert answers[0].tokens == answers[1].tokens
        assert len(session.geometries) == 2


def test_verify_compares_every_geometry(compiled: Callable[..., Path], model_dir: Callable[..., Path]) -> None:
    found = verify(compiled(SHORT, PAIR), model_dir(), rows=2, new_tokens=2)
    assert found.passed
    assert found.parity is not None
    assert found.parity.rows == 4


def test_compare_takes_the_geometry_both_have(compiled: Callable[..., Path], model_dir: Callable[..., Path]) -> None:
    found = pipeline.compare(str(compiled(*ALL)), str(compiled(PAIR)), questions=2)
    assert found.passed
    assert found.parity.rows == 2
    found = pipeline.compare("oracle", str(compiled(*ALL)), model_dir=model_dir(), geometry=LONG, questions=2)
    assert found.passed


def secateur(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def test_inspect_and_profile_know_all_geometries(
    compiled: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = secateur(capsys, "inspect", compiled(*ALL))
    assert code == 0
    for number, one in enumerate(read_manifest(compiled(*ALL)).each_variant()):
        assert f"geometry {number}" in text
        assert one.words in " ".join(text.split())
        assert f"Segments of geometry {number}" in text
    code, text, _ = secateur(capsys, "inspect", compiled(SHORT))
    assert "of geometry" not in text
    code, text, _ = secateur(capsys, "inspect", compiled(*ALL), "--json")
    facts = json.loads(text)
    views = read_manifest(compiled(*ALL)).each_variant()
    assert [g["cache_bytes"] for g in facts["geometries"]] == [cache_bytes(one) for one in views]
    assert facts["cache_bytes"] == facts["geometries"][0]["cache_bytes"]
    measured = ("--geometry", "2", "--repeat", "1", "--warmup", "0", "--no-memory", "--json", "-")
    code, text, _ = secateur(capsys, "profile", compiled(*ALL), *measured)
    assert code == 0
    (bundle,) = json.loads(text)["bundles"]
    assert bundle["geometry"]["images"] == 2
    code, _, err = secateur(capsys, "profile", compiled(*ALL), "--geometry", "3")
    assert code == 2
    assert "no geometry 3 (available: 0: batch 1, 1 image(s)" in err


# -- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["audio_seconds", "frames", "text_tokens"])
def test_what_is_counted_is_whole(name: str) -> None:
    with pytest.raises(UserError, match=f"geometry: {name} is 2.5; give a whole number"):
        Geometry(**{name: 2.5})  # type: ignore[arg-type]  # that is the fault


def test_options_become_geometries() -> None:
    plain, given = Geometry(batch=2, text_tokens=32), {"batch": 2, "text_tokens": 32}
    assert read_geometries([], given) == (plain,)
    video = "frames=8,fps=1.5,audio_seconds=4,audio_in_video=no"
    texts = ["images=2, text-tokens=128", "image_size=448x224,new_tokens=9", video]
    assert read_geometries(texts, given) == (
        replace(plain, images=2, text_tokens=128),
        replace(plain, image_size=(448, 224), new_tokens=9),
        replace(plain, images=0, frames=8, fps=1.5, audio_seconds=4, audio_in_video=False),
    )


def test_a_file_lists_geometries(tmp_path: Path) -> None:
    file = tmp_path / "sizes.yaml"
    file.write_text(
        "- {images: 1, text-tokens: 64}\n- images: 2\n  image_size: [448, 224]\n- {frames: 4, fps: 2, "
        "audio_in_video: false, audio_seconds: 2, image_size: 56x84}\n- {}\n"
    )
    plain = Geometry(new_tokens=5)
    assert read_geometries([str(file), "batch=3"], {"new_tokens": 5}) == (
        replace(plain, text_tokens=64),
        replace(plain, images=2, image_size=(448, 224)),
        replace(plain, images=0, frames=4, image_size=(56, 84), audio_seconds=2, audio_in_video=False),
        plain,
        replace(plain, batch=3),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture=2", "--geometry picture=2: no such field 'picture' (available: batch, images, text_tokens, new_"),
        ("images", "'images' is not key=value (available: batch, images,"),
        ("images=", "'images=' is not key=value"),
        ("", "'' is not key=value"),
        ("images=2,,batch=1", "'' is not key=value"),
        ("images=2,images=3", "images is given twice"),
        ("text-tokens=2,text_tokens=3", "text_tokens is given twice"),
        ("images=two", "images: 'two' is not a whole number"),
        ("images=1.5", "images: '1.5' is not a whole number"),
        ("images=0", "--geometry images=0: images is 0; give --images a number of at least 1"),
        ("image_size=448", "image_size: '448' is not height x width; write 448x448"),
        ("image_size=0x4", "image_size is 0x4"),
        ("fps=fast", "fps: 'fast' is not a number"),
        ("fps=0", "fps is 0"),
        ("fps=3", "fps is 3.0, but there is no video; give --frames as well"),
        ("audio_in_video=no,audio_seconds=2", "audio_in_video is False, but there is no video with sound"),
        ("images=1,frames=4", "1 images beside a video of 4 frames"),
        ("images=1,image_size=4x4,8x8", "2 sizes for 1 images"),
        ("audio_in_video=perhaps", "audio_in_video: no choice 'perhaps' (available: true, false)"),
        ("images=2,frames=4", "2 images beside a video of 4 frames"),
    ],
)
def test_options_that_are_no_geometry(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_geometries([text], {})
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--geometry {text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images: 2", "must be a list of mappings; write one line per geometry"),
        ("", "must be a list of mappings"),
        ("[]", "must be a list of mappings"),
        ("- 3", "[0]: 3 is not a mapping (available: batch, images"),
        ("- {images: 1}\n- {pictures: 2}", "[1]: no such field 'pictures' (available: batch"),
        ("- {images: true}", "[0]: images: True is not a whole number"),
        ("- {images: [1]}", "[0]: images: [1] is not a whole number"),
        ("- {image_size: [448]}", "[0]: image_size: [448] is not height x width"),
        ("- {text_tokens: 1, text-tokens: 2}", "[0]: a field is given twice"),
        ("- {images: 1, images: 2}", "key 'images' is given twice in the mapping at line 1"),
        ("- {images: ", "not YAML: "),
    ],
)
def test_files_that_list_no_geometries(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sizes.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_geometries([str(file)], {})
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--geometry {file}")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .No such file"):
        read_geometries([str(tmp_path / "none.yaml")], {})
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot be read .not UTF-8"):
        read_geometries([str(tmp_path / "bytes.yml")], {})


def test_what_cannot_be_compiled_together(
    capsys: pytest.CaptureFixture[str], model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    out, model = tmp_path / "out", model_dir()
    cases: list[tuple[list[object], str]] = [
        (["--geometry", "images=1", "--geometry", "images=2", "--geometry", "text_tokens=64"],
         "--geometry: geometry 2 is geometry 0 again: batch 1, 1 image(s) of 32x32 per row, 64 text tokens"),
        (["--geometry", "images=1", "--geometry", "images=1,image_size=99x99"], "geometry 1: "),
        (["--geometry", "images=1", "--geometry", "images=2", "--stop-after", "drop_noops"],
         "--stop-after: the programs of one geometry can be printed, 2 are given"),
    ]  # fmt: skip
    for options, message in cases:
        code, _, err = secateur(capsys, "compile", model, "-o", out, *options)
        assert code == 2
        assert message in err
        assert not out.exists()
    with pytest.raises(UserError, match="an empty list of geometries"):
        pipeline.compile(model, out, geometry=[])
    with pytest.raises(UserError, match="a dict is no Geometry"):
        pipeline.compile(model, out, geometry=[{"images": 2}])  # type: ignore[list-item]


def test_bundles_of_several_batches(compiled: Callable[..., Path]) -> None:
    """Prompts choose by their number."""
    with Session(compiled(SHORT, replace(SHORT, batch=2)), threads=1) as session:
        one = session.generate("what", pictures(1), max_new_tokens=3)
        both = session.generate(["what", "who"], [pictures(1), pictures(1)], max_new_tokens=3)
    assert (one.metrics.variant, both[0].metrics.variant) == (0, 1)
    assert both[0].tokens == one.tokens
