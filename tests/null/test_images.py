"""Image processing: what it reads, what it refuses."""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.images import ImagePipeline, center_crop, fit_longest
from secateur.runtime.pictures import PictureReader, measure_picture, open_picture

CONFIG = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": 8}


def test_pixel_values_by_hand() -> None:
    pipeline = ImagePipeline.from_config({**CONFIG, "image_mean": [0.5, 0.0, 0.0], "image_std": [0.5, 1.0, 2.0]})
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[...] = (255, 51, 102)
    values = pipeline(pixels)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[:, 0, 0], [1.0, 0.2, 0.2], atol=1e-6)


def test_the_shorter_edge_and_the_middle() -> None:
    pipeline = ImagePipeline.from_config({**CONFIG, "do_normalize": False, "do_rescale": False, "resample": 0})
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    assert pipeline(wide).min() == 200


@pytest.mark.parametrize("size", [(5, 12), (12, 5), (6, 7), (9, 9)])
def test_center_crop_pads_with_zeros(size: tuple[int, int]) -> None:
    assert center_crop(np.ones((3, *size), dtype=np.uint8), (9, 9)).shape == (3, 9, 9)


def test_a_nested_processor_config_and_its_aliases() -> None:
    plain = ImagePipeline.from_config(CONFIG)
    assert ImagePipeline.from_config({"image_processor": CONFIG}) == plain
    assert ImagePipeline.from_config({**CONFIG, "image_processor_type": "CLIPImageProcessorFast"}) == plain
    assert ImagePipeline.from_config({**CONFIG, "size": 8}) == plain


def test_an_unknown_processor_lists_the_known() -> None:
    with pytest.raises(UserError) as caught:
        ImagePipeline.from_config({"image_processor_type": "Qwen2VLImageProcessor"})
    kinds = ("CLIPImage", "LlavaImage", "SiglipImage", "LlavaOnevisionImage", "LlavaOnevisionVideo", "LlavaNextImage")
    known = ", ".join(f"{kind}Processor" for kind in (*kinds, "GotOcr2Image", "SmolVLMImage", "Gemma3Image"))
    assert f"'Qwen2VLImageProcessor' (available: {known})" in str(caught.value)


@pytest.mark.parametrize(
    "size",
    [
        {"longest_edge": 4}, {"height": 4}, "large", {"shortest_edge": 4, "longest_edge": 8}, 0, -8,
        {"height": 0, "width": 8}, {},
    ],
)  # fmt: skip
def test_sizes_that_are_not_supported(size: object) -> None:
    with pytest.raises(UserError, match=r"size .* is not supported"):
        ImagePipeline.from_config({**CONFIG, "size": size})


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_processor": "x"}, {"image_std": [0.5, 0.0, 0.5]}, {"image_std": 0}, {"image_std": [1e-60, 1, 1]},
        {"image_mean": float("nan")}, {"crop_size": 0}, {"size": {"shortest_edge": float("inf")}},
        {"resample": 99},
    ],
)  # fmt: skip
def test_values_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=r"^(pre)?processor_config.json: [^\n]+$"):
        ImagePipeline.from_config({**CONFIG, **wrong})


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(np.asarray(clear)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16", "LA"])
def test_other_modes(mode: str, tmp_path: Path) -> None:
    assert open_picture(Image.new(mode, (4, 4))).mode == "RGB"


def test_files_are_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 4))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 6)


def refusal(image: object) -> str:
    with pytest.raises(UserError) as caught:
        open_picture(image)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_images(tmp_path: Path, image_file: Path) -> None:
    assert "no such image file" in refusal(tmp_path / "nothing.png")
    assert "no such image file" in refusal(tmp_path)
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    assert "text.png: not an image Pillow can read" in refusal(text)
    whole = image_file.read_bytes()
    for name, data in {
        "cut.png": whole[: len(whole) // 2],
        "flipped.png": whole[:60] + bytes([whole[60] ^ 0xFF]) + whole[61:],
        "empty.png": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        said = refusal(tmp_path / name)
        assert name in said
        assert "corrupt" in said or "not an image" in said


def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_file: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS" in refusal(image_file)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 5, 2), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros(3, np.uint8),
        np.zeros((0, 0, 3), np.uint8), np.zeros((0, 4), np.uint8),
    ],
)  # fmt: skip
def test_arrays_that_are_no_images(array: np.ndarray) -> None:
    assert "is not an image; give uint8 [height, width, 3]" in refusal(array)


@pytest.mark.parametrize("value", [5, None, {"path": "x.png"}])
def test_what_is_no_image_at_all(value: object) -> None:
    said = f"a {type(value).__name__} is not an image; give a path, a file object, a data: URL"
    assert refusal(value).startswith(said)


def test_an_empty_picture() -> None:
    assert "0x4 pixels has nothing in it" in refusal(Image.new("RGB", (0, 4)))


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "bytes": lambda path: path.read_bytes(),
    "file object": lambda path: BytesIO(path.read_bytes()),
    "data URL": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "Pillow": lambda path: Image.open(BytesIO(path.read_bytes())),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_transparent_colour_of_a_palette_is_white(source: str, tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4))
    picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.putpixel((1, 1), 1)
    picture.save(tmp_path / "palette.png", transparency=0)
    shown = open_picture(SOURCES[source](tmp_path / "palette.png"))
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((1, 1)) == (200, 10, 10)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_is_cut_short(kind: str, source: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / "cut"
    Image.fromarray(noise).save(path, format=kind)
    path.write_bytes(path.read_bytes()[:-400])
    try:
        given = SOURCES[source](path)
    except OSError:
        pytest.skip("Pillow itself does not open it")
    said = refusal(given)
    assert "corrupt" in said or "not an image" in said


def test_levels_that_are_lost_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = np.linspace(0, 60_000, 16, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    reader = PictureReader()
    for source in (tmp_path / "deep.png", tmp_path / "deep.png", Image.fromarray(deep)):
        assert reader(source).getpixel((3, 3)) == (255, 255, 255)
    assert [record.message for record in caplog.records] == [
        "levels 0 to 60000 of a grey picture are cut to 0 to 255, as transformers does: scale it"
    ]
    open_picture(Image.fromarray(np.full((4, 4), 0.5, np.float32)))
    assert "levels 0.5 to 0.5 of a grey picture are shown black" in caplog.text
    open_picture(Image.fromarray(np.full((4, 4), 200, np.uint8)))
    assert len(caplog.records) == 2


def test_what_a_source_changes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGBA", (4, 4), (9, 9, 9, 128)).save(tmp_path / "half.png")
    assert open_picture(tmp_path / "half.png").getpixel((0, 0)) == (9, 9, 9)
    assert "levels of transparency are dropped, as transformers does" in caplog.text
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert open_picture(opened).size == (6, 4)
    assert "a Pillow picture is not turned by its EXIF tag" in caplog.text
    assert measure_picture(tmp_path / "turned.jpg") == (6, 4)
    assert measure_picture((tmp_path / "turned.jpg").read_bytes()) == (6, 4)


@pytest.mark.parametrize(
    ("width", "height", "fitted"),
    [(100, 50, (40, 20)), (50, 100, (20, 40)), (100, 53, (40, 22)), (53, 100, (22, 40)), (9, 9, (40, 40)),
     (1000, 3, (40, 1)), (1, 1000, (1, 40))],
)  # fmt: skip
def test_the_longer_edge_is_brought_to_a_length(width: int, height: int, fitted: tuple[int, int]) -> None:
    """By hand: the other edge is cut to a whole number, then made even, and is never nothing."""
    assert fit_longest(width, height, 40) == fitted


def test_squares_are_filled_with_the_mean_colour() -> None:
    """CLIP's mean in levels, cut as transformers cuts it: 0.48145466 * 255 = 122.77, 0.4578275 * 255 = 116.75."""
    pipeline = ImagePipeline.from_config({"image_processor_type": "LlavaOnevisionImageProcessor"})
    assert pipeline.square == (122, 116, 104)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("data:image/png;base64", "a data: URL without a comma"),
        ("data:image/png;base64,!!!", "base64 is broken"),
        ("data:image/png;base64,", "a data: URL that holds nothing"),
        ("data:image/png;base64," + "QUJD" * 1000, "not an image Pillow can read"),
        (b"", "0 bytes: not an image Pillow can read"),
        (StringIO("x"), "a file object of text; open the file with mode 'rb'"),
        ("x" * 300 + ".png", "xxx...: no such image file"),
        ("no\0name", "no such image file"),
        (Image.new("La", (4, 4)), "conversion from La"),
        (np.full((4, 4, 3), 300, np.int64), "holds 300 to 300; give levels 0 to 255"),
        (np.full((4, 4, 3), 0.5), "levels from 0 to 1: (255 * array).round()"),
    ],
)
def test_sources_that_hold_no_picture(value: Any, says: str) -> None:
    said = refusal(value)
    assert says in said
    assert len(said) < 400


def test_a_file_object_that_cannot_go_back(image_file: Path) -> None:
    class Stream(BytesIO):
        def seekable(self) -> bool:
            return False

    assert open_picture(Stream(image_file.read_bytes())).mode == "RGB"


@pytest.mark.parametrize("source", [*SOURCES, "array"])
def test_pictures_over_the_bound_are_not_decoded(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (50, 20)).save(tmp_path / "large.png")
    given = np.zeros((20, 50, 3), np.uint8) if source == "array" else SOURCES[source](tmp_path / "large.png")
    assert PictureReader(max_pixels=1000)(given).size == (50, 20)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    if source != "array" and source != "Pillow":
        given = SOURCES[source](tmp_path / "large.png")
    with pytest.raises(UserError) as caught:
        PictureReader(max_pixels=999)(given)
    assert "50x20 = 0.001 million pixels, the bound is 0.000999 million; make it smaller, or raise" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "size", "says"),
    [
        (CONFIG, (1, 100_000), "resized by its shorter edge the picture would have 8x800000"),
        (
            {"image_processor_type": "LlavaOnevisionImageProcessor"}, (1, 100_000),
            "padded to a square the picture would have 100000x100000",
        ),
    ],
)  # fmt: skip
def test_narrow_pictures_that_would_grow(config: dict[str, Any], size: tuple[int, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ImagePipeline.from_config(config, max_pixels=1_000_000)(Image.new("RGB", size))
