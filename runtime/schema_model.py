"""The manifest's account of the checkpoint, the recipe and the static shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from secateur.runtime.schema_fields import Count, Digest, Frozen, Offset, Size


class Model(Frozen):
    """The checkpoint the bundle was compiled from."""

    family: str
    """Secateur's name of the kind of model."""
    model_type: str
    """Of the checkpoint's ``config.json``."""
    architecture: str
    """The class that transformers makes of it."""
    source: str
    """The name of the checkpoint's directory."""
    license: str | None = None
    """As its model card says it; None where it does not."""
    config_sha256: Digest
    """SHA-256 of the bytes of the checkpoint's ``config.json``, which is not in the bundle."""
    weights_sha256: Digest | None = None
    """Of the weights file; of several, of a list of their paths and digests."""
    layers: Size
    """Of the decoder."""
    hidden_size: Size
    """D: the decoder's width."""
    vocab_size: Size
    """Logits of a row."""
    kv_heads: Size
    """Heads of every cache."""
    head_dim: Size
    """Width of a head of every cache."""
    image_token: str
    """What stands for an image in a prompt's text."""
    image_token_id: Count
    """The id of each of an image's placeholders."""
    prompt_token_id: Count | None = None
    """The id of ``image_token`` where it is not a placeholder's: the placeholders stand behind it."""
    image_space: Annotated[list[str], Field(min_length=2, max_length=2)] = ["", ""]
    """What a prompt's text gets before and behind every ``image_token``."""
    bos_token_id: Count | None = None
    """Of the checkpoint's configuration; what begins a prompt is said in ``tokenizer``."""
    eos_token_ids: list[Offset]
    """An answer ends with any of these."""
    pad_token_id: Count
    """Fills ``input_ids`` behind a row's prompt."""
    video_token_id: Count | None = None
    """What the checkpoint marks a video with."""
    audio_token_id: Count | None = None
    """What it marks sound with; None for models that do not hear."""
    image_before: list[Count] = []
    """The tokens that stand before every image's placeholders: text, not image tokens."""
    image_behind: list[Count] = []
    """Those behind them."""


class MediaItem(Frozen):
    """What one placeholder of a prompt stands for: ``tokens`` that enter the decoder, and ``span`` position ids before
    the text behind it goes on; ``reach`` is one more than the largest id inside, from its first."""

    kind: Literal["image", "video", "audio", "video with sound"]
    """What it is."""
    tokens: Size
    """Placeholders in ``input_ids``."""
    span: Size
    """Position ids before the text behind it goes on."""
    reach: Size
    """One more than the largest position id inside, from its first."""


class Media(Frozen):
    """The media of a row in the order of its prompt, for models whose position ids have several axes."""

    items: list[MediaItem]
    """In the order of the prompt."""
    around: dict[str, list[list[Count]]] = {}
    """Kind -> the tokens before and behind such an item that transformers numbers it by; they are in the prompt's
    text."""
    sound_before: list[Count] = []
    """The tokens put before the placeholders of a video that brings its sound along."""
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
    """By which the ports ``kept.<stage>`` are named."""
    site: str
    """Where it stands in the model."""
    score: str | None = None
    """What tokens are judged by; None where nothing is scored."""
    select: str | None = None
    """How those that stay are chosen; None where none are."""
    merge: str | None = None
    """What becomes of those that go; None where they are dropped."""
    scope: str
    """What its groups are: images, windows of images, or rows."""
    groups: Size
    """How many of them a row has."""
    length_in: Size
    """Tokens of a group before it."""
    length_out: Count
    """Tokens of a group behind it."""

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
    """In the table of recipes."""
    title: str
    """Of the paper."""
    link: str
    """To the paper."""
    keep: float
    """Share of the visual tokens that are left at the end."""
    positions: Literal["original", "compact"]
    """Whether tokens that are left keep the position ids they had, or are numbered anew."""
    cache: Literal["ragged", "shrink"] = "ragged"
    """``ragged``: every layer's cache holds what that layer saw; ``shrink``: those before a stage are cut too."""
    sha256: Digest
    """SHA-256 of the plan in canonical JSON: its stages with all options, and the recipe's own choices. For telling
    bundles apart: nothing in a bundle it could be computed from."""
    notes: str = ""
    """Where the recipe differs from the paper."""
    calibrations: dict[str, Digest] = {}
    """File name -> digest of the calibration files its numbers come from."""
    weights: dict[str, Digest] = {}
    """File name -> digest of the files of learned weights its functions read."""
    stages: list[Stage]
    """In the order in which they act."""


class ImageSize(Frozen):
    """One image of a row whose images are of several sizes. Fields as those of :class:`GeometrySizes`."""

    height: Size
    """Pixels."""
    width: Size
    """Pixels."""
    tokens: Size
    """Of the image, unpruned."""
    features: Size
    """Of those, what enters the decoder."""


class GeometrySizes(Frozen):
    """The static shapes.

    ``tokens_per_image`` is an image's visual tokens, unpruned: its patches, or the squares of patches that the model
    puts together; ``features_per_image`` what the vision-side stages leave of them and behind that ``extra_rows`` rows,
    which stand for no patch and which no stage removes. A video with extra rows of its own counts as one image here.
    Where images are of several sizes all four fields of an image are the largest's, and ``sizes`` has those of each.
    """

    batch: Size
    """B: rows of every input."""
    images: Size
    """Of a row."""
    text_tokens: Size
    """Most text tokens of a prompt, media left out."""
    new_tokens: Size
    """Most tokens of an answer."""
    image_height: Size
    """Pixels of what the tower sees of an image or frame; where it is cut into tiles, of the image."""
    image_width: Size
    """Likewise."""
    tokens_per_image: Size
    """Of an image, unpruned."""
    features_per_image: Size
    """Of an image, what enters the decoder."""
    extra_rows: Count = 0
    """Rows behind every image that stand for no patch."""
    tiles: Count = 0
    """Grids the tower reads of one image that is cut into tiles, the whole in small among them; 0 where an image is
    one grid. The extra rows then stand between its tokens, each behind a row of the image."""
    tokens_per_tile: Count = 0
    """Tokens of each of those grids; 0 where there are none."""
    tile_marks: list[list[Count]] = []
    """The tokens of text before each tile of an image and behind the last, where they stand between tiles as well; they
    take the place of ``image_before`` and ``image_behind``."""
    sequence: Size
    """N: slots of a prompt, ``text_tokens`` and all features."""
    frames: Count = 0
    """Frames of a row's one video; ``images`` then counts the grids that it becomes, each made of several frames, or is
    1 where one placeholder and one set of extra rows stand for all of them."""
    fps: float = 0.0
    """Frames of the video in a second."""
    audio_seconds: Count = 0
    """Length of a row's sound; 0 where there is none."""
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
