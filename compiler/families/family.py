"""What the compiler must know of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.compiler.geometry import Geometry
from secateur.compiler.media import MediaLayout
from secateur.compiler.pooled import Picture, Pooled
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.processor_files import find_settings


@dataclass(frozen=True)
class Tiles:
    """An image cut into tiles. ``order`` has, for every feature of it in the order of the prompt, its place among the
    tokens of its grids, grid by grid, or -1 where the row stands that no stage may remove."""

    image_size: tuple[int, int]
    """Height and width of the image, in pixels."""
    order: tuple[int, ...]
    picture: Picture | None = None
    """What is resized behind the projector. ``order`` then counts the tokens of the first grid, and the smaller
    picture's behind them."""

    @property
    def tokens(self) -> int:
        """Features that are tokens of a grid; padding at the edges of the tiles is none."""
        return sum(place >= 0 for place in self.order)


@dataclass(frozen=True)
class Split:
    """An image shown in several grids that stay apart. To stages each of them is an image of its own."""

    image_size: tuple[int, int]
    """Height and width of the image, in pixels."""
    grids: int
    texts: tuple[str, ...] = ()
    """What a prompt has before each grid and behind the last, with marks by their names in braces; empty: the grids
    follow each other between :attr:`Family.image_marks`."""


@dataclass(frozen=True)
class VisionFacts:
    """Static facts of the image side, read off a configuration."""

    image_size: tuple[int, int]
    """Height, width in pixels."""
    grid: tuple[int, int]
    """Rows, columns of visual tokens: of patches, or of squares of them (``merge``)."""
    layers: int
    feature_layer: int
    """0-based tower layer whose output the projector reads."""
    has_cls: bool
    channels: int = 3
    merge: int | tuple[int, int] | Pooled = 1
    """Patches along each side of the square that becomes one visual token between tower and projector; 1: a patch. Of
    sound, down and across: (1, 2) where two positions become one token. Or the grid of patches that is resized behind
    the projector."""
    frames: int = 1
    """Grids of a row: its images, or the temporal grids of its video, or the stretches its sound is encoded in."""
    input_name: str = "pixel_values"
    input_shape: tuple[int, ...] = ()
    """Of what the tower reads for all grids of one row; the batch multiplies the first dimension. Empty: one image
    ``[3, height, width]`` a grid."""
    patch_order: tuple[int, ...] = ()
    """Where the tower keeps its patches in another order than row by row: of each patch of a grid, row by row, its
    place there."""
    linear_projector: bool = False
    """Whether the projector is one linear map: how it answers to a small step is then the same at every token."""
    attends_whole: tuple[int, ...] = ()
    """Tower layers whose attention spans the whole grid, where others attend in windows; empty: all of them."""
    deepstack: int = 0
    """How many inner layers of the tower have features of their own that are added behind the first decoder layers."""
    packed: bool = False
    """Whether the tower takes all grids in one row of patches, so that stages cannot stand before the projector."""
    extra_rows: int = 0
    """Rows that follow each item's tokens in the prompt and that no stage may remove."""
    grids_per_item: int = 1
    """Grids one after the other that are an item: what has its own extra rows. An image, its tiles, or all frames of a
    video."""
    sizes: tuple[VisionFacts, ...] = ()
    """Where the images of a row are of several sizes: facts of each size's images, which go through the tower by
    themselves. What is said beside it is then of one grid that has all tokens of the row."""
    size_of: tuple[int, ...] = ()
    """Of every image its size's place in ``sizes``; empty where all have one."""
    tiles: Tiles | None = None
    """How the tokens of an image that is cut into tiles are put together; None where a grid stays a grid."""
    split: Split | None = None
    """Where the grids of an image count as images; None where an image is one grid, or is put together again."""
    single_image: str = ""
    """What a bundle for one image per prompt does otherwise than transformers; empty if it does the same."""

    every_image: str = ""
    """What a bundle does otherwise with any number of images."""

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of one image: what stages may remove, before any did."""
        return self.grid[0] * self.grid[1]

    @property
    def items(self) -> int:
        """Items of a row."""
        return self.frames // self.grids_per_item

    @property
    def images_of_tiles(self) -> tuple[int, int] | None:
        """(images of a row, tokens of one) where images are cut into tiles and put together again."""
        return None if self.tiles is None else (self.items, self.tokens_per_item)

    @property
    def tokens_per_item(self) -> int:
        """Visual tokens of an item, extra rows left out, before any stage."""
        return self.tokens_per_image * self.grids_per_item if self.tiles is None else self.tiles.tokens

    @property
    def projector_merges(self) -> bool:
        """Whether what enters the projector are not yet the visual tokens, so that stages stand behind it alone."""
        return self.packed or isinstance(self.merge, Pooled) or self.resizes_picture

    @property
    def resizes_picture(self) -> bool:
        """Whether the tiles of an image are one picture, resized, as soon as they leave the projector."""
        return self.tiles is not None and self.tiles.picture is not None

    @property
    def groups(self) -> int:
        """Groups of tokens of a row that leave the projector: its grids, or images whose tiles are one by then."""
        return self.items if self.resizes_picture else self.frames

    @property
    def images(self) -> tuple[VisionFacts, ...]:
        """Facts of every grid of a row: those of its size, where images are of several."""
        return tuple(self.sizes[size] for size in self.size_of) or (self,) * self.frames

    @property
    def image_places(self) -> tuple[tuple[int, int], ...]:
        """Of every image of several sizes: its size's place in ``sizes``, and which of the images of that size it
        is."""
        return tuple((size, self.size_of[:index].count(size)) for index, size in enumerate(self.size_of))

    @property
    def tokens_per_row(self) -> int:
        """Tokens of all items of a row."""
        return self.items * self.tokens_per_item

    def input_of(self, batch: int) -> tuple[int, ...]:
        """Shape of what the tower reads for ``batch`` rows."""
        if not self.input_shape:
            return batch * self.frames, self.channels, *self.image_size
        return batch * self.input_shape[0], *self.input_shape[1:]


@dataclass(frozen=True)
class Tower:
    """Paths inside the Hugging Face model: a tower's layers, their attention, and what is behind them."""

    layers: str
    projector: str
    attention: str
    projector_entry: str = ""
    """The module that reads one row per visual token, if it is not the projector itself but inside of it."""

    @property
    def entry(self) -> str:
        return self.projector_entry or self.projector


Forward = Callable[[Any, Any, VisionFacts, Mapping[str, Any]], tuple[Any, ...]]


@dataclass(frozen=True)
class Family:
    """Facts of one family. Paths are module paths inside the Hugging Face model."""

    name: str
    model_types: tuple[str, ...]
    decoder_types: tuple[str, ...]
    """``text_config.model_type`` values whose layouts were checked."""
    vision_types: tuple[str, ...]
    decoder: str
    decoder_layers: str
    vision_layers: str
    projector: str
    vision_modules: tuple[str, ...]
    """Modules that own every parameter ``vision_forward`` uses."""
    embedding: str
    head: str
    read_vision: Callable[[Any, Geometry], VisionFacts]
    """(configuration, geometry) -> facts; raises UserError for a layout that is not supported."""
    vision_forward: Forward
    """(model, what the tower reads, facts, indices) -> (features [M,N,D] of the visual tokens, last tower state), M the
    ``groups`` of all rows: every tower layer must be reachable from the two, so that signals may be read from layers
    the features do not need. Features of inner layers (``VisionFacts.deepstack``) follow, each [M,N,D]."""
    vision_indices: Callable[[Any, VisionFacts, int], Mapping[str, Any]] | None = None
    """(configuration, facts, rows) -> what ``vision_forward`` gets as indices: tensors on the CPU, and runs of the rows
    that attend to each other as tuples of bounds."""
    vision_reference: Callable[[Any, Any, VisionFacts], Any] | None = None
    """(model, what the tower reads, facts) -> (features, those of inner layers...) as transformers computes them, where
    ``vision_forward`` goes another way."""
    vision_attention: str = "self_attn"
    """The attention module inside a tower layer."""
    image_marks: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """The tokens before and behind every image's placeholders, by their names in ``tokenizer_config.json``."""
    mark_texts: Mapping[str, str] = field(default_factory=dict)
    """The text of a mark where ``tokenizer_config.json`` names none."""
    prompt_mark: str = ""
    """Of the marks, the one that stands for an image in a prompt; empty: the placeholder does."""
    mark_space: tuple[str, str] = ("", "")
    """Text put before and behind every image of a prompt, before the prompt becomes tokens."""
    image_masks: Callable[[Any, Any, Any, Any, Any], Any] | None = None
    """Where tokens of one image attend to each other in both directions in prefill: (the decoder's configuration,
    hidden rows ``[1,S,D]``, positions ``[1,S]``, an empty cache, which slots are images' ``[1,S]`` bool) -> the
    decoder's ``attention_mask``, by transformers' own rule."""
    projector_entry: str = ""
    """See :class:`Tower`."""
    project: Callable[[Any, Any], Any] | None = None
    """With ``projector_entry``: (projector, what the entry reads ``[M,N,Dv]``) -> ``[M,N,D]``."""
    extra_rows: str = ""
    """Path of the parameter ``[D]`` or ``[E,D]`` that follows each image's features; empty if nothing does."""
    auto_class: str = "AutoModelForImageTextToText"
    """The class of transformers that builds the model from its configuration."""
    inner_config: str = ""
    """Where the configuration of the part that is compiled lies in that of the whole; empty: it is the whole."""
    read_media: Callable[[Any, Geometry, VisionFacts, VisionFacts | None], MediaLayout] | None = None
    """(configuration, geometry, facts of what is seen, of what is heard) -> how the media of a row lie, for families
    whose position ids have several axes; None where they count slots."""
    reference_positions: Callable[[Any, Any, Any, Geometry], Any] | None = None
    """(model, ids of an unpruned prompt [1,N], source, geometry) -> ids [3,N] as transformers numbers them."""
    audio: AudioTower | None = None
    """Where the parts that hear are; None for families that do not."""
    tested_transformers: tuple[str, str] = ("5.17", "5.24")
    """The first version of transformers whose model was tested, and the first behind those that were."""
    lacking_before: str = ""
    """What a transformers older than the first tested one lacks, where the family cannot be compiled without it."""

    @property
    def tower(self) -> Tower:
        return Tower(self.vision_layers, self.projector, self.vision_attention, self.projector_entry)


@dataclass(frozen=True)
class AudioTower:
    """The parts of a family that hear. Functions as in :class:`Family`."""

    tower: Tower
    modules: tuple[str, ...]
    read: Callable[[Any, Geometry], VisionFacts]
    forward: Forward
    indices: Callable[[Any, VisionFacts, int], Mapping[str, Any]]
    reference: Callable[[Any, Any, VisionFacts], Any]


def fixed_size(config: Any, geometry: Geometry, videos: bool = False, tiles: bool = False) -> int:
    """The number of grids of a row, for families that take nothing but images of their own size, or with ``videos``
    frames of that size as well; with ``tiles`` the number of images, which one other size may say the tiles of."""
    where = f"{config.name_or_path}/config.json"
    takes = "images and videos" if videos else "images"
    for asked, option in ((0 if videos else geometry.frames, "--frames"), (geometry.audio_seconds, "--audio-seconds")):
        if asked:
            raise UserError(f"a {config.model_type} bundle takes {takes} only", where=where, fix=f"leave {option} out")
    if tiles and geometry.sizes:
        raise UserError(
            f"a {config.model_type} bundle takes images of one size",
            where="--image-size",
            fix="give one for all of them",
        )
    if geometry.image_size is not None and not tiles:
        raise UserError(
            f"images of a {config.model_type} model have the size its configuration says", where=where,
            fix="leave --image-size out",
        )  # fmt: skip
    return geometry.frames or geometry.images


def read_image_processor(config: Any) -> dict[str, Any]:
    """What the checkpoint's files say of processing images; empty where there are none."""
    try:
        return find_settings(Path(config.name_or_path), "image").values
    except BundleError as error:
        raise UserError(str(error), fix="download the file again") from None


def read_feature_layer(config: Any, where: str, usual: str) -> int:
    """0-based tower layer whose output the projector reads; ``usual`` (an example) goes into the error."""
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise UserError(
            f"vision_feature_layer is {layer!r}", where=where, fix=f"only a single feature layer is supported; {usual}"
        )
    # hidden_states[0] is the embedding, so hidden_states[-2] is the output of 0-based layer L-2.
    index = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= index <= depth:
        raise UserError(f"vision_feature_layer {layer} does not exist in a tower of {depth} layers", where=where)
    return index - 1


def check_strategy(config: Any, where: str, wanted: str, otherwise: str) -> None:
    """Refuse another ``vision_feature_select_strategy`` than ``wanted``; ``otherwise`` says what it would do."""
    strategy = config.vision_feature_select_strategy
    if strategy != wanted:
        raise UserError(
            f"vision_feature_select_strategy is {strategy!r}", where=where, available=[wanted], fix=otherwise
        )


def image_features(model: Any, pixel_values: Any) -> Any:
    """What ``get_image_features`` returns for images ``[M,3,H,W]``: ``pooler_output`` are the features."""
    config = model.config
    return model.model.get_image_features(
        pixel_values, vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy, return_dict=True,
    )  # fmt: skip


def read_grid(config: Any, where: str) -> tuple[int, int]:
    """Rows, columns of whole patches in the tower's square image."""
    image_size, patch_size = config.vision_config.image_size, config.vision_config.patch_size
    if not (isinstance(image_size, int) and isinstance(patch_size, int) and 1 <= patch_size <= image_size):
        raise UserError(
            f"an image of image_size {image_size} cannot be cut into patches of patch_size {patch_size}",
            where=where,
            fix="check vision_config; both are numbers of pixels",
        )
    side = image_size // patch_size
    return side, side
