"""Image processing: what it reads, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.images import ImagePipeline, center_crop
from secateur.runtime.pictures import open_picture

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
