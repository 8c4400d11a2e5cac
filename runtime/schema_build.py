"""The manifest's account of what was built: files, stored weights, engines, what a request takes, pixels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from secateur.runtime.schema_fields import BundlePath, Count, Digest, Frozen, ProbeLevels, Shape, Size

Dtype = Literal["fp32", "fp16", "bf16"]
PortDtype = Literal["fp32", "fp16", "bf16", "int64", "int32", "bool"]
Target = Literal["onnxruntime", "onnxruntime-cuda", "plain", "tensorrt", "tensorrt-rtx"]


class FileEntry(Frozen):
    """A file's digest and size. ``header_sha256`` is a weights file's: quick to check, and graphs rely on it."""

    sha256: Digest
    """SHA-256 of all bytes of the file."""
    bytes: Count
    """Its size."""
    header_sha256: Digest | None = None
    """Of a safetensors file: SHA-256 of its first ``8 + n`` bytes, where ``n`` is what the first eight say, a
    little-endian number. None for others."""


class StoredTensor(Frozen):
    """Where a weight lies: ``bytes`` from ``offset`` on in ``file``, one of the manifest's weights files."""

    file: BundlePath
    """One of ``weights``."""
    offset: Count
    """Bytes from the file's start."""
    bytes: Size
    """Of the tensor."""
    dtype: PortDtype
    """Of its elements."""
    shape: Shape
    """Outermost first."""


class Engines(Frozen):
    """How the engines were built.

    ``weights``: ``plan``, each engine holds its own; ``stripped``, engines hold none and are refitted from the weights
    files when they are loaded; ``inputs``, weights are inputs of the engines, all bound to one allocation.
    """

    weights: Literal["plan", "stripped", "inputs"] = "plan"
    """Where they have their weights from."""
    version_compatible: bool = False
    """Whether later releases of the same major version run them."""
    hardware_compatible: bool = False
    """Whether other GPUs from Ampere on run them."""
    opt_level: Annotated[int, Field(ge=0, le=5)] | None = None
    """Of the builder; None for its default."""
    workspace: Size | None = None
    """Bytes of scratch memory the builder was allowed; None for its default."""
    architectures: list[Size] = []
    """The GPU architectures they were built for, such as 89; the manifest's ``sm`` is the first. Empty where the
    library did not say."""
    score_plugins: bool = False
    """Whether they hold kernels of our own for scores and selectors."""


class Forecast(Frozen):
    """What one request is expected to take, in bytes, worked out from shapes alone before anything was built."""

    engines: Count
    """The engine or graph files."""
    weights: Count
    """Weights on the device, as often as they are there."""
    caches: Count
    """Of one request."""
    activations: Count
    """The largest program's intermediate results."""
    buffers: Count
    """Inputs and outputs of all programs, without the caches."""
    host: Count
    """Memory of the machine while it compiles."""

    @property
    def device(self) -> int:
        """Memory of the device while it runs."""
        return self.counted + self.activations

    @property
    def counted(self) -> int:
        """What of ``device`` the manifest's shapes say exactly; intermediate results are up to who builds engines."""
        return self.weights + self.caches + self.buffers


class PixelProbe(Frozen):
    """What pictures of noise became where the bundle was made (``runtime/probe.py``).

    ``pillow`` is the release that resized them, ``sha256`` the digest of all levels of a row, uint8, in the order of
    ``pixel_values``; ``levels`` are some of them, in base64.
    """

    pillow: str
    """The release of Pillow."""
    sha256: Digest
    """SHA-256 of the levels that come out, uint8, in the order of ``pixel_values``, picture after picture, without
    ``rescale`` and ``normalize``."""
    levels: ProbeLevels
    """1,024 of them in base64: number ``i`` is at ``seed[i] % count``, where ``seed`` are the first 1,024
    little-endian numbers of 8 bytes of SHAKE-256 of ``places``."""
