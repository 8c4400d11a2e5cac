"""The schema of a bundle's self-test: what goes in, and what has to come out of every step up to some logits.

The file lies in the bundle; the manifest's ``self_test`` names it. A host in any language can hold its own run against
it, and ``secateur verify`` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from secateur.runtime.errors import BundleError
from secateur.runtime.schema import Manifest
from secateur.runtime.schema_fields import BundlePath, Count, Digest, Frozen, Shape

SELF_TEST = "self_test.json"
FORMAT: Literal[1] = 1
_REMAKE = "compile the bundle again"

Level = Annotated[int, Field(ge=0, le=255)]


class Sampled(Frozen):
    """Some values of an array of this shape, at flat indices ``at`` (the last axis runs fastest), rounded to six
    digits. A right run's are no further from them than ``tolerance``."""

    shape: Shape
    at: Annotated[list[Count], Field(min_length=1)]
    values: list[float]
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _lies_inside(self) -> Sampled:
        if len(self.at) != len(self.values) or max(self.at) >= math.prod(self.shape):
            raise ValueError(f"{len(self.values)} values at {len(self.at)} places do not fit the shape {self.shape}")
        if not all(map(math.isfinite, self.values)):
            raise ValueError("a value is not a finite number")
        return self


class Pixels(Frozen):
    """``pixel_values`` of all rows, and the levels 0 to 255 that they are made of.

    ``sha256`` is the digest of all levels as uint8, in the order of ``pixel_values``: what those would be with a mean
    of 0, a deviation of 1 and no scaling. ``levels`` are those at ``values.at``. ``pillow`` is the release that resized
    them.
    """

    pillow: str
    sha256: Digest
    levels: list[Level]
    values: Sampled

    @model_validator(mode="after")
    def _has_a_level_for_each(self) -> Pixels:
        if len(self.levels) != len(self.values.at):
            raise ValueError(f"{len(self.levels)} levels at {len(self.values.at)} places")
        return self


class MediaFiles(Frozen):
    """The media of one row. ``video`` lists the frames of its one video, each seen 1 / ``video_fps`` seconds after the
    one before."""

    images: list[BundlePath] = []
    video: list[BundlePath] = []
    video_fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    audio: list[BundlePath] = []


class Row(MediaFiles):
    """What one row is asked. ``text`` is the prompt as it is given to the tokenizer, ``ids`` what enters ``prefill``,
    without padding."""

    prompt: str
    text: str
    ids: Annotated[list[Count], Field(min_length=1)]


class Chat(Frozen):
    """The media of the first row, asked about by messages."""

    messages: list[dict[str, Any]]
    text: str
    ids: Annotated[list[Count], Field(min_length=1)]


class Numbers(Frozen):
    """What the programs make of the rows.

    ``survivors``: of every stage that chooses, the places among all tokens of the row's media that are left after it,
    ``[B][K]``. ``tokens [B][T]``: what a greedy run chooses. ``logits [B, vocab]``: those of ``prefill``, then of every
    ``decode`` that is given the tokens one after another; the last token is not decoded.
    """

    features: Sampled
    survivors: dict[str, list[list[Count]]]
    tokens: Annotated[list[Annotated[list[Count], Field(min_length=1)]], Field(min_length=1)]
    logits: Annotated[list[Sampled], Field(min_length=1)]


class Case(Frozen):
    """One batch of one geometry. In ``resized`` pictures have other sizes than the bundle was compiled for; in
    ``exact`` they have those, and it goes on to the programs."""

    name: Literal["resized", "exact"]
    geometry: Count
    rows: Annotated[list[Row], Field(min_length=1)]
    chat: Chat | None = None
    pixels: Pixels
    sound: Sampled | None = None
    numbers: Numbers | None = None

    @property
    def where(self) -> str:
        return f"geometry {self.geometry}, {self.name}"

    def media(self) -> Iterator[str]:
        for row in self.rows:
            yield from (*row.images, *row.video, *row.audio)


class SelfTest(Frozen):
    """``made_with`` names the libraries the results come from."""

    format: Literal[1] = FORMAT
    made_with: dict[str, str]
    cases: list[Case]


def write_self_test(directory: Path, test: SelfTest) -> Path:
    """One spelling per value, on one line; defaults are left out."""
    path = directory / SELF_TEST
    content = test.model_dump(mode="json", exclude_defaults=True) | {"format": test.format}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8", newline="\n")
    return path


def read_self_test(directory: Path, manifest: Manifest) -> SelfTest | None:
    """A bundle's self-test; None where it has none. Raises :class:`BundleError` for one that cannot be."""
    if manifest.self_test is None:
        return None
    where = f"{directory}: {manifest.self_test}"
    try:
        content = (directory / manifest.self_test).read_bytes()
        _refuse_newer(content, where)
        test = SelfTest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BundleError(f"{field}: {first['msg']}"[:400], where=where, fix=_REMAKE) from None
    except OSError as error:
        raise BundleError(f"cannot be read ({error.strerror})", where=where, fix=_REMAKE) from None
    for number, case in enumerate(test.cases):
        _check_case(case, manifest, f"{where}, case {number}")
    return test


def _refuse_newer(content: bytes, where: str) -> None:
    """A later format may have fields that this one takes for mistakes; compiling again would not help."""
    try:
        found = json.loads(content)["format"]
    except (ValueError, TypeError, KeyError):
        return  # what is wrong with it, the schema says
    if type(found) is int and found > FORMAT:
        raise BundleError(
            f"the self-test has format {found}, this secateur reads up to {FORMAT}", where=where,
            fix="upgrade with: pip install -U secateur",
        )  # fmt: skip


def _check_case(case: Case, manifest: Manifest, where: str) -> None:
    """A case must be of a geometry of the bundle and name files of it."""
    if case.geometry > len(manifest.variants):
        raise BundleError(f"no geometry {case.geometry}", where=where, fix=_REMAKE)
    if unlisted := sorted(set(case.media()) - manifest.files.keys()):
        raise BundleError(f"{unlisted[0]} is not listed in files", where=where, fix=_REMAKE)
    sizes, vocab = manifest.variant(case.geometry).geometry, manifest.model.vocab_size
    if len(case.rows) != sizes.batch or max(len(row.ids) for row in case.rows) > sizes.sequence:
        raise BundleError("its rows do not fit the geometry", where=where, fix=_REMAKE)
    if case.numbers is None:
        return
    tokens, steps = case.numbers.tokens, len(case.numbers.logits)
    if any(len(rows) != sizes.batch for rows in case.numbers.survivors.values()):
        raise BundleError("its survivors do not fit the geometry", where=where, fix=_REMAKE)
    if len(tokens) != sizes.batch or any(len(row) != steps for row in tokens) or steps > sizes.new_tokens:
        raise BundleError("its tokens do not fit the geometry", where=where, fix=_REMAKE)
    if max(map(max, tokens)) >= vocab:
        raise BundleError(f"token {max(map(max, tokens))} of {vocab}", where=where, fix=_REMAKE)
