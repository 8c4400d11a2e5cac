"""The manifest's schema: what a bundle says about itself. The reader of a format owns its schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from secateur.runtime.errors import UserError
from secateur.runtime.schema_build import (
    Dtype,
    Engines,
    FileEntry,
    Forecast,
    PixelProbe,
    PortDtype,
    StoredTensor,
    Target,
)
from secateur.runtime.schema_checks import check_part
from secateur.runtime.schema_fields import BundlePath, Count, Digest, Frozen, Offset, Shape, Size
from secateur.runtime.schema_inputs import Preprocessing
from secateur.runtime.schema_model import (
    GeometrySizes,
    ImageSize,
    Media,
    MediaItem,
    Model,
    Recipe,
    Stage,
    describe_media,
)
from secateur.runtime.schema_requires import Requires
from secateur.runtime.schema_text import PromptFacts, TokenizerFacts

__all__ = [
    "DTYPE_BYTES", "PROGRAMS", "SCHEMA_VERSION", "Dtype", "Engines", "FileEntry", "Forecast", "GeometrySizes",
    "ImageSize", "Manifest", "Media", "MediaItem", "Model", "PixelProbe", "Port", "PortDtype", "Preprocessing",
    "Program", "PromptFacts", "Recipe", "Requires", "Segment", "Stage", "StoredTensor", "Target", "TokenizerFacts",
    "Variant", "describe_media",
]  # fmt: skip

SCHEMA_VERSION: Literal[3] = 3
"""Written. Versions 1 and 2 are read too: what later ones added is optional, and a manifest without it means what it
meant."""

PROGRAMS = ("vision", "prefill", "decode")
"""In the order a request meets them."""
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
PORT_BYTES = {**DTYPE_BYTES, "int64": 8, "int32": 4, "bool": 1}


class Port(Frozen):
    """An input or output of a program. ``dtype`` is one of fp32, fp16, bf16, int64, int32, bool."""

    name: str
    """Of the graph's input or output."""
    dtype: PortDtype
    """Of its elements."""
    shape: Shape
    """Static."""


class Program(Frozen):
    """A graph, its engine where there is one, its ports and its cost."""

    graph: BundlePath
    """Its ONNX file."""
    engine: BundlePath | None = None
    """Its engine; None where none was built."""
    inputs: list[Port]
    """In the graph's order."""
    outputs: list[Port]
    """In the graph's order."""
    flops: Count
    """Of one run."""
    unpruned_flops: Count
    """Of one run without the recipe."""
    weights: list[str] = []
    """The tensors its engine, or its session on a GPU, is given, by their names in the manifest's ``tensors``."""

    def has_input(self, name: str) -> bool:
        return any(port.name == name for port in self.inputs)


class Segment(Frozen):
    """Layers ``first_layer`` to ``last_layer`` (exclusive) see ``length`` tokens in prefill.

    ``removed`` is how many tokens of the sequence are gone before the first of them; ``evicted`` how many of those
    they saw their caches do not hold after prefill, because later stages removed them there as well.
    """

    name: str
    """By which the ports ``slot.<segment>`` are named."""
    first_layer: Count
    """The first of its layers, from 0."""
    last_layer: Size
    """One more than the last of its layers: exclusive."""
    length: Size
    """Tokens its layers see in prefill."""
    capacity: Size
    """Rows of its caches: those that prefill leaves in them, and ``geometry.new_tokens``."""
    removed: Count
    """Tokens of the prompt that are gone before its first layer."""
    evicted: Count = 0
    """Tokens its layers see in prefill that their caches do not hold behind it."""


class Variant(Frozen):
    """What a further geometry of a bundle has of its own; everything else, the weights above all, it shares."""

    recipe: Recipe
    geometry: GeometrySizes
    programs: dict[str, Program]
    segments: list[Segment]
    media: Media | None = None
    position_offset: Offset
    notes: list[str] = []
    forecast: Forecast | None = None
    pixels: PixelProbe | None = None
    preprocessing: Preprocessing | None = None


class Manifest(Frozen):
    """``manifest.json``: written last, so a directory without a valid one is not a bundle.

    A bundle of several geometries says in ``variants`` what the second and later ones have of their own; the fields
    beside it are then those of the first.
    """

    schema_version: Literal[1, 2, 3] = SCHEMA_VERSION
    """Of this schema. A reader refuses what is newer than it, by this number."""
    secateur: str
    """The release that made the bundle."""
    name: str | None = None
    """A name its maker gave it; None for none."""
    model: Model
    """The checkpoint."""
    recipe: Recipe
    """What was pruned, and how."""
    geometry: GeometrySizes
    """The static shapes."""
    target: Target
    """What the bundle was compiled for."""
    dialect: str
    """How the graphs write attention, caches and norms."""
    dtype: Dtype
    """Of features, caches and logits; what most of the graphs compute in."""
    opset: Size
    """Of the standard domain, in every graph."""
    provider: str | None = None
    """The execution provider of ONNX Runtime; None where none runs the bundle."""
    sm: int | None = None
    """The first GPU architecture that engines were built for; None without engines."""
    programs: dict[str, Program]
    """``vision``, ``prefill`` and ``decode`` by their names."""
    segments: list[Segment]
    """Runs of layers that see equally many tokens, in order; together they are all layers."""
    media: Media | None = None
    """None in models whose position ids have one axis."""
    position_offset: Offset
    """What the position id of an answer's first token lies above the prompt's real length, where ``prefill`` has no
    ``positions``."""
    notes: list[str] = []
    """What whoever uses the bundle should know."""
    versions: dict[str, str]
    """Library -> the release that made the bundle."""
    weights: Annotated[list[BundlePath], Field(min_length=1)]
    """The safetensors files the graphs point into."""
    files: dict[BundlePath, FileEntry]
    """Every file of the bundle but the manifest, by its path."""
    variants: list[Variant] = []
    """The second and later geometries of the bundle; empty where it has one."""
    engines: Engines | None = None
    """None where nothing was built."""
    tensors: dict[str, StoredTensor] = {}
    """What engines without weights of their own, and sessions on a GPU, take from the weights files."""
    forecast: Forecast | None = None
    """None where nothing was foretold."""
    pixels: PixelProbe | None = None
    """None in bundles of schema 1, and where images are not resized."""
    preprocessing: Preprocessing | None = None
    """None in bundles of schema 1 and 2."""
    tokenizer: TokenizerFacts | None = None
    """None in bundles of schema 1 and 2."""
    prompt: PromptFacts | None = None
    """None in bundles of schema 1 and 2."""
    requires: Requires | None = None
    """None in bundles of schema 1 and 2."""
    self_test: BundlePath | None = None
    """The file that says what goes in and what has to come out (``runtime/schema_self_test.py``)."""
    manifest_sha256: Digest | None = None
    """SHA-256 of everything else here, in canonical JSON: keys sorted at every depth, one space of indent a level,
    ``,`` and a newline between entries, ``: `` behind keys, no escapes but JSON's own, UTF-8, a newline at the end."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        for path in sorted(self.program_files() | set(self.weights) | set(filter(None, [self.self_test]))):
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
        check_part(self, self)
        for number, variant in enumerate(self.variants, 1):
            try:
                check_part(variant, self)
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
