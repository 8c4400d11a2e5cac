"""Images to pixel values with Pillow and NumPy: what the CLIP-like image processors of transformers compute.

The arithmetic (order of operations, rounding, precision) is that of transformers' Pillow processors, so
that a bundle sees the very pixels its checkpoint was trained on; a test holds the two to 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.pictures import MAX_PIXELS, ImageLike, PictureReader

_CLIP = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_SIGLIP = {
    "size": {"height": 224, "width": 224},
    "crop_size": None,
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_ONE_VIEW = {
    **_CLIP,
    "size": {"height": 384, "width": 384},
    "crop_size": None,
    "do_center_crop": False,
}
_GEMMA3 = {**_SIGLIP, "resample": Image.Resampling.BILINEAR}
_SMOLVLM = {
    **_SIGLIP,
    "size": {"longest_edge": 1456},
    "max_image_size": {"longest_edge": 364},
    "resample": Image.Resampling.LANCZOS,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": _SIGLIP,
    "LlavaOnevisionImageProcessor": _ONE_VIEW,
    "LlavaOnevisionVideoProcessor": _ONE_VIEW,
    "LlavaNextImageProcessor": _CLIP,
    "GotOcr2ImageProcessor": _ONE_VIEW,
    "SmolVLMImageProcessor": _SMOLVLM,
    "Gemma3ImageProcessor": _GEMMA3,
}
"""What a configuration leaves unsaid, by processor type; also the list of supported types. (GotOcr2's is InternVL3's;
here every image is one tile, and ``runtime/crops.py`` cuts several.)"""
_WHERE = "preprocessor_config.json"
_MOST = 4096
"""Where ``longest_edge`` is given, transformers makes no image larger."""
_CONVERTS = ("Gemma3ImageProcessor",)
_SQUARE = ("LlavaOnevisionImageProcessor",)
"""Types that pad an image to a square of the mean colour, first of all. (This one does so where a prompt has several
images; of one alone it makes tiles, see ``runtime/tiles.py``.)"""

_SQUARE_IF_ASKED = ("LlavaImageProcessor",)
"""Types that do so where ``do_pad`` says so."""


@dataclass(frozen=True)
class ImagePipeline:
    """Pad to a square, resize, centre crop, rescale, normalise: one image to float32 [3, H, W]."""

    size: tuple[int, int] | int | None
    """(height, width), or the length of the shorter edge; None leaves the image as it is."""
    resample: Image.Resampling
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    longest: int | None = None
    """Length of the longer edge that an image is brought to before it is resized to ``size``; None: it is not."""
    square: tuple[int, int, int] | None = None
    """Colour of the padding, 0 to 255; None does not pad."""
    reader: PictureReader = field(default_factory=PictureReader)
    """Its bound on pixels is also that of what a picture becomes on the way."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], video: bool = False, max_pixels: int = MAX_PIXELS) -> ImagePipeline:
        """Read a ``preprocessor_config.json``, or the ``image_processor`` part of a ``processor_config.json``; for the
        frames of a ``video`` what is said of those, or else what is said of images.
        Pictures may have ``max_pixels``."""
        config = read_part(config, "video_processor" if video else "image_processor")
        names = [config.get("video_processor_type")] if video else []
        names += [config.get("image_processor_type"), config.get("feature_extractor_type"), "CLIPImageProcessor"]
        name = str(next(filter(None, names)))
        kind = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
        kind = kind.replace("ImageProcessor", "VideoProcessor") if video else kind
        if kind not in DEFAULTS:
            raise UserError(f"no image processor {name!r}", where=_WHERE, available=DEFAULTS)
        values = {**DEFAULTS[kind], **{key: value for key, value in config.items() if value is not None}}
        if values.get("do_pan_and_scan"):
            raise UserError(
                "do_pan_and_scan is on, and the crops it cuts are not supported",
                where=_WHERE,
                fix="set it to false: the model then sees every image whole",
            )
        try:
            return cls._from_values(values, kind, max_pixels)
        except (TypeError, ValueError, OverflowError) as error:
            raise BundleError(str(error), where=_WHERE) from None

    @classmethod
    def _from_values(cls, values: Mapping[str, Any], kind: str, max_pixels: int) -> ImagePipeline:
        longest = None
        if "max_image_size" in values:
            # The longer edge comes first, as it does where tiles are cut; then the whole is made one tile, always.
            longest = _read_edge(values["size"], "size") if values.get("do_resize", True) else None
            side = _read_edge(values["max_image_size"], "max_image_size")
            values = {**values, "size": {"height": side, "width": side}, "do_resize": True}
        mean, std = read_mean_std(values)
        square = kind in _SQUARE or (kind in _SQUARE_IF_ASKED and bool(values.get("do_pad")))
        return cls(
            size=_read_size(values["size"], "size") if values.get("do_resize", True) else None,
            resample=Image.Resampling(int(values.get("resample", Image.Resampling.BICUBIC))),
            crop=_read_crop(values["crop_size"]) if values["do_center_crop"] else None,
            rescale=read_rescale(values),
            mean=mean,
            std=std,
            longest=longest,
            square=_mean_colour(values["image_mean"]) if square else None,
            # transformers' processor of Gemma 3 converts whatever its file says.
            reader=PictureReader(bool(values.get("do_convert_rgb", True)) or kind in _CONVERTS, max_pixels),
        )

    def unnormalized(self) -> ImagePipeline:
        """The same with levels 0 to 255."""
        return replace(self, rescale=None, mean=None, std=None)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every image that comes out; None where it depends on the image."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)

    def __call__(self, image: ImageLike) -> NDArray[np.float32]:
        rgb = self.reader(image)
        if self.square is not None:
            self.reader.check_size((max(rgb.size), max(rgb.size)), what="padded to a square the picture would have")
            rgb = pad_square(rgb, self.square)
        if self.longest is not None:
            rgb = rgb.resize(fit_longest(rgb.width, rgb.height, self.longest), resample=self.resample)
        if self.size is not None:
            height, width = self.size if isinstance(self.size, tuple) else _keep_aspect(rgb, self.size)
            self.reader.check_size((width, height), what="resized by its shorter edge the picture would have")
            rgb = rgb.resize((width, height), resample=self.resample)
        pixels = np.moveaxis(np.asarray(rgb), -1, 0)
        if self.crop is not None:
            pixels = center_crop(pixels, self.crop)
        return normalize(pixels, self.rescale, self.mean, self.std)


def normalize(
    pixels: NDArray[np.uint8],
    rescale: float | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> NDArray[np.float32]:
    """uint8 [3, H, W] to float32 [3, H, W]: times ``rescale``, minus ``mean``, over ``std``; None leaves a step out."""
    # A colour has 256 values, each is computed once: the product in float64 and rounded, the rest in float32.
    levels = np.arange(256) * (1.0 if rescale is None else rescale)
    table = np.broadcast_to(levels.astype(np.float32), (3, 256))
    if mean is not None and std is not None:
        centre, spread = (np.array(x, dtype=np.float32)[:, None] for x in (mean, std))
        table = (table - centre) / spread
    return np.stack([values[colour] for values, colour in zip(table, pixels, strict=True)])


def pad_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square as wide as its longer edge; an odd pixel of padding comes behind it."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def center_crop(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle [C, height, width] of [C, H, W]; where the image is smaller, zeros stand around it."""
    for axis, want in zip((1, 2), size, strict=True):
        have = pixels.shape[axis]
        if have < want:
            before = math.ceil((want - have) / 2)
            widths = [(0, 0)] * 3
            widths[axis] = (before, want - have - before)
            pixels = np.pad(pixels, widths)
        else:
            start = (have - want) // 2
            pixels = pixels.take(np.arange(start, start + want), axis=axis)
    return pixels


def _keep_aspect(image: Image.Image, shortest: int) -> tuple[int, int]:
    width, height = image.size
    longest = int(shortest * max(width, height) / min(width, height))
    return (longest, shortest) if width <= height else (shortest, longest)


def fit_longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width, height with the longer edge at ``longest``; the shorter one is rounded up to an even number of pixels."""
    ratio = width / height
    if width >= height:
        shorter = int(longest / ratio)
        return longest, max(shorter + shorter % 2, 1)
    shorter = int(longest * ratio)
    return max(shorter + shorter % 2, 1), longest


def _read_edge(size: Any, field: str) -> int:
    """The number in ``{longest_edge}``."""
    edge = size.get("longest_edge") if isinstance(size, Mapping) else None
    if not isinstance(edge, int) or not 1 <= edge <= _MOST:
        raise BundleError(
            f"{field} {size!r} is not supported", where=_WHERE, available=[f"{{longest_edge}} to {_MOST}"]
        )
    return edge


def _read_size(size: Any, field: str) -> tuple[int, int] | int:
    given = size if isinstance(size, Mapping) else {"shortest_edge": size} if isinstance(size, int) else {}
    edges = {key: int(value) for key, value in given.items() if value is not None}
    if min(edges.values(), default=0) >= 1:
        if edges.keys() == {"shortest_edge"}:
            return edges["shortest_edge"]
        if edges.keys() == {"height", "width"}:
            return edges["height"], edges["width"]
    raise BundleError(
        f"{field} {size!r} is not supported",
        where=_WHERE,
        available=["a number from 1", "{shortest_edge}", "{height, width}"],
    )


def _read_crop(size: Any) -> tuple[int, int]:
    read = _read_size(size, "crop_size")
    return read if isinstance(read, tuple) else (read, read)


def _mean_colour(mean: Any) -> tuple[int, int, int]:
    red, green, blue = (int(255 * value) for value in _three(mean))
    return red, green, blue


def read_part(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """One processor's part of a ``processor_config.json``; a configuration of one processor as it is."""
    nested = config.get(part)
    if nested is not None and not isinstance(nested, Mapping):
        raise BundleError(f"{part} is {nested!r}, not an object", where="processor_config.json")
    return nested or config


def read_rescale(values: Mapping[str, Any]) -> float | None:
    """The factor of a configuration's pixels; None if it leaves them as they are."""
    return float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else None


def read_mean_std(values: Mapping[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation per colour channel; None and None if a configuration does not normalise."""
    if not values.get("do_normalize", True):
        return None, None
    std = _three(values["image_std"])
    if np.array(std, dtype=np.float32).min() <= 0:
        raise BundleError(f"image_std is {values['image_std']!r}, pixels are divided by it", where=_WHERE)
    return _three(values["image_mean"]), std


def _three(values: Any) -> tuple[float, ...]:
    numbers = [float(v) for v in values] if isinstance(values, (list, tuple)) else [float(values)] * 3
    if len(numbers) != 3:
        raise BundleError(f"{len(numbers)} numbers for 3 colour channels", where=_WHERE)
    if not all(map(math.isfinite, numbers)):
        raise BundleError(f"{values!r} for the colour channels is not finite", where=_WHERE)
    return tuple(numbers)
