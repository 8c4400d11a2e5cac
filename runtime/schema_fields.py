"""The kinds of fields the manifest's schema is made of."""

from __future__ import annotations

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


BundlePath = Annotated[str, AfterValidator(_bundle_path)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """A part of the manifest: what it does not know it refuses, and nothing is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
