"""How engines are built: the options as one value, and what a flavour of TensorRT does not have of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from secateur.exporters.gpu import has_driver
from secateur.runtime.errors import UserError

WEIGHTS = ("inputs", "plan", "stripped")
"""Where an engine's weights are; see :class:`EngineOptions`."""

LEVELS = range(6)


@dataclass(frozen=True)
class EngineOptions:
    """What the builder is told beside the graph, for both flavours; None is the library's own default.

    ``weights``: ``inputs``, large weights are inputs of the engines, so that all of them can use one allocation;
    ``plan``, each engine holds its own; ``stripped``, engines hold none of the large ones and get them by a refit
    when they are loaded. ``workspace``: bytes of scratch memory a layer may take. ``opt_level``: 0 to 5, how long
    the builder searches. ``version_compatible``: runs on later versions of the library too.
    ``hardware_compatible``: on other architectures from Ampere on. ``timing_cache``: a file that measurements are
    read from and added to. ``score_plugins``: heavy scores and selectors are kernels inside the engines
    (docs/kernels.md) instead of standard operators.
    """

    weights: str = "inputs"
    workspace: int | None = None
    opt_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None
    score_plugins: bool = False


# What a flavour lacks: why, and what to do instead. Found with TensorRT-RTX 1.7 on a machine without a GPU.
_LACKS: dict[str, dict[str, tuple[str, str]]] = {
    "tensorrt": {},
    "tensorrt-rtx": {
        "version_compatible": (
            "its engines run on the release that built them, and the lean runtime they would need is not part of it",
            "leave it out, and compile again for another release",
        ),
        "hardware_compatible": ("it ignores this", "name every architecture instead: --sm 86 --sm 89 --sm 120"),
        "timing_cache": (
            "it measures nothing when it builds, and a cache would make it look for a GPU", "leave it out",
        ),
        "score_plugins": (
            "its library takes no kernels compiled ahead of time", "leave it out: scores are written out",
        ),
    },
}  # fmt: skip

# What each option is made of in the library's Python module.
_NEEDS: dict[str, tuple[str, ...]] = {
    "workspace": ("IBuilderConfig.set_memory_pool_limit", "MemoryPoolType.WORKSPACE"),
    "opt_level": ("IBuilderConfig.builder_optimization_level",),
    "version_compatible": ("BuilderFlag.VERSION_COMPATIBLE",),
    "hardware_compatible": ("HardwareCompatibilityLevel.AMPERE_PLUS",),
    "timing_cache": ("IBuilderConfig.create_timing_cache", "IBuilderConfig.set_timing_cache"),
    "stripped": (
        "BuilderFlag.STRIP_PLAN", "BuilderFlag.REFIT_INDIVIDUAL", "INetworkDefinition.mark_weights_refittable"
    ),
}  # fmt: skip


def flag_of(option: str) -> str:
    """The option of the command line that sets a field."""
    return "--engine-weights" if option == "weights" else f"--{option.replace('_', '-')}"


def given(options: EngineOptions) -> list[str]:
    """The fields that say something else than the default."""
    return [field.name for field in fields(options) if getattr(options, field.name) != field.default]


def check_options(flavour: str, options: EngineOptions) -> None:
    """Raise UserError for what the flavour does not have, for values out of range, and for what needs a GPU driver
    where there is none. Needs no library installed."""
    if options.weights not in WEIGHTS:
        raise UserError(f"no place {options.weights!r} for weights", where="--engine-weights", available=WEIGHTS)
    if options.opt_level is not None and options.opt_level not in LEVELS:
        raise UserError(f"no optimization level {options.opt_level}", where="--opt-level", available=map(str, LEVELS))
    if options.workspace is not None and options.workspace < 1:
        raise UserError(f"{options.workspace} bytes are no room", where="--workspace", fix="say 4GiB, for instance")
    for option in given(options):
        if option in _LACKS[flavour]:
            why, fix = _LACKS[flavour][option]
            raise UserError(f"{flavour} cannot: {why}", where=flag_of(option), fix=fix)
    if options.weights == "stripped" and not has_driver():
        raise UserError(
            f"{flavour} strips weights only where a GPU driver is (libcuda.so.1), and there is none here",
            where="--engine-weights stripped",
            fix="take --engine-weights inputs: its engines hold as little, and are built without a GPU",
        )
    cache = options.timing_cache
    if cache is not None and (cache.is_dir() or not cache.parent.is_dir()):
        what = "is a directory" if cache.is_dir() else f"there is no directory {cache.parent}"
        raise UserError(what, where=f"--timing-cache {cache}", fix="name a file; it is made if it is not there")


def check_library(flavour: str, trt: Any, options: EngineOptions) -> None:
    """Raise UserError for an option that this version of the library has no name for."""
    wanted = [*given(options), *(["stripped"] if options.weights == "stripped" else [])]
    for option in wanted:
        for name in _NEEDS.get(option, ()):
            owner, _, attribute = name.partition(".")
            if not hasattr(getattr(trt, owner, None), attribute):
                where = "--engine-weights stripped" if option == "stripped" else flag_of(option)
                raise UserError(
                    f"{flavour} {trt.__version__} has no {name}",
                    where=where,
                    fix="leave it out, or upgrade the library",
                )
