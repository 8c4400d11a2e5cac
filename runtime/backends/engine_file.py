"""The first bytes of an engine file, and the version and GPU that it was built for.

Only TensorRT-RTX's header is read closely. Its layout is not documented; it is what engines of release 1.7 begin with,
and a test holds a freshly built one against it: 0 ``vtrt``; 16 the file's size, 8 bytes; 24 major, minor, patch and
build of the library, one byte each; 32 a bit for each GPU architecture it was compiled for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secateur.runtime.errors import BundleError

RTX_MAGIC = b"vtrt"
_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}
_HEADER = 64
_REBUILD = "compile the bundle again, or copy it again from where it was whole"


@dataclass(frozen=True)
class RtxHeader:
    """What a TensorRT-RTX engine says of itself. ``architectures`` is empty where its bits are not known."""

    bytes: int
    version: tuple[int, int, int, int]
    architectures: tuple[int, ...]


def read_rtx_header(path: Path) -> RtxHeader | None:
    """The header of an engine of TensorRT-RTX; None where the file begins otherwise."""
    with open(path, "rb") as file:
        start = file.read(_HEADER)
    if len(start) < _HEADER or not start.startswith(RTX_MAGIC):
        return None
    bits = int.from_bytes(start[32:40], "little")
    found = tuple(sm for sm, bit in _BITS.items() if bits & bit)
    known = bits == sum(_BITS[sm] for sm in found)
    major, minor, patch, build = start[24:28]
    return RtxHeader(int.from_bytes(start[16:24], "little"), (major, minor, patch, build), found if known else ())


def check_engine_file(path: Path, where: str, flavour: str, version: str, sm: int) -> None:
    """Refuse an engine that is no engine of ``flavour``, of another ``version`` or for other GPUs than ``sm``.

    Its digest is the manifest's by now; this is about a manifest that says something else than the engine.
    """
    header, size = read_rtx_header(path), path.stat().st_size
    if size < _HEADER:
        raise BundleError(f"not an engine of {flavour}: {size} bytes", where=where, fix=_REBUILD)
    if flavour != "tensorrt-rtx":
        if header is not None:
            raise BundleError("an engine of tensorrt-rtx, not of tensorrt", where=where, fix=_REBUILD)
        return
    if header is None:
        raise BundleError("not an engine of tensorrt-rtx", where=where, fix=_REBUILD)
    if header.bytes != size:
        raise BundleError(f"{size} bytes, its header says {header.bytes}", where=where, fix=_REBUILD)
    built = ".".join(map(str, header.version))
    if built.split(".")[:3] != version.split(".")[:3]:
        raise BundleError(f"built by {flavour} {built}, the manifest says {version}", where=where, fix=_REBUILD)
    if header.architectures and sm not in header.architectures:
        raise BundleError(
            f"the engine is for architecture {', '.join(map(str, header.architectures))}, this GPU is {sm}",
            where=where, fix=f"compile with --sm {sm}",
        )  # fmt: skip
