"""What has to be there to run a bundle: the library, its least version, operator domains, how caches are bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.exporters.engine_options import EngineOptions
from secateur.exporters.onnx import Exported
from secateur.runtime import manifest as m
from secateur.runtime.errors import SecateurError

_CUDA = "onnxruntime-cuda"
_LEAST_CUDA = "1.25"
"""The first ONNX Runtime whose Python takes memory of others, as the backend gives it weights."""
_OPTIONS = {"use_tf32": "0"}
"""Scores are chosen in fp32: all of its bits count."""


def describe_requires(
    target: str,
    exported: Exported,
    provider: str | None,
    versions: Mapping[str, str],
    engines: EngineOptions | None,
    sms: Sequence[int],
) -> m.Requires:
    """``versions`` are those that made the bundle, ``sms`` the GPU architectures its engines run on."""
    imports: dict[str, int] = {}
    for model in exported.models.values():
        imports |= {domain or "ai.onnx": version for domain, version in model.opset_imports.items()}
    ir_version = max(model.ir_version for model in exported.models.values())
    domains = dict(sorted(imports.items()))
    if target.startswith("tensorrt"):
        engines = engines or EngineOptions()
        return m.Requires(
            library=target,  # type: ignore[arg-type]  # pydantic checks
            version=_plain(versions[target]), exact=not engines.version_compatible,
            architectures=[] if engines.hardware_compatible and target == "tensorrt" else list(sms),
            ir_version=ir_version, domains=domains, caches="in_place",
        )  # fmt: skip
    if exported.opset not in m.LEAST_ONNXRUNTIME:
        raise SecateurError(f"no release of ONNX Runtime is known to run opset {exported.opset}", where="requires")
    return m.Requires(
        library="onnxruntime", version=_LEAST_CUDA if target == _CUDA else m.LEAST_ONNXRUNTIME[exported.opset],
        provider=provider, ir_version=ir_version, domains=domains, caches="in_place" if target == _CUDA else "either",
        options=_OPTIONS if target == _CUDA else {},
    )  # fmt: skip


def _plain(version: str) -> str:
    """The numbers of a version, without what may follow them."""
    numbers = [part for part in version.split(".")[:4] if part.isdecimal()]
    return ".".join(numbers)
