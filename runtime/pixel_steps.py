"""What a bundle's image pipelines do, written down as data for its manifest; from the very objects that do it."""

from __future__ import annotations

from typing import Literal

import PIL
from PIL import Image

from secateur.runtime import schema_inputs as s
from secateur.runtime.audio import DYNAMIC_RANGE, FLOOR, HIGHEST, SCALE, SHIFT, AudioPipeline
from secateur.runtime.crops import CropPipeline, NearestGrid
from secateur.runtime.images import ImagePipeline
from secateur.runtime.patches import Grid, PatchPipeline
from secateur.runtime.tiles import TilePipeline, choose_resolution
from secateur.runtime.tower_inputs import PatchInputs, PixelInputs, TileInputs, TowerInputs
from secateur.runtime.video import FrameSampler

_BY_REDUCTION = 13
"""Pillow's major release from which on the order of a resize's passes follows from the sizes."""


def describe_inputs(tower: TowerInputs) -> s.Preprocessing:
    """Steps of images, video and sound; no placeholders."""
    if isinstance(tower, TileInputs):
        pipeline = tower.pipeline
        crops = isinstance(pipeline, CropPipeline)
        images = [_crop_steps(pipeline) if crops else _tile_steps(pipeline)]  # type: ignore[arg-type]  # crops says it
        return s.Preprocessing(images=images, passes=find_passes())
    if isinstance(tower, PatchInputs):
        own = [_patch_steps(tower.patches, grid) for grid in tower.grids]
        sound = None if tower.sound is None else _describe_sound(tower.sound)
        if tower.frames.frames:
            steps = [_convert(tower.frames.reader.convert), *own[0][1:]]
            return s.Preprocessing(video=_describe_video(tower.frames, steps), sound=sound, passes=find_passes())
        return s.Preprocessing(images=own if _differ(own) else own[:1], sound=sound, passes=find_passes())
    assert isinstance(tower, PixelInputs)
    view = [*_view_steps(tower.images), *_expect(tower), s.Stack()]
    if tower.frames.frames:
        steps = [_convert(tower.frames.reader.convert), *view]
        return s.Preprocessing(video=_describe_video(tower.frames, steps), passes=find_passes())
    return s.Preprocessing(images=[[_convert(tower.images.reader.convert), *view]], passes=find_passes())


def find_passes() -> Literal["horizontal_first", "by_reduction"]:
    """The order of the passes of a resize in the Pillow that is installed."""
    return "by_reduction" if int(PIL.__version__.split(".")[0]) >= _BY_REDUCTION else "horizontal_first"


def _differ(each: list[list[s.Step]]) -> bool:
    return any(steps != each[0] for steps in each)


def _convert(convert: bool) -> s.ConvertRgb:
    return s.ConvertRgb(on_white=convert)


def _name(resample: Image.Resampling) -> s.Filter:
    return resample.name.lower()  # type: ignore[return-value]  # pydantic checks


def _expect(tower: PixelInputs) -> list[s.Step]:
    """Where no step makes a picture as large as the port wants it."""
    return [] if tower.images.output_size == tower.size else [s.ExpectSize(height=tower.size[0], width=tower.size[1])]


def _view_steps(view: ImagePipeline) -> list[s.Step]:
    """After the conversion to RGB; pictures are float32 [3, H, W] in the end."""
    steps: list[s.Step] = []
    filter = _name(view.resample)
    if view.square is not None:
        steps.append(s.PadSquare(colour=list(view.square)))
    if view.longest is not None:
        steps.append(s.ResizeLongest(edge=view.longest, filter=filter))
    if isinstance(view.size, tuple):
        steps.append(s.Resize(height=view.size[0], width=view.size[1], filter=filter))
    elif view.size is not None:
        steps.append(s.ResizeShortest(edge=view.size, filter=filter))
    if view.crop is not None:
        steps.append(s.CenterCrop(height=view.crop[0], width=view.crop[1]))
    return [*steps, *_scale_steps(view)]


def _scale_steps(of: ImagePipeline | PatchPipeline) -> list[s.Step]:
    steps: list[s.Step] = [] if of.rescale is None else [s.Rescale(factor=of.rescale)]
    if of.mean is not None and of.std is not None:
        steps.append(s.Normalize(mean=list(of.mean), std=list(of.std)))
    return steps


def _tile_steps(of: TilePipeline) -> list[s.Step]:
    filter, (height, width) = _name(of.view.resample), of.size
    rule = s.BestResolution(resolutions=[list(one) for one in of.resolutions], tile=of.edge, lines=of.lines)
    canvas = choose_resolution(of.size, of.resolutions)
    return [
        _convert(of.view.reader.convert),
        s.Fit(height=height, width=width, filter=filter, unless=rule),
        s.Tiles(canvas="fitted", height=canvas[0], width=canvas[1], tile_height=of.edge, tile_width=of.edge,
                whole="stretched", whole_first=True, filter=filter),
        *_view_steps(of.view), s.Stack(),
    ]  # fmt: skip


def _crop_steps(of: CropPipeline) -> list[s.Step]:
    filter, (height, width) = _name(of.view.resample), of.size
    rule: s.NearestGrid | s.WholeTiles
    if isinstance(of.canvas, NearestGrid):
        tile = of.canvas.tile
        rule = s.NearestGrid(tile_height=tile[0], tile_width=tile[1], least=of.canvas.least, most=of.canvas.most)
    else:
        rule = s.WholeTiles(tile=of.canvas.edge, longest=of.canvas.longest)
    steps: list[s.Step] = [
        _convert(of.view.reader.convert), s.Fit(height=height, width=width, filter=filter, unless=rule),
    ]  # fmt: skip
    if of.longest is not None:
        steps.append(s.ResizeLongest(edge=of.longest, filter=filter))
    canvas = of.canvas(of.size)
    whole: Literal["none", "canvas", "picture"] = "canvas" if of.whole_of_canvas else "picture"
    whole = "none" if of.tiles == 1 else whole
    tiles = s.Tiles(
        canvas="stretched", height=canvas[0], width=canvas[1], tile_height=of.edges[0], tile_width=of.edges[1],
        whole=whole, whole_first=False, filter=filter,
    )  # fmt: skip
    return [*steps, tiles, *_view_steps(of.view), s.Stack()]


def _patch_steps(of: PatchPipeline, grid: Grid) -> list[s.Step]:
    height, width = grid[1] * of.patch, grid[2] * of.patch
    sized: s.Step = s.ExpectSize(height=height, width=width)
    if of.resize:
        sized = s.Resize(height=height, width=width, filter=_name(of.resample))
    patches = s.Patches(patch=of.patch, temporal_patch=of.temporal, merge=of.merge, grid=list(grid))
    return [_convert(of.reader.convert), sized, *_scale_steps(of), patches]


def _describe_video(of: FrameSampler, steps: list[s.Step]) -> s.VideoSteps:
    return s.VideoSteps(frames=of.frames, fps=of.fps, ends=of.ends, steps=steps)


def _describe_sound(of: AudioPipeline) -> s.SoundSteps:
    return s.SoundSteps(
        sampling_rate=of.rate, samples=of.samples, padded_samples=of.padded, n_fft=of.window, hop=of.hop,
        mel_bins=of.mel_bins, highest=HIGHEST, floor=FLOOR, dynamic_range=DYNAMIC_RANGE, add=SHIFT, divide=SCALE,
        frames=of.frames,
    )  # fmt: skip
