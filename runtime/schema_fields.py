"""The kinds of fields the manifest's schema is made of."""

from __future__ import annotations

import base64
import binascii
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _bundle_path(path: str) -> str:
    """A path inside the bundle: relative, with ``/``, never leaving the directory."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"path {path!r} leaves the bundle")
    if str(pure) != path or path == ".":
        raise ValueError(f"path {path!r} is not in its shortest form")
    return path


PROBE_LEVELS = 1024
"""Levels of the pictures that tell whether a machine makes a bundle's pixels: 1.4 kB in base64."""


def _probe_levels(text: str) -> str:
    try:
        count = len(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    if count != PROBE_LEVELS:
        raise ValueError(f"{count} levels instead of {PROBE_LEVELS}")
    return text


ProbeLevels = Annotated[str, AfterValidator(_probe_levels)]
BundlePath = Annotated[str, AfterValidator(_bundle_path)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_MOST = 1 << 62
"""Beyond it a number does not fit the libraries that are given it."""
Count = Annotated[int, Field(ge=0, le=_MOST)]
Size = Annotated[int, Field(ge=1, le=_MOST)]
Offset = Annotated[int, Field(ge=-(1 << 40), le=1 << 40)]
Shape = Annotated[list[Count], Field(max_length=8)]
"""Of a tensor, outermost first."""


class Frozen(BaseModel):
    """A part of the manifest: what it does not know it refuses, and nothing is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), str_max_length=16_384)
