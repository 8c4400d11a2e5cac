"""Read, write and check a bundle's manifest and files before anything reaches a backend."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from secateur.runtime.errors import BundleError
from secateur.runtime.schema import (
    DTYPE_BYTES,
    PROGRAMS,
    SCHEMA_VERSION,
    Engines,
    FileEntry,
    Forecast,
    GeometrySizes,
    ImageSize,
    Manifest,
    Media,
    MediaItem,
    Model,
    PixelProbe,
    Port,
    Preprocessing,
    Program,
    PromptFacts,
    Recipe,
    Requires,
    Segment,
    Stage,
    StoredTensor,
    TokenizerFacts,
    Variant,
    describe_media,
)
from secateur.runtime.schema_requires import LEAST_ONNXRUNTIME
from secateur.runtime.weight_file import TensorEntry, WeightHeader, hash_header, read_header

__all__ = [
    "DTYPE_BYTES",
    "LEAST_ONNXRUNTIME",
    "MANIFEST",
    "PROGRAMS",
    "SCHEMA_VERSION",
    "Engines",
    "FileEntry",
    "Forecast",
    "GeometrySizes",
    "ImageSize",
    "Manifest",
    "Media",
    "MediaItem",
    "Model",
    "PixelProbe",
    "Port",
    "Preprocessing",
    "Program",
    "PromptFacts",
    "Recipe",
    "Requires",
    "Segment",
    "Stage",
    "StoredTensor",
    "TensorEntry",
    "TokenizerFacts",
    "Variant",
    "WeightHeader",
    "canonical_json",
    "check_files",
    "describe_media",
    "file_entry",
    "hash_file",
    "read_header",
    "read_manifest",
    "write_manifest",
]  # fmt: skip

MANIFEST = "manifest.json"
Level = Literal["graphs", "full"]

_log = logging.getLogger(__name__)
_LONGEST = 400
_RECOMPILE = "compile the bundle again, or copy it again from where it was whole"


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, one space of indent, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def hash_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None, piece: int = 1 << 20) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of ``piece`` bytes; ``on_bytes`` is told the bytes of each."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(piece, path.stat().st_size or 1)))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            on_bytes(read)
    return digest.hexdigest()


def file_entry(path: Path, sha256: str | None = None) -> FileEntry:
    """The manifest's entry for a file as it is now; ``sha256`` where its digest is known already.

    The entry of a safetensors file also holds its header's digest. Raises ValueError for one without a header.
    """
    header = hash_header(path) if path.suffix == ".safetensors" else None
    return FileEntry(sha256=sha256 or hash_file(path), bytes=path.stat().st_size, header_sha256=header)


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Sign the manifest and put it in place atomically: after this the directory is a bundle.

    Returns the manifest with ``manifest_sha256`` set, in the newest schema version. The temporary file is removed on
    any failure.
    """
    unsigned = {**manifest.unsigned(), "schema_version": SCHEMA_VERSION}
    signed = {**unsigned, "manifest_sha256": _digest(unsigned)}
    handle, name = tempfile.mkstemp(prefix=".manifest-", dir=directory)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(canonical_json(signed))
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(name, Path(directory) / MANIFEST)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_directory(Path(directory))
    return Manifest.model_validate(signed)


def read_manifest(directory: Path | str) -> Manifest:
    """The manifest of a bundle, or a :class:`BundleError` that says why it is not one.

    The schema version is looked at first, so that an older program can say "too new" instead of
    stumbling over a field it does not know; then the manifest's own digest, then every field.
    """
    directory = Path(directory)
    raw = _load(directory)
    version = raw.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError("schema_version is missing or not a number", where=_at(directory), fix=_RECOMPILE)
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"the manifest has schema {version}, this secateur reads up to {SCHEMA_VERSION}",
            where=_at(directory),
            fix="upgrade with: pip install -U secateur",
        )
    unsigned = {key: value for key, value in raw.items() if key != "manifest_sha256"}
    try:
        canonical_json(raw).encode()
    except UnicodeEncodeError:
        raise BundleError("the manifest holds text that is not Unicode", where=_at(directory), fix=_RECOMPILE) from None
    if raw.get("manifest_sha256") != _digest(unsigned):
        raise BundleError("the manifest was altered: its digest does not match", where=_at(directory), fix=_RECOMPILE)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = (
            "unknown field" if first["type"] == "extra_forbidden" else str(first["msg"]).removeprefix("Value error, ")
        )
        raise BundleError(
            _shorten(f"{field}: {reason}" if field else reason),
            where=_at(directory),
            fix="the bundle was made by a different secateur; compile it again",
        ) from None


def check_files(directory: Path | str, manifest: Manifest, level: Level = "graphs") -> None:
    """Compare every listed file with the manifest; raise :class:`BundleError` naming the first that differs.

    Sizes of all files; SHA-256 of graphs, engines and the small processor files; of weights their size
    and the SHA-256 of their safetensors header, and with ``level="full"`` that of the whole files too.
    """
    root = Path(directory).resolve()
    for name, entry in sorted(manifest.files.items()):
        path = Path(directory) / name
        if not path.resolve().is_relative_to(root):
            raise BundleError(
                "links to a file outside the bundle", where=f"{directory}: {name}", fix="put the file itself there"
            )
        if not path.is_file():
            raise BundleError("missing", where=f"{directory}: {name}", fix=_RECOMPILE)
        size = path.stat().st_size
        if size != entry.bytes:
            state = "truncated" if size < entry.bytes else "longer than it should be"
            raise BundleError(
                f"{state}: {size} bytes instead of {entry.bytes}", where=f"{directory}: {name}", fix=_RECOMPILE
            )
        weights = name in manifest.weights
        if weights:
            _check_weights(path, f"{directory}: {name}", entry)
        if (not weights or level == "full") and hash_file(path) != entry.sha256:
            raise BundleError(
                "altered: its SHA-256 is not the manifest's", where=f"{directory}: {name}", fix=_RECOMPILE
            )
    _log.debug("checked %d files of %s (%s)", len(manifest.files), directory, level)


def _check_weights(path: Path, where: str, entry: FileEntry) -> None:
    """The header must describe exactly the bytes that follow, and be the one the graphs' offsets come from."""
    try:
        header = read_header(path)
    except ValueError as error:
        raise BundleError(f"not a whole safetensors file ({error})", where=where, fix=_RECOMPILE) from None
    if header.sha256 != entry.header_sha256:
        raise BundleError("altered: its header's SHA-256 is not the manifest's", where=where, fix=_RECOMPILE)


def _load(directory: Path) -> dict[str, Any]:
    if not directory.exists():
        raise BundleError("no such bundle", where=str(directory), fix="make one with: secateur compile")
    if not directory.is_dir():
        raise BundleError("not a bundle: a bundle is a directory", where=str(directory))
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"not a bundle: it has no {MANIFEST}", where=str(directory), fix="make one with: secateur compile"
        )
    try:
        raw = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"the manifest is not JSON ({error})", where=_at(directory), fix=_RECOMPILE) from None
    if not isinstance(raw, dict):
        raise BundleError("the manifest is not a JSON object", where=_at(directory), fix=_RECOMPILE)
    return raw


def _shorten(text: str) -> str:
    """A line of it: names in a manifest may be as long as somebody likes."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _digest(unsigned: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(unsigned).encode("utf-8", "surrogatepass")).hexdigest()


def _at(directory: Path) -> str:
    return str(directory / MANIFEST)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable; file systems that cannot sync a directory are left alone."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        _log.debug("cannot sync %s", directory)
    finally:
        os.close(handle)
