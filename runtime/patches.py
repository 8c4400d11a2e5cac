"""Images and videos to flattened patches with Pillow and NumPy: what Qwen's vision towers take.

A tower of this kind takes rows of pixels, one row per patch, in the order in which the merger will join them. The
grid of patches is part of a bundle's geometry, so every image or frame is resized to exactly that grid. The
arithmetic is that of transformers' Pillow processor of Qwen2-VL; a test holds the two to 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.images import normalize, read_mean_std, read_part, read_rescale
from secateur.runtime.pictures import MAX_PIXELS, ImageLike, PictureReader

Grid: TypeAlias = "tuple[int, int, int]"
"""Patches of an image or video: in time, in height, in width (the ``grid_thw`` of transformers)."""

_QWEN2 = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2VLImageProcessor": {**_QWEN2, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}},
    "Qwen2VLVideoProcessor": {
        **_QWEN2,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "max_video_tokens": 128000,
    },
    "Qwen3VLVideoProcessor": {
        **_QWEN2,
        "patch_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "max_video_tokens": 768,
    },
}
"""What a configuration leaves unsaid, by processor type; also the list of supported types. (Qwen3-VL's images go
through Qwen2-VL's processor with a patch of 16 in its configuration.)"""
_LARGEST_RATIO = 200
"""Of the longer edge to the shorter: what transformers takes."""


@dataclass(frozen=True)
class PatchPipeline:
    """Resize to the grid, rescale, normalise, cut into patches: an image or video to float32 [patches, values]."""

    kind: str
    """The processor type, a key of :data:`DEFAULTS`."""
    patch: int
    """Edge of a patch in pixels."""
    temporal: int
    """Frames in a patch."""
    merge: int
    """Edge of the square of patches that the merger joins to one token."""
    min_pixels: int
    max_pixels: int
    """Bounds of :meth:`native_grid`: pixels of an image or frame; of all frames together for Qwen3-VL's videos."""
    resize: bool
    resample: Image.Resampling
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    max_video_tokens: int | None = None
    """Bounds the frames of :meth:`native_grid` as well, where the configuration says ``cap_pixels_per_frame``."""
    reader: PictureReader = field(default_factory=PictureReader)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], video: bool = False, max_pixels: int = MAX_PIXELS) -> PatchPipeline:
        """Read a ``preprocessor_config.json``, a ``video_preprocessor_config.json``, or the part for images (or videos)
        of a ``processor_config.json``. A picture or frame may have ``max_pixels``.

        A checkpoint without a file for videos has its videos processed by what its file for images says, as in
        transformers. Raises :class:`UserError` for a type that is not supported, :class:`BundleError` for values
        that cannot be.
        """
        part = "video_processor" if video else "image_processor"
        config = read_part(config, part)
        name = str((video and config.get("video_processor_type")) or config.get("image_processor_type"))
        kind = name.removesuffix("Fast").removesuffix("Pil")
        if video:
            kind = kind.replace("ImageProcessor", "VideoProcessor")
        known = [each for each in DEFAULTS if ("Video" in each) == video]
        where = "video_preprocessor_config.json" if "video_processor_type" in config else "preprocessor_config.json"
        if kind not in known:
            raise UserError(f"no {part.replace('_', ' ')} {name!r} that makes patches", where=where, available=known)
        values = {**DEFAULTS[kind], **{key: value for key, value in config.items() if value is not None}}
        try:
            return cls._from_values(kind, values, max_pixels)
        except KeyError as error:
            raise BundleError(f"size has no {error}", where=where) from None
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise BundleError(str(error), where=where) from None

    @classmethod
    def _from_values(cls, kind: str, values: Mapping[str, Any], max_pixels: int) -> PatchPipeline:
        bounds = {"shortest_edge": values["size"].get("min_pixels"), "longest_edge": values["size"].get("max_pixels")}
        bounds |= {key: value for key, value in values["size"].items() if value is not None}
        if kind != "Qwen3VLVideoProcessor":
            # The older way to write the same two numbers; it wins where a file has both.
            bounds |= {
                edge: values[name]
                for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
                if name in values
            }
        numbers = {
            name: int(value)
            for name, value in (
                ("patch_size", values["patch_size"]),
                ("temporal_patch_size", values["temporal_patch_size"]),
                ("merge_size", values["merge_size"]),
                ("shortest_edge", bounds["shortest_edge"]),
                ("longest_edge", bounds["longest_edge"]),
            )
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} is {number}, the least is 1")
        patch, temporal, merge, least, most = numbers.values()
        if least > most:
            raise ValueError(f"size runs from {least} to {most} pixels")
        mean, std = read_mean_std(values)
        return cls(
            kind=kind,
            patch=patch,
            temporal=temporal,
            merge=merge,
            min_pixels=least,
            max_pixels=most,
            resize=bool(values.get("do_resize", True)),
            resample=Image.Resampling(int(values.get("resample", Image.Resampling.BICUBIC))),
            rescale=read_rescale(values),
            mean=mean,
            std=std,
            max_video_tokens=int(values["max_video_tokens"]) if values.get("cap_pixels_per_frame") else None,
            reader=PictureReader(bool(values.get("do_convert_rgb", True)), max_pixels),
        )

    def unnormalized(self) -> PatchPipeline:
        """The same with levels 0 to 255."""
        return replace(self, rescale=None, mean=None, std=None)

    @property
    def values_per_patch(self) -> int:
        """Columns of what comes out: 3 * frames in a patch * its pixels."""
        return 3 * self.temporal * self.patch**2

    def tokens(self, grid: Grid) -> int:
        """Tokens that the merger makes of a grid."""
        self.check(grid)
        return math.prod(grid) // self.merge**2

    def check(self, grid: Grid) -> None:
        """Raises :class:`UserError` unless every edge is at least 1, height and width multiples of the merge."""
        if min(grid) < 1 or grid[1] % self.merge or grid[2] % self.merge:
            raise UserError(
                f"a grid of {grid[0]}x{grid[1]}x{grid[2]} patches (time x height x width) cannot be merged "
                f"{self.merge}x{self.merge}",
                fix=f"choose height and width as multiples of {self.merge} patches, {self.merge * self.patch} pixels",
            )

    def __call__(self, image: ImageLike, grid: Grid) -> NDArray[np.float32]:
        """One image to float32 [h*w, values_per_patch]; it stands in every frame of its patches.

        ``grid`` is (1, h, w); the image is resized to exactly (h, w) patches, whatever its aspect: compare
        :meth:`native_grid`. Raises :class:`UserError` for what is no image or no grid of an image.
        """
        if grid[0] != 1:
            raise UserError(f"an image cannot fill {grid[0]} patches in time", fix="give a video")
        return self._flatten([image], grid)

    def video(self, frames: Sequence[ImageLike] | NDArray[np.uint8], grid: Grid) -> NDArray[np.float32]:
        """Frames (a uint8 array [T, H, W, 3] is one sequence of them) to float32 [t*h*w, values_per_patch].

        There must be as many frames as the grid's patches hold; fewer by less than a patch's are made up by
        repeating the last. Raises :class:`UserError` for another number and for what is no frame.
        """
        most = grid[0] * self.temporal
        if not most - self.temporal < len(frames) <= most:
            raise UserError(
                f"{len(frames)} frame(s) for {grid[0]} patches in time of {self.temporal} frames each",
                fix=f"give {most} frames",
            )
        return self._flatten(frames, grid)

    def native_grid(self, height: int, width: int, frames: int | None = None) -> Grid:
        """The grid that transformers would choose for an image, or for a video of ``frames``, of this many pixels.

        Where it differs from the compiled grid, the pipeline scales or stretches what transformers would not.
        Raises :class:`UserError` as :func:`smart_resize` does, and for a video too short for one patch in time.
        """
        factor, most = self.patch * self.merge, self.max_pixels
        if frames is None:
            high, wide = smart_resize(height, width, factor, self.min_pixels, most)
            return 1, high // self.patch, wide // self.patch
        if self.kind == "Qwen3VLVideoProcessor":
            if frames < self.temporal:
                raise UserError(f"a video of {frames} frame(s)", fix=f"give at least {self.temporal} frames")
            if self.max_video_tokens is not None:
                most = min(self.max_video_tokens * factor**2, most // frames)
                most = max(most, int(self.min_pixels * 1.05)) * frames
            if 0 < min(height, width) < factor:
                scale = max(factor / height, factor / width)
                height, width = int(height * scale), int(width * scale)
            high, wide = smart_resize(height, width, factor, self.min_pixels, most, frames, self.temporal)
        else:
            if self.max_video_tokens is not None:
                budget = int(self.max_video_tokens * factor**2 * 0.9)
                most = max(min(most, budget * self.temporal // max(frames, 1)), int(self.min_pixels * 1.05))
            high, wide = smart_resize(height, width, factor, self.min_pixels, most)
        return math.ceil(frames / self.temporal), high // self.patch, wide // self.patch

    def resize_to(self, image: ImageLike, grid: Grid) -> Image.Image:
        """A picture in RGB of the size of the grid."""
        rgb = self.reader(image)
        size = (grid[2] * self.patch, grid[1] * self.patch)
        if self.resize:
            return rgb if rgb.size == size else rgb.resize(size, resample=self.resample)
        if rgb.size != size:
            raise UserError(
                f"the image is {rgb.height}x{rgb.width}, the bundle was compiled for {size[1]}x{size[0]} and its "
                "processor does not resize",
                fix="resize the image, or set do_resize in preprocessor_config.json",
            )
        return rgb

    def _read(self, image: ImageLike, grid: Grid) -> NDArray[np.float32]:
        """float32 [3, H, W] of the size of the grid."""
        rgb = self.resize_to(image, grid)
        return normalize(np.moveaxis(np.asarray(rgb), -1, 0), self.rescale, self.mean, self.std)

    def _flatten(self, frames: Sequence[ImageLike] | NDArray[np.uint8], grid: Grid) -> NDArray[np.float32]:
        """Rows of patches: those of one token are neighbours, and a row is colour by frame by pixels."""
        self.check(grid)
        time, high, wide = grid
        merge, patch = self.merge, self.patch
        rows = np.empty(
            (time, high // merge, wide // merge, merge, merge, 3, self.temporal, patch, patch), dtype=np.float32
        )
        if isinstance(frames, np.ndarray):
            frames = [self.reader.read_array(frame, channels_first=False) for frame in frames]
        for index, frame in enumerate(frames):
            axes = self._read(frame, grid).reshape(3, high // merge, merge, patch, wide // merge, merge, patch)
            cut = axes.transpose(1, 4, 2, 5, 0, 3, 6)
            # The last frame fills what is left of its patches.
            for place in range(index, time * self.temporal if index == len(frames) - 1 else index + 1):
                rows[place // self.temporal, ..., place % self.temporal, :, :] = cut
        return rows.reshape(time * high * wide, self.values_per_patch)


def smart_resize(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    temporal: int = 1,
) -> tuple[int, int]:
    """(H, W): the multiples of ``factor`` nearest to an image's edges, scaled to lie within the bounds.

    With ``frames``, the bounds are of all frames together, their number rounded to a multiple of ``temporal``.
    The formula is that of transformers' processors of Qwen2-VL and Qwen3-VL, rounding included (halves go to the
    even number). Raises :class:`UserError` for an image with an edge over 200 times the other, or with none.
    """
    if min(height, width) < 1:
        raise UserError(f"an image of {width}x{height} pixels has nothing in it")
    if max(height, width) > _LARGEST_RATIO * min(height, width):
        raise UserError(
            f"an image of {width}x{height} pixels is too narrow",
            fix=f"crop it: one edge may be up to {_LARGEST_RATIO} times the other",
        )
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    rounded = round(frames / temporal) * temporal
    if rounded * high * wide > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif rounded * high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return high, wide
