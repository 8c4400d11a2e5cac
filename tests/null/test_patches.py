"""Patches: the order of the rows by hand, the grid, what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.patches import Grid, PatchPipeline, smart_resize

CONFIG: dict[str, Any] = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}


def pipeline(video: bool = False, **options: Any) -> PatchPipeline:
    return PatchPipeline.from_config({**CONFIG, **options}, video=video)


def draw_frames(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def cut_by_hand(frames: NDArray[np.uint8], patch: int, temporal: int, merge: int) -> NDArray[np.float32]:
    """Windows of merge x merge patches row by row, the patches of a window row by row, a patch's colours first."""
    frames = np.concatenate([frames, *[frames[-1:]] * (-len(frames) % temporal)])
    rows = []
    for start in range(0, len(frames), temporal):
        block = frames[start : start + temporal]
        for window_y in range(0, block.shape[1], merge * patch):
            for window_x in range(0, block.shape[2], merge * patch):
                for y in range(window_y, window_y + merge * patch, patch):
                    for x in range(window_x, window_x + merge * patch, patch):
                        cut = block[:, y : y + patch, x : x + patch]
                        rows.append(np.concatenate([cut[:, :, :, colour].ravel() for colour in range(3)]))
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize(
    ("patch", "temporal", "merge", "spare"),
    [(4, 2, 2, 0), (4, 2, 2, 1), (3, 1, 2, 0), (2, 3, 1, 0), (2, 3, 1, 2), (5, 2, 3, 1)],
)
def test_rows_of_a_video_by_hand(patch: int, temporal: int, merge: int, spare: int) -> None:
    cut = pipeline(
        video=True,
        patch_size=patch,
        temporal_patch_size=temporal,
        merge_size=merge,
        do_normalize=False,
        do_rescale=False,
    )
    grid = (3, 2 * merge, 3 * merge)
    frames = draw_frames(3 * temporal - spare, grid[1] * patch, grid[2] * patch)
    rows = cut.video(frames, grid)
    assert rows.dtype == np.float32
    assert rows.shape == (math.prod(grid), cut.values_per_patch)
    np.testing.assert_array_equal(rows, cut_by_hand(frames, patch, temporal, merge))
    assert cut.tokens(grid) * merge**2 == len(rows)


def test_an_image_stands_in_every_frame_of_its_patches() -> None:
    cut = pipeline(do_normalize=False, do_rescale=False, temporal_patch_size=3)
    image = draw_frames(1, 8, 16)
    rows = cut(image[0], (1, 2, 4))
    np.testing.assert_array_equal(rows, cut_by_hand(np.repeat(image, 3, axis=0), 4, 3, 2))


def test_values_by_hand() -> None:
    cut = pipeline(image_mean=[0.5, 0.0, 0.0], image_std=[0.5, 1.0, 2.0])
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[...] = (255, 51, 102)
    rows = cut(image, (1, 2, 2)).reshape(4, 3, -1)
    np.testing.assert_allclose(rows.mean(axis=(0, 2)), [1.0, 0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(rows.std(axis=(0, 2)), 0, atol=1e-6)


def test_every_image_and_frame_gets_the_size_of_the_grid() -> None:
    cut = pipeline(video=True)
    different = [*draw_frames(2, 33, 9), *draw_frames(1, 7, 50)]
    assert cut.video(different, (2, 4, 6)).shape == (48, 96)
    assert pipeline()(different[0], (1, 6, 2)).shape == (12, 96)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (100, 100, (112, 112)),  # 100 / 28 = 3.57
        (70, 98, (56, 112)),  # 2.5 and 3.5: halves go to the even number
        (1000, 2000, (252, 504)),  # over: 2,000,000 / 131,072 pixels
        (5, 9, (56, 84)),  # under 56 * 56
    ],
)
def test_smart_resize_by_hand(height: int, width: int, size: tuple[int, int]) -> None:
    assert smart_resize(height, width, 28, 56 * 56, 2**17) == size


def test_the_native_grid_of_images_and_videos() -> None:
    assert pipeline(patch_size=14).native_grid(448, 640) == (1, 32, 46)
    assert pipeline(patch_size=14, video=True).native_grid(448, 644, frames=5) == (3, 32, 46)
    grids = [pipeline().native_grid(448, 640), pipeline(video=True).native_grid(448, 644, frames=5)]
    assert {type(edge) for grid in grids for edge in grid} == {int}  # 46.0 is no number of patches


@pytest.mark.parametrize("grid", [(0, 2, 2), (1, 3, 2), (1, 2, 5), (1, 0, 2)])
def test_grids_that_cannot_be_merged(grid: Grid) -> None:
    with pytest.raises(UserError, match=r"cannot be merged 2x2; choose height and width as multiples of 2 patches"):
        pipeline().tokens(grid)


def test_images_and_frames_that_do_not_fit() -> None:
    image = draw_frames(1, 8, 8)[0]
    with pytest.raises(UserError, match="an image cannot fill 2 patches in time; give a video"):
        pipeline()(image, (2, 4, 6))
    for count in (0, 2, 5):
        with pytest.raises(UserError, match=f"{count} frame.* for 2 patches in time of 2 frames each; give 4 frames"):
            pipeline(video=True).video([image] * count, (2, 2, 2))
    with pytest.raises(UserError, match="a int is not an image"):
        pipeline(video=True).video([image, 5], (1, 2, 2))  # type: ignore[list-item]
    with pytest.raises(UserError, match="the image is 8x8, the bundle was compiled for 8x16"):
        pipeline(do_resize=False)(image, (1, 2, 4))
    assert pipeline(do_resize=False)(image, (1, 2, 2)).shape == (4, 96)


def test_sizes_that_have_no_grid() -> None:
    with pytest.raises(UserError, match="an image of 402x2 pixels is too narrow; crop it"):
        pipeline().native_grid(2, 402)
    with pytest.raises(UserError, match="an image of 0x4 pixels has nothing in it"):
        pipeline().native_grid(4, 0)
    long = PatchPipeline.from_config({"video_processor_type": "Qwen3VLVideoProcessor"}, video=True)
    with pytest.raises(UserError, match=r"a video of 1 frame.*give at least 2 frames"):
        long.native_grid(64, 64, frames=1)


def test_where_a_configuration_may_stand() -> None:
    plain = pipeline()
    assert PatchPipeline.from_config({"image_processor": CONFIG}) == plain
    for suffix in ("Fast", "Pil"):
        assert pipeline(image_processor_type="Qwen2VLImageProcessor" + suffix) == plain
    video = {"video_processor_type": "Qwen3VLVideoProcessor"}
    both = {"image_processor": CONFIG, "video_processor": video}
    assert PatchPipeline.from_config(both, video=True) == PatchPipeline.from_config(video, video=True)
    assert PatchPipeline.from_config(both) == plain
    assert pipeline(video=True).kind == "Qwen2VLVideoProcessor"
    assert pipeline(video=True).patch == 4


def test_two_ways_to_write_the_bounds() -> None:
    want = (400, 8000)
    for given in (
        {"size": {"shortest_edge": 400, "longest_edge": 8000}},
        {"size": {"min_pixels": 400, "max_pixels": 8000}},
        {"min_pixels": 400, "max_pixels": 8000},
        {"min_pixels": 400, "max_pixels": 8000, "size": {"shortest_edge": 1, "longest_edge": 9}},
    ):
        read = pipeline(**given)
        assert (read.min_pixels, read.max_pixels) == want


def test_an_unknown_processor_lists_the_known() -> None:
    with pytest.raises(UserError) as caught:
        PatchPipeline.from_config({"image_processor_type": "CLIPImageProcessor"})
    assert "'CLIPImageProcessor' that makes patches (available: Qwen2VLImageProcessor)" in str(caught.value)
    with pytest.raises(UserError, match="available: Qwen2VLVideoProcessor, Qwen3VLVideoProcessor"):
        PatchPipeline.from_config({"video_processor_type": "LlavaVideoProcessor"}, video=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": 0}, {"patch_size": "x"}, {"merge_size": -1}, {"temporal_patch_size": []}, {"size": 4},
        {"size": {"shortest_edge": 9}}, {"size": {"shortest_edge": 9, "longest_edge": 8}},
        {"image_std": [0.5, 0.0, 0.5]}, {"image_mean": float("nan")}, {"image_mean": [1, 2]},
        {"resample": 77}, {"max_pixels": float("inf")},
        {"rescale_factor": "x"},
    ],
)  # fmt: skip
def test_values_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=r"^preprocessor_config.json: [^\n]+$"):
        pipeline(**wrong)
    with pytest.raises(BundleError, match=r"^processor_config.json: image_processor is 'x'"):
        PatchPipeline.from_config({"image_processor": "x"})
