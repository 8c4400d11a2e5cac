"""The manifest's account of the checkpoint, the recipe and the static shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from secateur.runtime.schema_fields import Count, Digest, Frozen, Offset, Size


class Model(Frozen):
    """The checkpoint the bundle was compiled from."""

    family: str
    model_type: str
    architecture: str
    source: str
    license: str | None = None
    config_sha256: Digest
    weights_sha256: Digest | None = None
    """Of the weights file; of several, of a list of their paths and digests."""
    layers: Size
    hidden_size: Size
    vocab_size: Size
    kv_heads: Size
    head_dim: Size
    image_token: str
    """What stands for an image in a prompt's text."""
    image_token_id: Count
    """The id of each of an image's placeholders."""
    prompt_token_id: Count | None = None
    """The id of ``image_token`` where it is not a placeholder's: the placeholders stand behind it."""
    image_space: Annotated[list[str], Field(min_length=2, max_length=2)] = ["", ""]
    """What a prompt's text gets before and behind every ``image_token``."""
    bos_token_id: Count | None = None
    eos_token_ids: list[Offset]
    pad_token_id: Count
    video_token_id: Count | None = None
    """What the checkpoint marks a video with."""
    audio_token_id: Count | None = None
    """What it marks sound with; None for models that do not hear."""
    image_before: list[Count] = []
    image_behind: list[Count] = []
    """The tokens that stand before and behind every image's placeholders; they are text, not image tokens."""


class MediaItem(Frozen):
    """What one placeholder of a prompt stands for: ``tokens`` that enter the decoder, and ``span`` position ids before
    the text behind it goes on; ``reach`` is one more than the largest id inside, from its first."""

    kind: Literal["image", "video", "audio", "video with sound"]
    tokens: Size
    span: Size
    reach: Size


class Media(Frozen):
    """The media of a row in the order of its prompt, for models whose position ids have several axes."""

    items: list[MediaItem]
    around: dict[str, list[list[Count]]] = {}
    """Kind -> the tokens before and behind such an item that transformers numbers it by; they are in the prompt's
    text."""
    sound_before: list[Count] = []
    sound_behind: list[Count] = []
    """The tokens put around a video that brings its sound along; each has the position id of the mark of the video
    beside it, but for ``sound_marks_count``."""
    sound_marks_count: bool = False
    """Whether those tokens have position ids of their own, as words do."""
    sound_padding: Literal["max_length", "longest"] = "max_length"
    """How far the checkpoint's processor pads sound with silence: to the longest its extractor takes, or not at all."""
    timestamp: str = ""
    """Format of the text before every item of a video that is several items: the mean time in seconds of the frames it
    is made of. Such a video has one placeholder in a prompt, between ``around``; each item then stands behind its text
    between ``around`` once more. Empty where no text stands between them."""


def describe_media(
    images: int, sizes: Sequence[Sequence[int]], frames: int, fps: float, audio_seconds: int, together: bool
) -> str:
    """What a row holds, in words. ``sizes`` are none, one for all, or one for each image. ``together``: sound lies
    between the frames of the video."""
    shown = f"a video of {frames} frames, {fps:g} a second," if frames else f"{images} image(s)"
    each = ", ".join(f"{height}x{width}" for height, width in sizes)
    shown = f"{shown} of {each}" if each else shown.removesuffix(",")
    if audio_seconds:
        shown += f" {'with' if together else 'and'} {audio_seconds} s of sound"
    return shown


class Stage(Frozen):
    """One reduction; lengths are per group (an image, a window of images or the row, as the scope says).

    Without ``select`` it only scores for later stages; a ``length_out`` of 0 removes every visual token.
    """

    name: str
    site: str
    score: str | None = None
    select: str | None = None
    merge: str | None = None
    scope: str
    groups: Size
    length_in: Size
    length_out: Count

    @property
    def chooses(self) -> bool:
        """Whether its program reports which tokens it kept."""
        return self.select is not None and self.length_out > 0

    @property
    def in_decoder(self) -> bool:
        return self.site.startswith("decoder.")


class Recipe(Frozen):
    """The paper's row as it was compiled."""

    name: str
    title: str
    link: str
    keep: float
    positions: Literal["original", "compact"]
    cache: Literal["ragged", "shrink"] = "ragged"
    sha256: Digest
    notes: str = ""
    calibrations: dict[str, Digest] = {}
    """File name -> digest of the calibration files its numbers come from."""
    weights: dict[str, Digest] = {}
    """File name -> digest of the files of learned weights its functions read."""
    stages: list[Stage]


class ImageSize(Frozen):
    """One image of a row whose images are of several sizes. Fields as those of :class:`GeometrySizes`."""

    height: Size
    width: Size
    tokens: Size
    features: Size


class GeometrySizes(Frozen):
    """The static shapes.

    ``tokens_per_image`` is an image's visual tokens, unpruned: its patches, or the squares of patches that the model
    puts together; ``features_per_image`` what the vision-side stages leave of them and behind that ``extra_rows`` rows,
    which stand for no patch and which no stage removes. A video with extra rows of its own counts as one image here.
    Where images are of several sizes all four fields of an image are the largest's, and ``sizes`` has those of each.
    """

    batch: Size
    images: Size
    text_tokens: Size
    new_tokens: Size
    image_height: Size
    image_width: Size
    tokens_per_image: Size
    features_per_image: Size
    extra_rows: Count = 0
    tiles: Count = 0
    """Grids the tower reads of one image that is cut into tiles, the whole in small among them; 0 where an image is
    one grid. The extra rows then stand between its tokens, each behind a row of the image."""
    tokens_per_tile: Count = 0
    tile_marks: list[list[Count]] = []
    """The tokens of text before each tile of an image and behind the last, where they stand between tiles as well; they
    take the place of ``image_before`` and ``image_behind``."""
    sequence: Size
    frames: Count = 0
    """Frames of a row's one video; ``images`` then counts the grids that it becomes, each made of several frames, or is
    1 where one placeholder and one set of extra rows stand for all of them."""
    fps: float = 0.0
    """Frames of the video in a second."""
    audio_seconds: Count = 0
    audio_tokens: Count = 0
    """Tokens of a row's sound; all of them enter the decoder."""
    sizes: list[ImageSize] = []
    """Of every image in the order of the prompt, where they are of several sizes; empty where all have one."""

    @model_validator(mode="after")
    def _has_a_size_for_each(self) -> GeometrySizes:
        if self.sizes and (len(self.sizes) != self.images or self.frames or self.tiles or self.extra_rows):
            raise ValueError(f"{len(self.sizes)} sizes do not fit the {self.images} images of a row")
        return self

    @property
    def sizes_seen(self) -> list[tuple[int, int]]:
        """Height and width of all images or frames, or one for each image where they differ."""
        return [(one.height, one.width) for one in self.sizes] or [(self.image_height, self.image_width)]

    @property
    def features_of_images(self) -> list[int]:
        """Tokens of every image that enter the decoder where images are of several sizes, else of any of them."""
        return [one.features for one in self.sizes] or [self.features_per_run]

    @property
    def features(self) -> int:
        """Tokens of a row's media that enter the decoder."""
        seen = sum(one.features for one in self.sizes) or self.images * self.features_per_image
        return seen + self.audio_tokens

    @property
    def features_per_run(self) -> int:
        """Of those of an image, how many follow each other: all, or one tile's where text stands between tiles."""
        return self.features_per_image // max(1, len(self.tile_marks) - 1)

    def place(self, token: int, before: list[int], behind: list[int]) -> list[int]:
        """An image in a prompt: a ``token`` for each of its features, and the marks around them."""
        marks, run = self.tile_marks or [before, behind], [token] * self.features_per_run
        return [*marks[0], *(each for mark in marks[1:] for each in (*run, *mark))]

    @property
    def places(self) -> int:
        """Tokens of a row's media before anything is pruned, extra rows left out."""
        return (sum(one.tokens for one in self.sizes) or self.images * self.tokens_per_image) + self.audio_tokens

    @property
    def patches(self) -> int:
        """Visual tokens of a row that enter the decoder: its features without the extra rows."""
        return self.features - self.images * self.extra_rows

    @property
    def fixed_tokens(self) -> int:
        """Slots of a row that are no visual tokens: the text bucket and the images' extra rows."""
        return self.text_tokens + self.images * self.extra_rows
