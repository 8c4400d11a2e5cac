"""The manifest's schema: what a bundle says about itself. The reader of a format owns its schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from secateur.runtime.errors import UserError

SCHEMA_VERSION = 1

Dtype = Literal["fp32", "fp16", "bf16"]
Target = Literal["onnxruntime", "plain", "tensorrt", "tensorrt-rtx"]
PROGRAMS = ("vision", "prefill", "decode")
"""In the order a request meets them."""
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
PORT_BYTES = {**DTYPE_BYTES, "int64": 8, "int32": 4, "bool": 1}


def _bundle_path(path: str) -> str:
    """A path inside the bundle: relative, with ``/``, never leaving the directory."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"path {path!r} leaves the bundle")
    if str(pure) != path or path == ".":
        raise ValueError(f"path {path!r} is not in its shortest form")
    return path


BundlePath = Annotated[str, AfterValidator(_bundle_path)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Model(_Frozen):
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
    eos_token_ids: list[int]
    pad_token_id: Count
    video_token_id: Count | None = None
    """What the checkpoint marks a video with."""
    audio_token_id: Count | None = None
    """What it marks sound with; None for models that do not hear."""
    image_before: list[Count] = []
    image_behind: list[Count] = []
    """The tokens that stand before and behind every image's placeholders; they are text, not image tokens."""


class MediaItem(_Frozen):
    """What one placeholder of a prompt stands for: ``tokens`` that enter the decoder, and ``span`` position ids before
    the text behind it goes on; ``reach`` is one more than the largest id inside, from its first."""

    kind: Literal["image", "video", "audio", "video with sound"]
    tokens: Size
    span: Size
    reach: Size


class Media(_Frozen):
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


class Stage(_Frozen):
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


class Recipe(_Frozen):
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


class ImageSize(_Frozen):
    """One image of a row whose images are of several sizes. Fields as those of :class:`GeometrySizes`."""

    height: Size
    width: Size
    tokens: Size
    features: Size


class GeometrySizes(_Frozen):
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


class Port(_Frozen):
    """An input or output of a program. ``dtype`` is one of fp32, fp16, bf16, int64, int32, bool."""

    name: str
    dtype: Literal["fp32", "fp16", "bf16", "int64", "int32", "bool"]
    shape: list[int]


class Program(_Frozen):
    """A graph, its engine where there is one, its ports and its cost."""

    graph: BundlePath
    engine: BundlePath | None = None
    inputs: list[Port]
    outputs: list[Port]
    flops: Count
    unpruned_flops: Count
    weights: list[str] = []
    """The tensors its engine takes from outside itself, by their names in the manifest's ``tensors``."""

    def has_input(self, name: str) -> bool:
        return any(port.name == name for port in self.inputs)


class Segment(_Frozen):
    """Layers ``first_layer`` to ``last_layer`` (exclusive) see ``length`` tokens in prefill.

    ``removed`` is how many tokens of the sequence are gone before the first of them; ``evicted`` how many of those
    they saw their caches do not hold after prefill, because later stages removed them there as well.
    """

    name: str
    first_layer: Count
    last_layer: Size
    length: Size
    capacity: Size
    removed: Count
    evicted: Count = 0


class FileEntry(_Frozen):
    """A file's digest and size. ``header_sha256`` is a weights file's: quick to check, and graphs rely on it."""

    sha256: Digest
    bytes: Count
    header_sha256: Digest | None = None


class StoredTensor(_Frozen):
    """Where a weight lies: ``bytes`` from ``offset`` on in ``file``, one of the manifest's weights files."""

    file: BundlePath
    offset: Count
    bytes: Size
    dtype: Literal["fp32", "fp16", "bf16", "int64", "int32", "bool"]
    shape: list[int]


class Engines(_Frozen):
    """How the engines were built.

    ``weights``: ``plan``, each engine holds its own; ``stripped``, engines hold none and are refitted from the weights
    files when they are loaded; ``inputs``, weights are inputs of the engines, all bound to one allocation.
    """

    weights: Literal["plan", "stripped", "inputs"] = "plan"
    version_compatible: bool = False
    hardware_compatible: bool = False
    opt_level: Annotated[int, Field(ge=0, le=5)] | None = None
    workspace: Size | None = None
    """Bytes of scratch memory the builder was allowed; None for its default."""


class Forecast(_Frozen):
    """What one request is expected to take, in bytes, worked out from shapes alone before anything was built."""

    engines: Count
    """The engine or graph files."""
    weights: Count
    """Weights on the device, as often as they are there."""
    caches: Count
    activations: Count
    """The largest program's intermediate results."""
    buffers: Count
    """Inputs and outputs of all programs, without the caches."""
    host: Count
    """Memory of the machine while it compiles."""

    @property
    def device(self) -> int:
        """Memory of the device while it runs."""
        return self.weights + self.caches + self.activations + self.buffers


class Variant(_Frozen):
    """What a further geometry of a bundle has of its own; everything else, the weights above all, it shares."""

    recipe: Recipe
    geometry: GeometrySizes
    programs: dict[str, Program]
    segments: list[Segment]
    media: Media | None = None
    position_offset: int
    notes: list[str] = []
    forecast: Forecast | None = None


class Manifest(_Frozen):
    """``manifest.json``: written last, so a directory without a valid one is not a bundle.

    A bundle of several geometries says in ``variants`` what the second and later ones have of their own; the fields
    beside it are then those of the first.
    """

    schema_version: Literal[1] = 1
    secateur: str
    name: str | None = None
    model: Model
    recipe: Recipe
    geometry: GeometrySizes
    target: Target
    dialect: str
    dtype: Dtype
    opset: Size
    provider: str | None = None
    sm: int | None = None
    programs: dict[str, Program]
    segments: list[Segment]
    media: Media | None = None
    position_offset: int
    notes: list[str] = []
    """What whoever uses the bundle should know."""
    versions: dict[str, str]
    weights: Annotated[list[BundlePath], Field(min_length=1)]
    """The safetensors files the graphs point into."""
    files: dict[BundlePath, FileEntry]
    variants: list[Variant] = []
    engines: Engines | None = None
    """None where nothing was built."""
    tensors: dict[str, StoredTensor] = {}
    """What engines without weights of their own take from the weights files."""
    forecast: Forecast | None = None
    manifest_sha256: Digest | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        for path in sorted(self.program_files() | set(self.weights)):
            if path not in self.files:
                raise ValueError(f"{path} is not listed in files")
        for path in self.weights:
            if self.files[path].header_sha256 is None:
                raise ValueError(f"{path} has no header_sha256")
        for name, tensor in self.tensors.items():
            if tensor.file not in self.weights:
                raise ValueError(f"tensor {name}: {tensor.file} is not one of the weights files")
            if tensor.offset + tensor.bytes > self.files[tensor.file].bytes:
                raise ValueError(f"tensor {name} ends behind the end of {tensor.file}")
        wanted = {name for part in self._parts() for p in part.programs.values() for name in p.weights}
        if missing := sorted(wanted - self.tensors.keys()):
            raise ValueError(f"{missing[0]} is not listed in tensors")
        _check_shapes(self, self.model.layers)
        for number, variant in enumerate(self.variants, 1):
            try:
                _check_shapes(variant, self.model.layers)
            except ValueError as error:
                raise ValueError(f"geometry {number}: {error}") from None
            if (variant.recipe.name, variant.recipe.keep) != (self.recipe.name, self.recipe.keep):
                raise ValueError(f"geometry {number}: its recipe is not the first geometry's")
            if any((variant.geometry, variant.media) == (o.geometry, o.media) for o in self._parts()[:number]):
                raise ValueError(f"geometry {number}: is there twice")
        return self

    def variant(self, index: int) -> Manifest:
        """What a bundle of the geometry alone would say: of the first for 0, of ``variants[index - 1]`` otherwise."""
        if not 0 <= index <= len(self.variants):
            raise UserError(
                f"no geometry {index}", where="variant",
                available=(f"{number}: {one.words}" for number, one in enumerate(self.each_variant())),
            )  # fmt: skip
        if index == 0:
            return self.model_copy(update={"variants": []}) if self.variants else self
        own = self.variants[index - 1]
        return self.model_copy(update={"variants": [], **{name: getattr(own, name) for name in Variant.model_fields}})

    def each_variant(self) -> list[Manifest]:
        """:meth:`variant` for every geometry, the first included."""
        return [self.variant(index) for index in range(1 + len(self.variants))]

    @property
    def items(self) -> list[str]:
        """Kinds of a row's media in the order of its prompt, one for each placeholder."""
        if self.media is not None:
            # With texts between its grids a video is several items behind one placeholder.
            return ["video"] if self.media.timestamp else [item.kind for item in self.media.items]
        return ["video"] if self.geometry.frames else ["image"] * self.geometry.images

    @property
    def shown(self) -> str:
        """What a row holds, in words."""
        g = self.geometry
        together = "video with sound" in self.items
        return describe_media(g.images, g.sizes_seen, g.frames, g.fps, g.audio_seconds, together)

    @property
    def words(self) -> str:
        """The geometry, in words."""
        g = self.geometry
        return f"batch {g.batch}, {self.shown} per row, {g.text_tokens} text tokens, {g.new_tokens} new tokens"

    def program_files(self) -> set[str]:
        """Graphs and engines of all geometries."""
        programs = [p for part in self._parts() for p in part.programs.values()]
        return {path for p in programs for path in (p.graph, p.engine) if path is not None}

    def _parts(self) -> list[Manifest | Variant]:
        return [self, *self.variants]

    def unsigned(self) -> dict[str, Any]:
        """Everything the manifest's own digest covers."""
        return self.model_dump(mode="json", exclude={"manifest_sha256"})


def _check_shapes(of: Manifest | Variant, layers: int) -> None:
    """Raise ValueError unless every program is there and the segments add up."""
    if set(of.programs) != set(PROGRAMS):
        raise ValueError(f"programs are {', '.join(of.programs)} instead of {', '.join(PROGRAMS)}")
    covered = [layer for s in of.segments for layer in range(s.first_layer, s.last_layer)]
    if covered != list(range(layers)):
        raise ValueError("segments do not cover every layer once, in order")
    for segment in of.segments:
        if segment.length + segment.removed != of.geometry.sequence:
            raise ValueError(f"segment {segment.name}: length + removed is not the sequence's length")
        if segment.evicted >= segment.length:
            raise ValueError(f"segment {segment.name}: evicted is not below its length")
        if segment.capacity < segment.length - segment.evicted:
            raise ValueError(f"segment {segment.name}: capacity is below the rows it holds")
