"""Runs the steps of a manifest's ``preprocessing``, from what docs/ports.md says of them. NumPy and Pillow alone.

Nothing here imports Secateur: it is what a host in another language would write.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from .resize import Array, resize

Json = dict[str, Any]
Source: TypeAlias = "Image.Image | Path | IO[bytes]"
"""Pixels, or a file of a picture."""


def run_images(preprocessing: Json, pictures: list[Source]) -> Array:
    """A row's images -> its part of ``pixel_values``."""
    lists = preprocessing["images"]
    each = lists * len(pictures) if len(lists) == 1 else lists
    passes = preprocessing["passes"]
    return np.concatenate([run_steps(steps, [one], passes) for steps, one in zip(each, pictures, strict=True)])


def run_video(preprocessing: Json, frames: list[Source]) -> Array:
    """A row's video, all of its frames, -> its part of ``pixel_values``."""
    video = preprocessing["video"]
    count, wanted = len(frames), video["frames"]
    if video["ends"]:
        chosen = [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]
    else:
        chosen = [i * count // wanted for i in range(wanted)]
    return run_steps(video["steps"], [frames[index] for index in chosen], preprocessing["passes"])


def run_steps(steps: list[Json], sources: list[Source], passes: str) -> Array:
    """Pictures through a list of steps; they are uint8 [H, W, 3] until levels are scaled, and float32 from then on."""
    first, *others = steps
    assert first["op"] == "convert_rgb"
    pictures = [_convert(source, first["on_white"]) for source in sources]
    for step in others:
        if step["op"] == "stack":
            return np.stack([_planes(picture) for picture in pictures])
        if step["op"] == "patches":
            return _cut(step, [_planes(picture) for picture in pictures])
        pictures = [made for picture in pictures for made in _run(step, picture, passes)]
    raise ValueError("the last step is neither stack nor patches")


def _run(step: Json, picture: Array, passes: str) -> list[Array]:
    op = step["op"]
    high, wide = picture.shape[:2]
    if op == "pad_square":
        return [_pad(picture, max(high, wide), max(high, wide), step["colour"])]
    if op == "resize":
        return [resize(picture, step["height"], step["width"], step["filter"], passes)]
    if op == "resize_shortest":
        edge = step["edge"]
        longer = int(edge * max(high, wide) / min(high, wide))
        size = (longer, edge) if wide <= high else (edge, longer)
        return [resize(picture, *size, step["filter"], passes)]
    if op == "resize_longest":
        return [resize(picture, *_longest(high, wide, step["edge"]), step["filter"], passes)]
    if op == "fit":
        rule, size = step["unless"], (step["height"], step["width"])
        same = _layout(rule, high, wide) == _layout(rule, *size)
        return [picture if same else _fit(picture, *size, step["filter"], passes)]
    if op == "tiles":
        return _tiles(step, picture, passes)
    if op == "center_crop":
        return [_crop(picture, step["height"], step["width"])]
    if op == "expect_size":
        if (high, wide) != (step["height"], step["width"]):
            raise ValueError(f"a picture of {high}x{wide}")
        return [picture]
    if op == "rescale":
        return [(picture.astype(np.float64) * step["factor"]).astype(np.float32)]
    assert op == "normalize"
    mean, std = (np.array(step[name], np.float32) for name in ("mean", "std"))
    return [(picture.astype(np.float32) - mean) / std]


def _convert(source: Source, on_white: bool) -> Array:
    if isinstance(source, Image.Image):
        # Pixels that somebody holds in memory: what is transparent in them lies on white.
        return _on_white(source) if source.mode in ("RGBA", "LA") else np.asarray(source.convert("RGB"))
    with Image.open(source) as opened:
        picture = ImageOps.exif_transpose(opened)
    colour = picture.info.get("transparency")
    if isinstance(colour, bytes) or colour is None:
        picture.info.pop("transparency", None)  # levels of transparency are dropped
        return np.asarray(picture.convert("RGB"))
    return _on_white(picture) if on_white else np.asarray(picture.convert("RGB"))


def _on_white(picture: Image.Image) -> Array:
    above = picture.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", above.size, (255,) * 4), above).convert("RGB"))


def _pad(picture: Array, height: int, width: int, colour: list[int]) -> Array:
    """In the middle; an odd pixel comes behind."""
    high, wide = picture.shape[:2]
    made = np.empty((height, width, 3), np.uint8)
    made[:] = colour
    top, left = (height - high) // 2, (width - wide) // 2
    made[top : top + high, left : left + wide] = picture
    return made


def _longest(high: int, wide: int, edge: int) -> tuple[int, int]:
    ratio = wide / high
    shorter = int(edge / ratio) if wide >= high else int(edge * ratio)
    even = max(shorter + shorter % 2, 1)
    return (even, edge) if wide >= high else (edge, even)


def _fit(picture: Array, height: int, width: int, filter: str, passes: str) -> Array:
    high, wide = picture.shape[:2]
    across, down = width / wide, height / high
    if across < down:
        size = min(math.ceil(high * across), height), width
    else:
        size = height, min(math.ceil(wide * down), width)
    return _pad(resize(picture, *size, filter, passes), height, width, [0, 0, 0])


def _tiles(step: Json, picture: Array, passes: str) -> list[Array]:
    make = _fit if step["canvas"] == "fitted" else resize
    canvas = make(picture, step["height"], step["width"], step["filter"], passes)
    high, wide = step["tile_height"], step["tile_width"]
    cut = [
        canvas[top : top + high, left : left + wide]
        for top in range(0, step["height"], high)
        for left in range(0, step["width"], wide)
    ]
    if step["whole"] == "none":
        return cut
    whole = {"picture": picture, "canvas": canvas}.get(step["whole"])
    if whole is None:
        whole = resize(picture, high, wide, step["filter"], passes)
    return [whole, *cut] if step["whole_first"] else [*cut, whole]


def _crop(picture: Array, height: int, width: int) -> Array:
    for axis, want in ((0, height), (1, width)):
        have = picture.shape[axis]
        if have < want:
            before = math.ceil((want - have) / 2)
            widths = [(0, 0)] * 3
            widths[axis] = (before, want - have - before)
            picture = np.pad(picture, widths)
        else:
            start = (have - want) // 2
            picture = picture.take(range(start, start + want), axis)
    return picture


def _layout(rule: Json, high: int, wide: int) -> tuple[int, ...]:
    """Equal for pictures that are cut alike."""
    if rule["rule"] == "best_resolution":
        best = max(rule["resolutions"], key=lambda one: _rank(one, high, wide))
        rows, columns = (n // rule["tile"] * rule["lines"] for n in best)
        if wide / high > columns / rows:
            inside = int(round(high * (columns / wide), 7))
            return *best, rows - (rows - inside) // 2 * 2, columns
        inside = int(round(wide * (rows / high), 7))
        return *best, rows, columns - (columns - inside) // 2 * 2
    if rule["rule"] == "whole_tiles":
        if rule["longest"] is not None:
            high, wide = _longest(high, wide, rule["longest"])
        edge, ratio = rule["tile"], wide / high
        if wide >= high:
            across = math.ceil(wide / edge)
            return math.ceil(int(across * edge / ratio) / edge), across
        down = math.ceil(high / edge)
        return down, math.ceil(int(down * edge * ratio) / edge)
    assert rule["rule"] == "nearest_grid"
    best, nearest = (1, 1), math.inf
    tile = rule["tile_height"] * rule["tile_width"]
    grids = [(r, c) for c in range(1, rule["most"] + 1) for r in range(1, rule["most"] + 1)]
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        if not rule["least"] <= rows * columns <= rule["most"]:
            continue
        away = abs(wide / high - columns / rows)
        if away < nearest or (away == nearest and high * wide > 0.5 * tile * rows * columns):
            best, nearest = (rows, columns), away
    return best


def _rank(resolution: list[int], high: int, wide: int) -> tuple[int, int]:
    factor = min(resolution[1] / wide, resolution[0] / high)
    used = min(int(wide * factor) * int(high * factor), high * wide)
    return used, used - resolution[0] * resolution[1]


def _planes(picture: Array) -> Array:
    return np.moveaxis(picture.astype(np.float32), -1, 0)


def _cut(step: Json, pictures: list[Array]) -> Array:
    """float32 [3, H, W] each -> rows of patches."""
    patch, depth, merge = step["patch"], step["temporal_patch"], step["merge"]
    time, high, wide = step["grid"]
    pictures = pictures + [pictures[-1]] * (time * depth - len(pictures))
    axes = np.stack(pictures).reshape(
        time, depth, 3, high // merge, merge, patch, wide // merge, merge, patch
    )  # time, frame, colour, row of squares, row in it, y, column of squares, column in it, x
    rows = axes.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return np.ascontiguousarray(rows.reshape(time * high * wide, 3 * depth * patch * patch))
