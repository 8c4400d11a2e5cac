"""Whether the library that is installed is new enough for a bundle, before it is asked and answers in its own words."""

from __future__ import annotations

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.schema import Manifest
from secateur.runtime.schema_requires import LEAST_ONNXRUNTIME


def least_version(manifest: Manifest) -> str | None:
    """Of ONNX Runtime; None where nobody knows. Bundles of older schemas say it by their opset alone."""
    if manifest.requires is not None and manifest.requires.library == "onnxruntime":
        return manifest.requires.version
    return LEAST_ONNXRUNTIME.get(manifest.opset)


def check_onnxruntime_version(manifest: Manifest, installed: str, where: str) -> None:
    """Raise UserError where ONNX Runtime ``installed`` is older than the bundle's graphs need, and BundleError where
    the bundle says that another library runs it."""
    least = least_version(manifest)
    if manifest.requires is not None and manifest.requires.library != "onnxruntime":
        raise BundleError(f"the bundle's programs are run by {manifest.requires.library}", where=where,
                          fix="leave the backend to the bundle")  # fmt: skip
    if least is not None and numbers(installed) < numbers(least):
        raise UserError(
            f"the bundle needs ONNX Runtime {least} or newer (its graphs have opset {manifest.opset}), {installed} is "
            "installed",
            where=where, fix=f"pip install -U 'onnxruntime>={least}'",
        )  # fmt: skip


def numbers(version: str) -> tuple[int, ...]:
    """``1.23.0rc1`` -> (1, 23): a release's numbers, up to the first part that is none."""
    found: list[int] = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found)
