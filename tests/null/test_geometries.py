"""A bundle of several geometries: which one a prompt runs in, what is said when none fits, manifests that lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")

from secateur.runtime import Session, UserError
from secateur.runtime.errors import BundleError, MisfitError
from secateur.runtime.manifest import check_files, read_manifest
from secateur.runtime.pick import Asked, order_by_size, pick
from secateur.runtime.row_media import count_kinds, gather
from secateur.runtime.schema import PROGRAMS, Variant

SMALL = {"images": 1, "text_tokens": 24, "new_tokens": 8}
LARGE = {"images": 2, "text_tokens": 48, "new_tokens": 12}


@pytest.fixture(scope="module")
def alone(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, int]], Path]:
    """A bundle of one geometry."""
    root = tmp_path_factory.mktemp("alone")
    made: dict[str, Path] = {}

    def make(sizes: dict[str, int]) -> Path:
        key = str(sizes)
        if key not in made:
            made[key] = tiny.build(root / str(len(made)), tiny.Tiny(**sizes))
        return made[key]

    return make


@pytest.fixture(scope="module")
def two(tiny: ModuleType, alone: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SMALL and LARGE in one bundle; do not change it."""
    bundle, second = tmp_path_factory.mktemp("two") / "bundle", alone(LARGE)
    shutil.copytree(alone(SMALL), bundle)
    said = json.loads((second / "manifest.json").read_text())
    own = {name: said[name] for name in Variant.model_fields}
    for name in PROGRAMS:
        shutil.copyfile(second / f"{name}.onnx", bundle / f"{name}.1.onnx")
        own["programs"][name] |= {"graph": f"{name}.1.onnx", "flops": 5000}
    assert (second / "weights.safetensors").read_bytes() == (bundle / "weights.safetensors").read_bytes()
    tiny.relist(bundle)
    tiny.resign(bundle, variants=[own])
    return bundle


@pytest.fixture(scope="module")
def session(two: Path) -> Session:
    return Session(two, threads=1)


@pytest.fixture
def spoiled(two: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(two, tmp_path / "bundle"))


def pictures(count: int, size: int = 9) -> list[Image.Image]:
    random = np.random.default_rng(count)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "images", "new_tokens", "runs_in"),
    [
        ("what", 1, None, 0),
        ("what", 1, 8, 0),
        ("what", 2, None, 1),
        ("what", 2, 12, 1),
    ],
)
def test_the_smallest_that_fits_runs(
    session: Session, text: str, images: int, new_tokens: int | None, runs_in: int
) -> None:
    answer = session.generate(text, pictures(images), max_new_tokens=new_tokens, ignore_eos=True)
    assert answer.metrics.variant == runs_in
    assert answer.metrics.new_tokens == (new_tokens or (8, 12)[runs_in])


def test_text_and_answers_may_decide(tiny: ModuleType, session: Session, spoiled: Path) -> None:
    """The larger geometry, made one of a single image: the prompt's length and the answer's choose."""
    one = tiny.build(spoiled.parent / "long", tiny.Tiny(images=1, text_tokens=48, new_tokens=12))
    said = json.loads((one / "manifest.json").read_text())
    own = {name: said[name] for name in Variant.model_fields}
    for name in PROGRAMS:
        shutil.copyfile(one / f"{name}.onnx", spoiled / f"{name}.1.onnx")
        own["programs"][name] |= {"graph": f"{name}.1.onnx", "flops": 5000}
    tiny.relist(spoiled)
    tiny.resign(spoiled, variants=[own])
    with Session(spoiled, threads=1) as other:
        image = pictures(1)
        asked = [("<image>what", None), ("<image>" + "w" * 30, None), ("<image>what", 9)]
        ran = [other.generate(text, image, max_new_tokens=n).metrics.variant for text, n in asked]
        assert ran == [0, 1, 1]
        assert other.generate("<image>what", image, variant=1).metrics.variant == 1
        with pytest.raises(MisfitError, match="the prompt has 31 text tokens, the bundle was compiled for at most 24"):
            other.generate("<image>" + "w" * 30, image, variant=0)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_answers_are_those_of_a_bundle_of_its_own(
    session: Session, alone: Callable[..., Path], sizes: dict[str, int]
) -> None:
    images = pictures(sizes["images"])
    with Session(alone(sizes), threads=1) as own:
        want = own.generate("what", images, ignore_eos=True)
    got = session.generate("what", images, ignore_eos=True)
    assert got.tokens == want.tokens
    assert {name: kept.tolist() for name, kept in got.metrics.kept.items()} == {
        name: kept.tolist() for name, kept in want.metrics.kept.items()
    }
    assert got.metrics.visual_tokens == want.metrics.visual_tokens
    assert got.metrics.cache_bytes == want.metrics.cache_bytes


def test_programs_run_one_by_one(session: Session, alone: Callable[..., Path]) -> None:
    inputs = session.processors[1](["what"], [pictures(2)])
    request = session.request(1)
    logits = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
    tokens = logits.argmax(-1)
    with Session(alone(LARGE), threads=1) as own:
        other = own.request()
        want = own.prefill(other, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        np.testing.assert_array_equal(logits, want)
        np.testing.assert_array_equal(session.decode(request, tokens), own.decode(other, tokens))
    with pytest.raises(UserError, match=r"no geometry 2 \(available: 0: batch 1, 1 image.* 1: batch 1, 2 image"):
        session.request(2)


def test_requests_are_kept_per_geometry(two: Path) -> None:
    with Session(two, threads=1) as session:
        for count in (1, 2, 1, 2):
            session.generate("what", pictures(count), max_new_tokens=1)
        assert sorted(request.variant for request in session._idle) == [0, 1]
        kept = list(session._idle)
        session.generate("what", pictures(1), max_new_tokens=1)
        assert set(map(id, session._idle)) == set(map(id, kept))


def test_programs_of_other_geometries_are_loaded_when_wanted(two: Path) -> None:
    with Session(two, threads=1) as session:
        loaded: dict[str, Any] = session._backend._sessions  # type: ignore[union-attr]
        assert set(loaded) == {f"{name}.onnx" for name in PROGRAMS}
        session.generate("what", pictures(2), max_new_tokens=1)
        assert set(loaded) == {f"{name}{tail}.onnx" for name in PROGRAMS for tail in ("", ".1")}


def test_when_none_fits_all_are_listed(session: Session) -> None:
    with pytest.raises(MisfitError) as caught:
        session.generate("what", pictures(3), max_new_tokens=4)
    text = str(caught.value)
    assert text.startswith("no compiled geometry fits 1 prompt(s) with 3 image(s) and 4 new tokens (available: ")
    assert "batch 1, 1 image(s) of 8x8 per row, 24 text tokens, 8 new tokens: row 0: 3 image(s)" in text
    assert "batch 1, 2 image(s) of 8x8 per row, 48 text tokens, 12 new tokens: row 0: 3 image(s)" in text
    assert "\n" not in text
    with pytest.raises(MisfitError, match=r"fits 1 prompt\(s\) with 1 image\(s\) and 99 new tokens .*hold 8.*hold 12"):
        session.generate("what", pictures(1), max_new_tokens=99)


def test_what_is_no_matter_of_geometry_is_said_alone(session: Session, tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    with pytest.raises(UserError) as caught:
        session.generate("what", missing)
    assert "no compiled geometry" not in str(caught.value)
    assert "missing.png" in str(caught.value)
    with pytest.raises(UserError, match="max_new_tokens is 0; it must be a whole number of at least 1"):
        session.generate("what", pictures(1), max_new_tokens=0)


def test_a_single_geometry_is_complained_of_as_ever(alone: Callable[..., Path]) -> None:
    with Session(alone(SMALL), threads=1) as session, pytest.raises(UserError) as caught:
        session.generate("what", pictures(2))
    assert str(caught.value).startswith("row 0: 2 image(s), the bundle was compiled for 1 per row (8x8)")


# -- which one is the smallest ----------------------------------------------------------------------------


def images(*shown: Any) -> Asked:
    return Asked(["what"], ([shown], [[]], [[]]), None)


def sized(two: Path, *sizes: tuple[int, int, int]) -> list[Any]:
    """Geometries of (height, width, FLOPs of prefill)."""
    one = read_manifest(two).variant(0)
    programs = one.programs
    return [
        one.model_copy(
            update={
                "geometry": one.geometry.model_copy(update={"image_height": height, "image_width": width}),
                "programs": {**programs, "prefill": programs["prefill"].model_copy(update={"flops": flops})},
            }
        )
        for height, width, flops in sizes
    ]


def test_sizes_of_images_decide_where_they_differ(two: Path) -> None:
    choices = sized(two, (64, 64, 400), (16, 16, 100), (32, 32, 200))
    order = lambda *sides: order_by_size(choices, images(*(Image.new("RGB", side) for side in sides)))  # noqa: E731
    assert order() == [1, 2, 0]
    assert order((10, 10)) == [1, 2, 0]
    assert order((20, 20)) == [2, 0, 1], "what would be shrunk comes last"
    assert order((10, 10), (40, 40)) == [0, 2, 1]
    assert order((99, 99)) == [0, 2, 1], "where all shrink it, the largest loses least"


def test_of_equal_sizes_the_shape_decides(two: Path) -> None:
    choices = sized(two, (32, 64, 100), (64, 32, 100))
    assert order_by_size(choices, images(Image.new("RGB", (60, 30)))) == [0, 1]
    assert order_by_size(choices, images(Image.new("RGB", (30, 60)))) == [1, 0]
    assert order_by_size(choices, images(np.zeros((60, 30, 3), np.uint8))) == [1, 0]
    assert order_by_size(choices, images("no such file", None)) == [0, 1]


def test_files_are_measured_without_decoding(two: Path, tmp_path: Path) -> None:
    choices = sized(two, (16, 16, 100), (64, 64, 400))
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    assert order_by_size(choices, images(str(tmp_path / "large.png"))) == [1, 0]


def test_pick_takes_the_first_that_fits(two: Path) -> None:
    geometries = read_manifest(two).each_variant()

    def fit(index: int) -> str:
        if index == 1:
            raise MisfitError("too small")
        return f"made of {index}"

    assert pick(geometries, [1, 0], fit, images()) == "made of 0"


def test_what_was_asked_counts_the_images_of_messages() -> None:
    image = {"type": "image", "image": Image.new("RGB", (8, 8))}
    message = [{"role": "user", "content": [image, image, {"type": "text", "text": "what"}]}]
    nothing = (None, None, None)
    assert str(Asked(*gather([message], nothing), None)) == f"1 prompt(s) with {count_kinds(['image'] * 2)}"
    rows = ([[], [1]], [[], []], [[], []])
    held = f"{count_kinds([])} or {count_kinds(['image'])}"
    assert str(Asked(["a", "b"], rows, 3)) == f"2 prompt(s) with {held} and 3 new tokens"


# -- manifests --------------------------------------------------------------------------------------------


def test_a_view_is_the_manifest_of_a_bundle_of_its_own(two: Path, alone: Callable[..., Path]) -> None:
    manifest = read_manifest(two)
    check_files(two, manifest, "full")
    for index, sizes in enumerate((SMALL, LARGE)):
        view, own = manifest.variant(index), read_manifest(alone(sizes))
        same = ("model", "recipe", "geometry", "segments", "media", "position_offset", "notes", "weights", "variants")
        assert {name: getattr(view, name) for name in same} == {name: getattr(own, name) for name in same}
        for name in PROGRAMS:
            assert view.programs[name].inputs == own.programs[name].inputs
            assert view.programs[name].outputs == own.programs[name].outputs
    assert read_manifest(alone(SMALL)).variants == []


def test_manifests_whose_geometries_do_not_add_up(tiny: ModuleType, spoiled: Path) -> None:
    (variant,) = json.loads((spoiled / "manifest.json").read_text())["variants"]
    whole = json.loads((spoiled / "manifest.json").read_text())
    first = {name: whole[name] for name in Variant.model_fields}
    programs, (segment, *segments) = variant["programs"], variant["segments"]
    lost = {**programs, "prefill": {**programs["prefill"], "graph": "prefill.9.onnx"}}
    faults: list[tuple[list[Any], str]] = [
        ([{**variant, "programs": {k: v for k, v in programs.items() if k != "decode"}}],
         "geometry 1: programs are prefill, vision instead of vision, prefill, decode"),
        ([{**variant, "programs": lost}], "prefill.9.onnx is not listed in files"),
        ([{**variant, "segments": segments}], "geometry 1: segments do not cover every layer once, in order"),
        ([{**variant, "segments": [{**segment, "capacity": 1}, *segments]}],
         "geometry 1: segment s0: capacity is below the rows it holds"),
        ([{**variant, "recipe": {**variant["recipe"], "name": "other"}}],
         "geometry 1: its recipe is not the first geometry's"),
        ([{**variant, "recipe": {**variant["recipe"], "keep": 0.1}}],
         "geometry 1: its recipe is not the first geometry's"),
        ([first], "geometry 1: is there twice"),
        ([variant, variant], "geometry 2: is there twice"),
        ([{**variant, "weights": ["w"]}], "variants.0.weights: unknown field"),
        ([{k: v for k, v in variant.items() if k != "position_offset"}], "variants.0.position_offset: Field required"),
    ]  # fmt: skip
    for variants, message in faults:
        tiny.resign(spoiled, variants=variants)
        with pytest.raises(BundleError) as caught:
            read_manifest(spoiled)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_files_of_every_geometry_are_checked(spoiled: Path) -> None:
    file = spoiled / "prefill.1.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"prefill\.1\.onnx: altered: its SHA-256 is not the manifest's"):
        Session(spoiled)
    file.unlink()
    with pytest.raises(BundleError, match=r"prefill\.1\.onnx: missing"):
        Session(spoiled)


def test_a_graph_of_another_geometry_is_refused_when_it_is_loaded(tiny: ModuleType, spoiled: Path) -> None:
    shutil.copyfile(spoiled / "prefill.onnx", spoiled / "prefill.1.onnx")
    tiny.relist(spoiled)
    with (
        Session(spoiled, threads=1) as session,
        pytest.raises(BundleError, match="the prefill graph and the manifest are not from one compilation"),
    ):
        session.generate("what", pictures(2))
