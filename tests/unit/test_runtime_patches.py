"""The runtime's patches are those of transformers' processors of Qwen2-VL and Qwen3-VL."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from secateur.runtime.patches import PatchPipeline, smart_resize
from secateur.runtime.video import FrameSampler

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from . import transformers_video  # noqa: E402

QWEN2 = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 20}
QWEN3 = {
    "patch_size": 16,
    "size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
VIDEO = [("qwen2_vl", "Qwen2VLVideoProcessor"), ("qwen3_vl", "Qwen3VLVideoProcessor")]


def qwen2(**options: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**options)


def draw_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@pytest.mark.parametrize("options", [QWEN2, QWEN3, {"patch_size": 8, "merge_size": 3, "temporal_patch_size": 1}])
@pytest.mark.parametrize("shape", [(100, 140), (213, 57), (64, 64), (3, 90), (411, 640)])
def test_images_equal_the_pillow_processor(options: dict[str, Any], shape: tuple[int, int]) -> None:
    theirs = qwen2(**options)
    image = draw_image(*shape)
    want = theirs(image, return_tensors="np")
    ours = PatchPipeline.from_config(theirs.to_dict())
    grid = ours.native_grid(*shape)
    assert grid == tuple(want["image_grid_thw"][0])
    np.testing.assert_allclose(ours(image, grid), want["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "CMYK"])
def test_modes_equal_the_pillow_processor(mode: str) -> None:
    theirs = qwen2(**QWEN2)
    image = draw_image(90, 70, mode)
    ours = PatchPipeline.from_config(theirs.to_dict())
    want = theirs(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours(image, ours.native_grid(90, 70)), want, rtol=0, atol=1e-6)


def test_a_grid_that_was_chosen_equals_an_image_of_that_size() -> None:
    """Resizing to the compiled grid is the processor's own resizing, as far as its bounds allow the size."""
    theirs = qwen2(**QWEN2)
    ours = PatchPipeline.from_config(theirs.to_dict())
    image = draw_image(300, 100)
    want = theirs(image.resize((112, 84), Image.Resampling.BICUBIC), return_tensors="np")
    np.testing.assert_array_equal(want["image_grid_thw"], [[1, 6, 8]])
    np.testing.assert_allclose(ours(image, (1, 6, 8)), want["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "name"), VIDEO)
@pytest.mark.parametrize("count", [4, 5])
def test_videos_are_cut_as_the_processors_cut_them(family: str, name: str, count: int) -> None:
    """Resized and normalised as the Pillow processor does it; laid out by the library's own method."""
    theirs = getattr(transformers_video.load(family), name)
    ours = PatchPipeline.from_config({"video_processor_type": name}, video=True)
    grid = (math.ceil(count / 2), 4, 6)
    size = (4 * ours.patch, 6 * ours.patch)
    frames = [draw_image(60 + number, 80) for number in range(count)]
    image_processor = qwen2(patch_size=ours.patch, image_mean=ours.mean, image_std=ours.std)
    normal = []
    for frame in frames:
        resized = np.asarray(frame.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.uint8)
        scaled = image_processor.rescale(np.moveaxis(resized, -1, 0), 1 / 255)
        normal.append(image_processor.normalize(scaled, list(ours.mean or ()), list(ours.std or ())))
    videos = torch.tensor(np.array([normal]))
    want, *theirs_grid = theirs.patchify(None, videos, ours.patch, ours.merge, ours.temporal)
    assert tuple(theirs_grid) == grid
    np.testing.assert_allclose(ours.video(frames, grid), want[0].numpy(), rtol=0, atol=1e-6)


def test_sizes_equal_smart_resize() -> None:
    images = transformers_video.load("qwen2_vl").smart_resize
    videos = transformers_video.load("qwen3_vl").smart_resize
    random = np.random.default_rng(0)
    for _ in range(400):
        height, width = (int(edge) for edge in random.integers(40, 2000, 2))
        frames, factor = int(random.integers(2, 40)), int(random.choice([28, 32]))
        bounds = (int(random.integers(1, 10**6)), int(random.integers(10**6, 10**7)))
        assert smart_resize(height, width, factor, *bounds) == images(height, width, factor, *bounds)
        got = smart_resize(height, width, factor, *bounds, frames=frames, temporal=2)
        assert got == videos(frames, height, width, 2, factor, *bounds)


@pytest.mark.parametrize(("family", "name"), VIDEO)
@pytest.mark.parametrize("cap", [False, True])
def test_native_grids_of_videos_equal_the_processors(family: str, name: str, cap: bool) -> None:
    """Their ``resize`` asks its base class for a size, which is caught here."""
    theirs = getattr(transformers_video.load(family), name)
    ours = PatchPipeline.from_config({"video_processor_type": name, "cap_pixels_per_frame": cap}, video=True)
    factor = ours.patch * ours.merge
    bounds = SimpleNamespace(shortest_edge=ours.min_pixels, longest_edge=ours.max_pixels)
    random = np.random.default_rng(1)
    with mock.patch.object(theirs.__mro__[1], "resize", lambda self, image, size, resample: (size.height, size.width)):
        for _ in range(200):
            frames = int(random.integers(2, 1000))
            height, width = (int(edge) for edge in random.integers(20, 1200, 2))
            videos = torch.empty((1, frames, 3, height, width), device="meta")
            high, wide = theirs.resize(theirs.__new__(theirs), videos, bounds, None, factor, ours.temporal, cap)
            want = (math.ceil(frames / ours.temporal), high // ours.patch, wide // ours.patch)
            assert ours.native_grid(height, width, frames=frames) == want


def test_frames_are_chosen_as_the_processors_choose_them() -> None:
    """Asked for the compiled rate, with the compiled number as the most it may take."""
    qwen2 = transformers_video.load("qwen2_vl").Qwen2VLVideoProcessor
    qwen3 = transformers_video.load("qwen3_vl").Qwen3VLVideoProcessor
    random = np.random.default_rng(2)
    compared = 0
    for _ in range(400):
        frames, fps = 2 * int(random.integers(2, 33)), float(random.choice([1, 2, 4]))
        rate = float(random.choice([8, 12.5, 24, 30]))
        count = math.ceil(frames * rate / fps) + int(random.integers(0, 400))
        metadata = SimpleNamespace(total_num_frames=count, fps=rate)
        stand_in = SimpleNamespace(num_frames=None, fps=fps, temporal_patch_size=2, min_frames=4, max_frames=frames)
        want = qwen3.sample_frames(stand_in, metadata).tolist()
        assert FrameSampler(frames, fps, ends=True).choose(count, rate) == want
        want = qwen2.sample_frames(stand_in, metadata).tolist()
        if len(want) > frames:
            # Its steps are rounded, so that one more than it was asked for may fit; the cutter would repeat it.
            continue
        compared += 1
        assert FrameSampler(frames, fps).choose(count, rate) == want
    assert compared > 300
