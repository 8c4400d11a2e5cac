"""What the vision program reads for one row: pixels of images of one size, or patches of any, and features of sound."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.audio import AudioPipeline
from secateur.runtime.crops import CropPipeline
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.images import ImagePipeline
from secateur.runtime.patches import Grid, PatchPipeline
from secateur.runtime.pictures import MAX_PIXELS, ImageLike
from secateur.runtime.processor_files import blame_file, find_settings
from secateur.runtime.row_media import RowMedia
from secateur.runtime.schema import Manifest
from secateur.runtime.tiles import TilePipeline
from secateur.runtime.video import FrameSampler

_log = logging.getLogger(__name__)

Floats = NDArray[np.float32]


class TowerInput(NamedTuple):
    """``pixel_values`` and ``input_features`` of one row; of all rows they lie one after the other. ``times`` are the
    mean seconds of the frames of every temporal grid of a video."""

    pixel_values: Floats
    input_features: Floats | None = None
    times: tuple[float, ...] = ()


class TowerInputs(Protocol):
    """The images, video and sound of a row, of which there are as many as the bundle was compiled for."""

    def __call__(self, media: RowMedia) -> TowerInput: ...

    def quiet(self) -> TowerInputs:
        """The same without warnings of sizes."""
        ...

    def unnormalized(self) -> TowerInputs:
        """The same with levels 0 to 255, without sound, and without warnings of sizes."""
        ...


def open_tower_inputs(directory: Path, manifest: Manifest, max_pixels: int = MAX_PIXELS) -> TowerInputs:
    """By the processor files of a bundle; a picture or frame may have ``max_pixels``. Raises UserError for what they
    say that is not supported."""
    if manifest.geometry.tiles:
        return TileInputs(directory, manifest, max_pixels)
    if manifest.media is None:
        return PixelInputs(directory, manifest, max_pixels)
    return PatchInputs(directory, manifest, max_pixels)


class TileInputs:
    """Images cut into tiles: float32 [n*tiles, 3, height, width]."""

    def __init__(self, directory: Path, manifest: Manifest, max_pixels: int = MAX_PIXELS) -> None:
        sizes = manifest.geometry
        config, _, where = find_settings(directory, "image")
        size = (sizes.image_height, sizes.image_width)
        self.pipeline: TilePipeline | CropPipeline
        with blame_file(where):
            if manifest.model.family in ("internvl", "smolvlm"):
                self.pipeline = CropPipeline.from_config(config, size, max_pixels)
            else:
                self.pipeline = TilePipeline.from_config(config, size, sizes.tokens_per_tile, max_pixels)
        if self.pipeline.tiles != sizes.tiles:
            raise BundleError(
                f"the image processor makes {self.pipeline.tiles} tiles, the bundle was compiled for {sizes.tiles}",
                where=f"{directory}: {where}",
                fix="compile the bundle again",
            )

    def __call__(self, media: RowMedia) -> TowerInput:
        return TowerInput(np.concatenate([self.pipeline(image) for image in media.images]))

    def quiet(self) -> TileInputs:
        other = copy.copy(self)
        other.pipeline = replace(self.pipeline, _said={"fitted"})
        return other

    def unnormalized(self) -> TileInputs:
        other = self.quiet()
        other.pipeline = replace(other.pipeline, view=self.pipeline.view.unnormalized())
        return other


class PixelInputs:
    """Images, or the frames of a video, of the size that the checkpoint's processor makes of all: float32
    [n, 3, H, W]."""

    def __init__(self, directory: Path, manifest: Manifest, max_pixels: int = MAX_PIXELS) -> None:
        sizes = manifest.geometry
        self.size = (sizes.image_height, sizes.image_width)
        config, _, where = find_settings(directory, "video" if sizes.frames else "image")
        with blame_file(where):
            self.images = ImagePipeline.from_config(config, bool(sizes.frames), max_pixels)
        self.frames = FrameSampler.from_config(config, sizes.frames, sizes.fps, max_pixels=max_pixels)
        if self.images.output_size not in (None, self.size):
            raise BundleError(
                f"the image processor makes {self.images.output_size}, the bundle was compiled for {self.size}",
                where=f"{directory}: {where}",
                fix="compile the bundle again",
            )

    def __call__(self, media: RowMedia) -> TowerInput:
        pixels = [self._read(image) for image in media.images]
        for video in media.videos:
            pixels += self.frames.read(video, media.video_fps, self._read).frames
        return TowerInput(np.stack(pixels))

    def quiet(self) -> PixelInputs:
        return self

    def unnormalized(self) -> PixelInputs:
        other = copy.copy(self)
        other.images = self.images.unnormalized()
        return other

    def _read(self, image: ImageLike) -> Floats:
        pixels = self.images(image)
        if pixels.shape != (3, *self.size):
            raise UserError(
                f"the image is {pixels.shape[1]}x{pixels.shape[2]} after processing, "
                f"the bundle was compiled for {self.size[0]}x{self.size[1]}",
                fix="check size and crop_size of the image processor",
            )
        return pixels


class PatchInputs:
    """Images or a video cut into patches, float32 [patches, values], and sound, float32 [1, mel bins, frames].

    What transformers would resize to another size than the compiled one is resized to the compiled one, with a warning
    once.
    """

    def __init__(self, directory: Path, manifest: Manifest, max_pixels: int = MAX_PIXELS) -> None:
        sizes = manifest.geometry
        config, _, where = find_settings(directory, "video" if sizes.frames else "image")
        with blame_file(where):
            self.patches = PatchPipeline.from_config(config, bool(sizes.frames), max_pixels)
        videos = find_settings(directory, "video").values
        self.frames = FrameSampler.from_config(videos, sizes.frames, sizes.fps, self.patches.temporal, max_pixels)
        edge, grids = self.patches.patch, sizes.frames // self.patches.temporal or 1
        seen = [(grids, height // edge, width // edge) for height, width in sizes.sizes_seen]
        wanted = [one.tokens for one in sizes.sizes] or [sizes.tokens_per_image * (sizes.images if sizes.frames else 1)]
        for size, grid, expected in zip(sizes.sizes_seen, seen, wanted, strict=True):
            if any(side % edge for side in size) or self.patches.tokens(grid) != expected:
                raise BundleError(
                    f"the image processor cuts patches of {edge} pixels and merges {self.patches.merge}x"
                    f"{self.patches.merge} of them, the bundle was compiled for {expected} tokens",
                    where=f"{directory}: {where}",
                    fix="compile the bundle again",
                )
        self.grids: list[Grid] = seen if sizes.sizes else seen * sizes.images
        """Of every image, or of the video."""
        self.sound: AudioPipeline | None = None
        if sizes.audio_seconds:
            assert manifest.media is not None
            heard = find_settings(directory, "audio")
            with blame_file(heard.where):
                self.sound = AudioPipeline.from_config(heard.values, sizes.audio_seconds, manifest.media.sound_padding)
        self._told = False

    def __call__(self, media: RowMedia) -> TowerInput:
        times: list[float] = []
        seen = [self._image(image, grid) for image, grid in zip(media.images, self.grids, strict=False)]
        for video in media.videos:
            grid, step = self.grids[0], self.patches.temporal
            frames, seconds, size = self.frames.read(video, media.video_fps, partial(self.patches.resize_to, grid=grid))
            # As transformers' processor of Qwen3-VL: between the first and the last frame of a grid.
            times += [(seconds[at] + seconds[at + step - 1]) / 2 for at in range(0, len(seconds), step)]
            self._compare("video", grid, size, len(frames))
            seen.append(self.patches.video(frames, grid))
        heard = None
        if self.sound is not None:
            heard = np.stack([self.sound(clip, media.audio_rate) for clip in media.audio])
        return TowerInput(np.concatenate(seen), heard, tuple(times))

    def quiet(self) -> PatchInputs:
        other = copy.copy(self)
        other._told = True
        return other

    def unnormalized(self) -> PatchInputs:
        other = self.quiet()
        other.patches, other.sound = self.patches.unnormalized(), None
        return other

    def _image(self, image: ImageLike, grid: Grid) -> Floats:
        rgb = self.patches.reader(image)
        self._compare("image", grid, (rgb.height, rgb.width))
        return self.patches(rgb, grid)

    def _compare(self, kind: str, grid: Grid, size: tuple[int, int], frames: int | None = None) -> None:
        """Warn where transformers would choose another size."""
        _, rows, columns = self.patches.native_grid(*size, frames)
        if self._told or (rows, columns) == grid[1:] or not self.patches.resize:
            return
        self._told = True
        edge, (height, width) = self.patches.patch, (grid[1] * self.patches.patch, grid[2] * self.patches.patch)
        _log.warning(
            "transformers would show the model this %s as %dx%d; it is resized to the %dx%d that the bundle was "
            "compiled for",
            kind, rows * edge, columns * edge, height, width,
        )  # fmt: skip
