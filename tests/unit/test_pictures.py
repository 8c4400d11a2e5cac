"""Pictures of every mode, container and source are what transformers shows a model.

The modes and containers are Pillow's own lists: one that is new and has no answer here fails.
"""

from __future__ import annotations

import base64
import hashlib
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.runtime.errors import UserError
from secateur.runtime.images import DEFAULTS, ImagePipeline
from secateur.runtime.patches import DEFAULTS as PATCHES
from secateur.runtime.patches import PatchPipeline
from secateur.runtime.pictures import PictureReader, measure_picture, open_picture

transformers = pytest.importorskip("transformers")

SIZE = (14, 10)
Image.init()
WRITE_ONLY = {"PALM", "PDF"}
WRITTEN = sorted(set(Image.SAVE) - WRITE_ONLY)
"""MPO among them, which Pillow opens as JPEG."""
READ_ONLY = {
    "CUR", "DCX", "FITS", "FLI", "FTEX", "GBR", "IMT", "IPTC", "MCIDAS", "MPEG", "PCD", "PIXAR", "PSD", "SUN", "XPM",
    "XVTHUMB",
}  # fmt: skip
"""Pillow writes none of these; they go the same road."""
NO_CODEC = {
    "BUFR": "needs a handler", "GRIB": "needs a handler", "HDF5": "needs a handler", "WMF": "needs Windows",
    "EPS": "needs Ghostscript",
}  # fmt: skip
TRANSPARENT: dict[str, list[Any]] = {
    "P": [0, 3, bytes(range(0, 256)), bytes([255, 0])], "L": [0, 7], "1": [0], "RGB": [(0, 0, 0), (1, 2, 3)],
}  # fmt: skip
"""What a picture of a mode may say of its transparency beside its bands."""


def noise(count: int, seed: bytes = b"pictures") -> bytes:
    return hashlib.shake_256(seed).digest(count)


def make(mode: str) -> Image.Image:
    """Noise in a mode; a mode Pillow gets anew has to be made here as well."""
    if mode == "F":
        levels = np.frombuffer(noise(SIZE[0] * SIZE[1]), np.uint8).reshape(SIZE[::-1])
        return Image.fromarray(levels.astype(np.float32))
    empty = Image.new(mode, SIZE)
    picture = Image.frombytes(mode, SIZE, noise(len(empty.tobytes())))
    if mode in ("P", "PA"):
        picture.putpalette(noise(768, b"palette"))
    # So that colours that are named transparent are there.
    if mode in TRANSPARENT:
        for place, value in enumerate([0, 3, 7] if mode != "RGB" else [(0, 0, 0), (1, 2, 3)]):
            picture.putpixel((place, 0), value)
    return picture


def pictures() -> Iterator[tuple[str, Image.Image]]:
    for mode in Image.MODES:
        yield mode, make(mode)
        for transparency in TRANSPARENT.get(mode, []):
            picture = make(mode)
            picture.info["transparency"] = transparency
            yield f"{mode} with {str(transparency)[:12]}", picture


def encode(picture: Image.Image, container: str, **options: Any) -> bytes | None:
    """A file's bytes; None where the container does not take the mode, or Pillow cannot read it back."""
    file = BytesIO()
    if "transparency" in picture.info:
        options["transparency"] = picture.info["transparency"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.save(file, format=container, **options)
            Image.open(BytesIO(file.getvalue())).load()
    except (OSError, ValueError, KeyError, TypeError, SystemError, AttributeError, RuntimeError, OverflowError):
        return None
    return file.getvalue()


def theirs(kind: str = "CLIPImageProcessor", **options: Any) -> Any:
    return getattr(transformers, f"{kind}Pil")(**options)


def shown(processor: Any, given: Any) -> np.ndarray | None:
    """uint8 [H, W, 3] that a processor of transformers takes; None where it takes nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = processor.process_image(processor.fetch_images(given), do_convert_rgb=processor.do_convert_rgb)
    except Exception:
        return None
    return np.moveaxis(pixels, 0, -1) if pixels.shape[0] == 3 else None


def data_url(data: bytes) -> str:
    """As which transformers is given files: of a path it leaves some open."""
    return "data:image/any;base64," + base64.b64encode(data).decode()


def expect(source: Any, want: np.ndarray | None, what: str) -> None:
    if want is None:
        with pytest.raises(UserError):
            open_picture(source)
        return
    got = np.asarray(open_picture(source))
    assert got.shape == want.shape, what
    assert np.array_equal(got, want), f"{what}: up to {np.abs(got.astype(int) - want).max()} levels apart"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "file object": lambda path: BytesIO(path.read_bytes()),
    "data URL": lambda path: data_url(path.read_bytes()),
}


def test_every_container_has_an_answer() -> None:
    assert set(Image.OPEN) - set(WRITTEN) == READ_ONLY
    assert set(WRITTEN) - set(Image.OPEN) == {"MPO"}
    assert set(WRITTEN) >= set(NO_CODEC)


# Pillow announces that it will drop a format.
@pytest.mark.filterwarnings("ignore:.*image format is deprecated:DeprecationWarning")
@pytest.mark.parametrize("container", [each for each in WRITTEN if each not in NO_CODEC])
def test_every_mode_and_source_of_a_container(container: str, tmp_path: Path) -> None:
    stored, processor = 0, theirs()
    for name, picture in pictures():
        data = encode(picture, container)
        if data is None:
            continue
        stored += 1
        path = tmp_path / f"{stored}.bin"
        path.write_bytes(data)
        want = shown(processor, data_url(data))
        for source, give in SOURCES.items():
            expect(give(path), want, f"{name} in {container} by {source}")
        assert want is None or measure_picture(path) == want.shape[:2]
        opened = [Image.open(BytesIO(data)) for _ in range(2)]
        expect(opened[0], shown(processor, opened[1]), f"{name} in {container} opened by Pillow")
    assert stored, f"no mode can be stored as {container}"


def test_every_mode_as_a_pillow_picture_and_an_array() -> None:
    processor = theirs()
    for name, picture in pictures():
        before = picture.copy()
        expect(picture, shown(processor, picture), f"{name} as a Pillow picture")
        assert picture.mode == before.mode
        assert picture.info == before.info
        array = np.asarray(picture)
        if array.ndim == 3 and array.dtype == np.uint8 and array.shape[2] != 2:
            expect(array, shown(processor, array), f"{name} as an array")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize(
    "shape", [(5, 7, 1), (5, 7, 3), (5, 7, 4), (1, 5, 7), (3, 5, 7), (4, 5, 7), (3, 5, 3), (4, 4, 3)]
)
def test_arrays_of_levels(shape: tuple[int, ...], dtype: Any) -> None:
    levels = np.frombuffer(noise(int(np.prod(shape))), np.uint8).reshape(shape)
    if dtype is np.int8:
        levels = levels // 2
    array = levels.astype(dtype)
    want = shown(theirs(), array)
    assert want is not None
    expect(array, want.astype(np.uint8), f"{shape} {dtype}")


@pytest.mark.parametrize("orientation", range(0, 10))
@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_exif_rotation(container: str, orientation: int, tmp_path: Path) -> None:
    if container not in WRITTEN:
        pytest.skip(f"this Pillow has no {container}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGB", "L", "P", "RGBA", "CMYK"):
        data = encode(make(mode), container, exif=exif)
        if data is None:
            continue
        path = tmp_path / f"{mode}.bin"
        path.write_bytes(data)
        want = shown(theirs(), data_url(data))
        assert want is not None
        for source, give in SOURCES.items():
            expect(give(path), want, f"{mode} in {container}, orientation {orientation}, by {source}")
        assert measure_picture(path) == want.shape[:2]
        # transformers' processors do not turn what a caller opened.
        opened = [Image.open(BytesIO(data)) for _ in range(2)]
        expect(opened[0], shown(theirs(), opened[1]), f"{mode} in {container} as a Pillow picture")


KINDS = [kind for kind in (*DEFAULTS, *PATCHES) if "Video" not in kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_leaves_unsaid_is_what_the_class_says(kind: str) -> None:
    read = (PatchPipeline if kind in PATCHES else ImagePipeline).from_config
    assert read({"image_processor_type": kind}) == read({**theirs(kind).to_dict(), "image_processor_type": kind})


@pytest.mark.parametrize("convert", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_processor_reads_as_its_own(kind: str, convert: bool | None) -> None:
    """``do_convert_rgb`` of a file, and of a class where the file says nothing."""
    processor = theirs(kind) if convert is None else theirs(kind, do_convert_rgb=convert)
    config = processor.to_dict()
    if convert is None:
        del config["do_convert_rgb"]
    reader: PictureReader = (PatchPipeline if kind in PATCHES else ImagePipeline).from_config(config).reader
    if kind == "Gemma3ImageProcessor":
        # Its processor passes do_convert_rgb=True along with every call.
        from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

        processor.do_convert_rgb = Gemma3Processor.images_kwargs["do_convert_rgb"]
    answered = 0
    for name, picture in pictures():
        data = encode(picture, "PNG") or encode(picture, "TIFF")
        given = [picture]
        if data is not None:
            given += [data_url(data), Image.open(BytesIO(data))]  # type: ignore[list-item]
        for source in given:
            want = shown(processor, source)
            # Without conversion transformers fails over every number of channels but three; ours converts then.
            if want is not None:
                answered += 1
                assert np.array_equal(np.asarray(reader(source)), want), f"{name} as {source!r}"
    assert answered > 5
