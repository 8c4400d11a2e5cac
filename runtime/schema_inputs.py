"""The manifest's account of preprocessing: what a host does with pictures, videos and sound, every parameter resolved.

docs/ports.md says what each step computes. Steps are data: a reader in any language walks the list.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from secateur.runtime.schema_fields import Count, Frozen, Size

Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
"""Pillow's names of its resampling filters."""
Level = Annotated[int, Field(ge=0, le=255)]
Colour = Annotated[list[Level], Field(min_length=3, max_length=3)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Grid = Annotated[list[Size], Field(min_length=3, max_length=3)]


class ConvertRgb(Frozen):
    """The picture in RGB, three levels 0 to 255 a pixel."""

    op: Literal["convert_rgb"] = "convert_rgb"
    on_white: bool
    """Whether transparent colours are laid on white; otherwise they are shown as if they were not transparent."""


class PadSquare(Frozen):
    """The picture in the middle of a square as wide as its longer edge."""

    op: Literal["pad_square"] = "pad_square"
    colour: Colour
    """Of the padding: red, green, blue."""


class Resize(Frozen):
    """The picture stretched to exactly this size."""

    op: Literal["resize"] = "resize"
    height: Size
    """In pixels, afterwards."""
    width: Size
    """In pixels, afterwards."""
    filter: Filter
    """By Pillow's name."""


class ResizeShortest(Frozen):
    """The picture resized so that its shorter edge has ``edge`` pixels."""

    op: Literal["resize_shortest"] = "resize_shortest"
    edge: Size
    """Pixels of the shorter edge; the longer one has ``int(edge * longer / shorter)``."""
    filter: Filter
    """By Pillow's name."""


class ResizeLongest(Frozen):
    """The picture resized so that its longer edge has ``edge`` pixels."""

    op: Literal["resize_longest"] = "resize_longest"
    edge: Size
    """Pixels of the longer edge; the shorter one is rounded down, and then up to an even number."""
    filter: Filter
    """By Pillow's name."""


class BestResolution(Frozen):
    """A picture's layout is the resolution most of its pixels stay in, and the tokens its padding leaves."""

    rule: Literal["best_resolution"] = "best_resolution"
    resolutions: list[Annotated[list[Size], Field(min_length=2, max_length=2)]]
    """Height and width of each, in order."""
    tile: Size
    """Edge of a tile in pixels."""
    lines: Size
    """Tokens along an edge of a tile."""


class NearestGrid(Frozen):
    """A picture's layout is the grid of tiles whose shape is nearest to its own."""

    rule: Literal["nearest_grid"] = "nearest_grid"
    tile_height: Size
    """In pixels."""
    tile_width: Size
    """In pixels."""
    least: Size
    """Fewest tiles."""
    most: Size
    """Most tiles."""


class WholeTiles(Frozen):
    """A picture's layout is the whole tiles that it fills once its longer edge is ``longest``."""

    rule: Literal["whole_tiles"] = "whole_tiles"
    tile: Size
    """Edge of a tile in pixels."""
    longest: Size | None = None
    """Pixels of the longer edge; None leaves the picture as large as it is."""


class Fit(Frozen):
    """Unless the picture's layout is that of one of ``height`` x ``width``: fitted into that size, with black edges."""

    op: Literal["fit"] = "fit"
    height: Size
    """Of the picture that the bundle was compiled for."""
    width: Size
    """Of the picture that the bundle was compiled for."""
    filter: Filter
    """By Pillow's name."""
    unless: Annotated[BestResolution | NearestGrid | WholeTiles, Field(discriminator="rule")]
    """The rule by which a picture's layout is found."""


class Tiles(Frozen):
    """One picture becomes several: tiles of a canvas, row by row, and the whole in small."""

    op: Literal["tiles"] = "tiles"
    canvas: Literal["fitted", "stretched"]
    """How the picture is brought to the canvas: with its shape and black edges, or to exactly the canvas's."""
    height: Size
    """Of the canvas."""
    width: Size
    """Of the canvas."""
    tile_height: Size
    """Of each tile."""
    tile_width: Size
    """Of each tile."""
    whole: Literal["none", "picture", "canvas", "stretched"]
    """What else becomes a tile: nothing, the picture, the canvas, or the picture stretched to the size of a tile."""
    whole_first: bool
    """Whether that one comes before the tiles, or after them."""
    filter: Filter
    """By Pillow's name."""


class CenterCrop(Frozen):
    """The middle of the picture; where it is smaller, black around it."""

    op: Literal["center_crop"] = "center_crop"
    height: Size
    """In pixels, afterwards."""
    width: Size
    """In pixels, afterwards."""


class ExpectSize(Frozen):
    """Nothing is done: a picture of another size is refused."""

    op: Literal["expect_size"] = "expect_size"
    height: Size
    """In pixels."""
    width: Size
    """In pixels."""


class Rescale(Frozen):
    """Every level times ``factor`` in float64, rounded to float32."""

    op: Literal["rescale"] = "rescale"
    factor: Finite
    """What levels are multiplied by."""


class Normalize(Frozen):
    """Every value minus its colour's mean, over its standard deviation, in float32."""

    op: Literal["normalize"] = "normalize"
    mean: Annotated[list[Finite], Field(min_length=3, max_length=3)]
    """Of red, green and blue."""
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    """Of red, green and blue."""


class Stack(Frozen):
    """The pictures one after the other: float32 ``[pictures, 3, height, width]``."""

    op: Literal["stack"] = "stack"


class Patches(Frozen):
    """The pictures cut into patches: float32 ``[time * high * wide, 3 * temporal_patch * patch * patch]``."""

    op: Literal["patches"] = "patches"
    patch: Size
    """Edge of a patch in pixels."""
    temporal_patch: Size
    """Pictures in a patch; where there are fewer than the grid holds, the last is repeated."""
    merge: Size
    """Edge of the square of patches that become one token: they are neighbours in the order of rows."""
    grid: Grid
    """Patches in time, in height and in width."""


Step: TypeAlias = Annotated[
    ConvertRgb | PadSquare | Resize | ResizeShortest | ResizeLongest | Fit | Tiles | CenterCrop | ExpectSize | Rescale
    | Normalize | Stack | Patches,
    Field(discriminator="op"),
]  # fmt: skip
Steps: TypeAlias = Annotated[list[Step], Field(min_length=1, max_length=32)]


class VideoSteps(Frozen):
    """What becomes of a video."""

    frames: Size
    """How many are chosen."""
    fps: Positive
    """Chosen frames in a second, where the video is no longer than ``frames / fps`` seconds."""
    ends: bool
    """Whether the last frame is always chosen: frame ``round(i * (count - 1) / (frames - 1))`` of ``count``, halves to
    the even number; otherwise ``i * count // frames``."""
    steps: Steps
    """Of every chosen frame; the last step takes all of them together."""


class SoundSteps(Frozen):
    """What becomes of sound: log-mel features float32 ``[mel_bins, frames]``."""

    sampling_rate: Size
    """Hz of the samples, mono, full scale at 1."""
    samples: Size
    """Of a clip: shorter ones get silence after them, longer ones do not fit."""
    padded_samples: Size
    """With the silence that the checkpoint's processor puts after every clip."""
    n_fft: Size
    """Samples of a frame and of its Fourier transform."""
    hop: Size
    """Samples from one frame to the next."""
    window: Literal["hann_periodic"] = "hann_periodic"
    """``0.5 - 0.5 * cos(2 * pi * n / n_fft)``."""
    edges: Literal["reflect"] = "reflect"
    """What stands before and after the padded clip: ``n_fft // 2`` samples, mirrored."""
    power: Literal[2] = 2
    """Of the magnitudes of the spectrum."""
    mel_bins: Size
    """Mel filters."""
    mel_scale: Literal["slaney"] = "slaney"
    """Linear below 1000 Hz, logarithmic above; every triangle has an area of 1 over Hz."""
    lowest: Finite = 0.0
    """Hz at which the first filter begins."""
    highest: Finite
    """Hz at which the last filter ends."""
    log: Literal["log10"] = "log10"
    """Of what the filters say."""
    floor: Positive
    """What the filters say is at least this before its logarithm is taken."""
    dynamic_range: Positive
    """Values are at least the largest of the padded clip less this."""
    add: Finite
    """Added to every value at the end, before ``divide``."""
    divide: Positive
    """By which every value is divided last."""
    frames: Size
    """Of all frames the first, which are kept."""


class Run(Frozen):
    """``count`` times the same token."""

    token: Count | None = None
    """Its id; None: here stand the tokens of the text that ``media.timestamp`` makes of the mean time of the frames of
    the video's next grid."""
    count: Size = 1
    """How many of it follow each other."""


class Placeholder(Frozen):
    """What stands in a prompt's ids for one item of a row's media."""

    kind: Literal["image", "video", "audio"]
    """By which placeholder it is named in a prompt; a video with sound is a video here."""
    token: Count
    """The id that the tokenizer makes of that placeholder, once for every item."""
    becomes: list[Run]
    """What ``input_ids`` of ``prefill`` have in its place."""


class Preprocessing(Frozen):
    """From pictures, video, sound and a prompt's ids to the inputs of ``vision`` and ``prefill``, for one geometry."""

    images: list[Steps] = []
    """Of every image of a row: one list for all of them, or one for each in order; empty in bundles of videos."""
    video: VideoSteps | None = None
    """None in bundles of images."""
    sound: SoundSteps | None = None
    """None in bundles that do not hear."""
    passes: Literal["horizontal_first", "by_reduction"] = "horizontal_first"
    """Which of the two passes of a resize comes first, as in the release of Pillow that compiled the bundle: the
    horizontal one, or, ``by_reduction``, the vertical one where more than twice as many rows as columns go away."""
    placeholders: list[Placeholder] = []
    """Of every item of a row's media, in the order of its prompt."""
