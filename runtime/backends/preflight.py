"""Whether a bundle's engines can run on this machine, before a library is asked that might end the process.

From what is there at all to what there is enough of: library, driver, GPU, versions, architecture, engine files,
free memory. Every refusal is one line. Memory is looked at again once engines have said what they need.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.runtime.backends.cuda import DEVICE_NUMBER, bindings, on_device
from secateur.runtime.backends.engine_file import check_engine_file
from secateur.runtime.backends.requires import check_onnxruntime_version, numbers
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.schema import Engines, Manifest

_log = logging.getLogger(__name__)

MODULES = {"onnxruntime-cuda": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Flavour -> the module of its Python bindings."""
OLDEST = {"onnxruntime-cuda": (1, 25), "tensorrt": (10, 15), "tensorrt-rtx": (1, 0)}
"""Rotary embedding and cache updates are layers of TensorRT from 10.15 on."""
_CUDA_PROVIDER = "CUDAExecutionProvider"
_ELSEWHERE = "to run on this machine compile with --target onnxruntime"
_AMPERE = 80


@dataclass(frozen=True)
class Machine:
    """The library and the GPU that the engines will run with."""

    library: Any
    """The module ``tensorrt`` or ``tensorrt_rtx``."""
    gpu: str
    sm: int
    driver: int
    """The newest CUDA it runs, as CUDA numbers versions: 13000 is 13.0."""


def check_machine(directory: Path, manifest: Manifest, flavour: str) -> Machine:
    """Raise UserError or BundleError that says why ``manifest``'s engines cannot run here."""
    where = f"backend {flavour}"
    _check_bundle(directory, manifest, flavour)
    _check_present(flavour, where)
    library = _load(flavour, where)
    driver = _check_driver(flavour, where)
    gpu, sm = _find_gpu(where)
    engines = manifest.engines or Engines()
    _check_version(manifest, engines, flavour, str(library.__version__), where)
    _check_architecture(manifest, engines, flavour, sm, gpu, where)
    for name in sorted(_engine_files(manifest)):
        check_engine_file(directory / name, f"{directory}: {name}", flavour, manifest.versions[flavour], sm)
    if manifest.forecast is not None:  # of which activations were estimated, the rest counted
        check_free(manifest.forecast.counted, "the bundle", gpu, where)
    return Machine(library, gpu, sm, driver)


def check_onnxruntime(manifest: Manifest) -> tuple[Any, str]:
    """The module ``onnxruntime`` and the GPU its CUDA provider will run the bundle on.

    Raises UserError or BundleError that says why it cannot.
    """
    flavour = "onnxruntime-cuda"
    where = f"backend {flavour}"
    _check_target(manifest, flavour)
    _check_present(flavour, where)
    library = _load(flavour, where)
    check_onnxruntime_version(manifest, str(library.__version__), where)
    if _CUDA_PROVIDER not in library.get_available_providers():
        raise UserError(
            f"onnxruntime {library.__version__} here has no CUDA provider", where=where,
            fix="pip uninstall onnxruntime, then pip install 'secateur[cuda]': the two packages share a name",
        )  # fmt: skip
    if not hasattr(library.OrtValue, "from_dlpack"):
        raise UserError(
            f"onnxruntime {library.__version__} takes no memory of others (OrtValue.from_dlpack)", where=where,
            fix="install a newer onnxruntime-gpu",
        )  # fmt: skip
    _check_driver(flavour, where)
    # Wheels bring CUDA's libraries into directories the loader does not look into.
    getattr(library, "preload_dlls", lambda: None)()
    gpu, sm = _find_gpu(where)
    if manifest.dtype == "bf16" and sm < _AMPERE:
        raise UserError(f"{gpu} of architecture {sm} computes no bf16", where=where, fix="compile with --dtype fp16")
    if manifest.forecast is not None:
        check_free(manifest.forecast.counted, "the bundle", gpu, where)
    return library, gpu


def _engine_files(manifest: Manifest) -> set[str]:
    return {p.engine for one in manifest.each_variant() for p in one.programs.values() if p.engine is not None}


def _check_bundle(directory: Path, manifest: Manifest, flavour: str) -> None:
    _check_target(manifest, flavour)
    for one in manifest.each_variant():
        for name, program in one.programs.items():
            if program.engine is None:
                raise BundleError(
                    f"{name} has no engine", where=str(directory), fix=f"compile the bundle with --target {flavour}"
                )


def _check_target(manifest: Manifest, flavour: str) -> None:
    if manifest.target != flavour:
        raise UserError(
            f"the bundle was compiled for {manifest.target}", where=f"backend {flavour}",
            fix=f"compile it with --target {flavour}, or leave the backend to the bundle",
        )  # fmt: skip


def _check_present(flavour: str, where: str) -> None:
    """Everything that is missing in one line: whoever lacks a driver need not install a library first."""
    missing = []
    python = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
    if not (_driver_version() > 0 if python else has_driver()):
        missing.append("an NVIDIA GPU with its driver (libcuda.so.1)")
    absent = [
        name
        for name, there in (
            ("the library", importlib.util.find_spec(MODULES[flavour]) is not None),
            ("cuda-python", python),
        )
        if not there
    ]
    if absent:
        missing.append(f"{' and '.join(absent)} (pip install 'secateur[{_extra(flavour)}]')")
    if missing:
        kind = "graphs" if flavour == "onnxruntime-cuda" else "engines"
        raise UserError(
            f"the {flavour} {kind} cannot run here: missing {' and '.join(missing)}", where=where, fix=_ELSEWHERE
        )


def _extra(flavour: str) -> str:
    """The extra that brings a flavour's library."""
    return "cuda" if flavour == "onnxruntime-cuda" else flavour


def has_driver() -> bool:
    """Whether a GPU driver is installed; its version and the GPU are asked later."""
    try:
        CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _driver_version() -> int:
    """The newest CUDA the driver runs; 0 without a driver."""
    code, version = bindings().cudaDriverGetVersion()
    return 0 if int(code) != 0 else int(version)


def _load(flavour: str, where: str) -> Any:
    try:
        library = importlib.import_module(MODULES[flavour])
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the library does not load: {reason}", where=where, fix=f"pip install 'secateur[{_extra(flavour)}]'"
        ) from None
    version = str(getattr(library, "__version__", "0"))
    if numbers(version)[:2] < OLDEST[flavour]:
        oldest = ".".join(map(str, OLDEST[flavour]))
        raise UserError(f"{flavour} {version} is older than {oldest}", where=where, fix="install a newer one")
    return library


def _check_driver(flavour: str, where: str) -> int:
    """A driver runs programs of its own major version of CUDA and of older ones."""
    driver, (code, runtime) = _driver_version(), bindings().cudaRuntimeGetVersion()
    needed = max(int(runtime) // 1000 if int(code) == 0 else 0, _cuda_of_wheel(flavour))
    if driver // 1000 < needed:
        raise UserError(
            f"the driver runs CUDA up to {driver // 1000}.{driver % 1000 // 10}, {flavour} needs {needed}.0",
            where=where, fix="update the NVIDIA driver",
        )  # fmt: skip
    return driver


def _cuda_of_wheel(flavour: str) -> int:
    """The major version of CUDA in the name of the library's package; 0 where it was installed otherwise."""
    import importlib.metadata as metadata

    if flavour == "onnxruntime-cuda":
        return 0  # its package's name does not say
    names = ("tensorrt-rtx-cu{}",) if flavour == "tensorrt-rtx" else ("tensorrt-cu{}", "tensorrt-cu{}-bindings")
    for major in range(20, 11, -1):
        for name in names:
            try:
                metadata.version(name.format(major))
            except metadata.PackageNotFoundError:
                continue
            return major
    return 0


def _find_gpu(where: str) -> tuple[str, int]:
    """Name and architecture of the first GPU the process sees."""
    runtime = bindings()
    code, count = runtime.cudaGetDeviceCount()
    if int(code) != 0 or not count:
        name = "" if int(code) == 0 else f" ({runtime.cudaGetErrorName(code)[1].decode()})"
        raise UserError(
            f"there is a driver, but it shows no GPU{name}", where=where,
            fix=f"look at nvidia-smi and CUDA_VISIBLE_DEVICES; {_ELSEWHERE}",
        )  # fmt: skip
    properties = _ask(runtime.cudaGetDeviceProperties, where)
    shown = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return shown, int(properties.major) * 10 + int(properties.minor)


def _ask(function: Any, where: str) -> Any:
    code, value = function(DEVICE_NUMBER)
    if int(code) != 0:
        name = bindings().cudaGetErrorName(code)[1].decode()
        raise UserError(f"the GPU does not answer ({name})", where=where, fix="look at nvidia-smi")
    return value


def _check_version(manifest: Manifest, engines: Engines, flavour: str, installed: str, where: str) -> None:
    """Engines run with the release that built them; version compatible ones with later ones of the same major too."""
    built = manifest.versions.get(flavour)
    if built is None:
        raise BundleError(f"the manifest does not say which {flavour} built the engines", where=where,
                          fix="compile the bundle again")  # fmt: skip
    if built == installed:
        return
    older, newer = numbers(built), numbers(installed)
    if engines.version_compatible and older[:1] == newer[:1] and older <= newer:
        return
    kind = "version compatible engines run from that version on, within its major" if engines.version_compatible else (
        "engines run with the very version that built them"
    )  # fmt: skip
    raise BundleError(
        f"the engines were built by {flavour} {built}, {installed} is installed; {kind}", where=where,
        fix=f"install that version, or compile again with {installed}",
    )  # fmt: skip


def _check_architecture(manifest: Manifest, engines: Engines, flavour: str, sm: int, gpu: str, where: str) -> None:
    if engines.hardware_compatible and flavour == "tensorrt":
        if sm < _AMPERE:
            raise BundleError(
                f"hardware compatible engines run from architecture {_AMPERE} on, {gpu} is {sm}", where=where,
                fix="compile on this machine without --hardware-compatible",
            )  # fmt: skip
        return
    built_for = engines.architectures or ([] if manifest.sm is None else [manifest.sm])
    if not built_for:  # for the GPU of some machine: only the library knows which
        _log.debug("the manifest names no GPU architecture; this one is %d", sm)
        return
    if sm not in built_for:
        fix = f"compile with --sm {sm}" if flavour == "tensorrt-rtx" else "compile on this machine"
        raise BundleError(
            f"the engines are for architecture {', '.join(map(str, built_for))}, {gpu} is {sm}", where=where, fix=fix
        )


@on_device()
def check_free(needed: int, what: str, gpu: str, where: str) -> None:
    """Raise UserError where fewer than the ``needed`` bytes that ``what`` takes are free on ``gpu``."""
    code, free, total = bindings().cudaMemGetInfo()
    if int(code) != 0:
        name = bindings().cudaGetErrorName(code)[1].decode()
        raise UserError(f"{gpu} does not say how much memory is free ({name})", where=where, fix="look at nvidia-smi")
    if needed > free:
        raise UserError(
            f"{what} needs {_mib(needed)} of {gpu}, {_mib(free)} of {_mib(total)} are free",
            where=where, fix="free memory of the GPU, or compile a smaller geometry",
        )  # fmt: skip


def _mib(size: int) -> str:
    return f"{-(-size // (1 << 20))} MiB"
