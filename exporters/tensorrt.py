"""Builds engine files from ``tensorrt``-dialect graphs: the same code for TensorRT and TensorRT-RTX.

TensorRT-RTX compiles ahead of time for a GPU architecture that is named, on a machine that may have none.
TensorRT builds for the GPU of the machine it runs on. Both take the graph as it is typed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.exporters.engine_options import EngineOptions, check_library, check_options
from secateur.exporters.engine_weights import mark_stripped, take_weights_out
from secateur.exporters.gpu import find_architecture, has_driver
from secateur.exporters.tensorrt_library import MODULES, Library, listening, load_library
from secateur.exporters.tensorrt_network import ParsedLayer, layers_of, parse, parsed_layer_types, parsed_layers
from secateur.exporters.tensorrt_progress import Progress, Watch, stop_on_interrupt
from secateur.runtime.errors import SecateurError, UserError

__all__ = [
    "DEFAULT_SM", "MODULES", "SMS", "EngineInfo", "EngineOptions", "ParsedLayer", "Progress", "build_engine",
    "check_machine", "check_target", "parsed_layer_types", "parsed_layers",
]  # fmt: skip

SMS = (75, 80, 86, 89, 120, 121)
"""GPU architectures TensorRT-RTX compiles for: Turing, Ampere (data centre, desktop), Ada, Blackwell."""

DEFAULT_SM = 89

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineInfo:
    """An engine file and what it was built from.

    ``sms`` are the GPU architectures it was built for; of TensorRT that of this machine, none where it is unknown.
    ``weights`` are those it takes from outside, as inputs or by a refit, by the names of the graph's initializers.
    """

    path: Path
    flavour: str
    version: str
    sms: tuple[int, ...]
    bytes: int
    layer_types: tuple[tuple[str, int], ...]
    """Type and count of the parsed network's layers, sorted by type."""
    warnings: tuple[str, ...]
    weights: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = ", ".join(f"SM{sm}" for sm in self.sms) or "this machine's GPU"
        return f"{self.path.name}: {self.flavour} {self.version}, {place}, {self.bytes} bytes"


def check_target(flavour: str, *, dtype: str | None = None, sm: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Refuse what cannot be built, before anything is traced. Returns the architectures to build for, sorted.

    Those are ``sm`` or the default for TensorRT-RTX, and for TensorRT that of this machine's GPU, none where it is
    not known. Needs no library installed.
    """
    if flavour not in MODULES:
        raise UserError(f"no TensorRT flavour {flavour!r}", where="--target", available=MODULES)
    if dtype == "fp32":
        raise UserError(
            f"{flavour} has no fused attention in fp32", where="--dtype fp32", available=("fp16", "bf16"),
            fix="compile with --dtype fp16; norms and scores stay in fp32 inside the graph",
        )  # fmt: skip
    asked = () if sm is None else (sm,) if isinstance(sm, int) else tuple(sm)
    if flavour == "tensorrt":
        if asked:
            raise UserError(
                "tensorrt builds for the GPU of this machine and takes no architecture", where=f"--sm {asked[0]}",
                fix="leave --sm out, or use --target tensorrt-rtx",
            )  # fmt: skip
        here = find_architecture()
        sms: tuple[int, ...] = () if here is None else (here,)
    else:
        sms = tuple(sorted(set(asked))) or (DEFAULT_SM,)
        if unknown := [each for each in sms if each not in SMS]:
            raise UserError(f"tensorrt-rtx does not compile for SM{unknown[0]}", where="--sm", available=SMS)
    if dtype == "bf16" and 75 in sms:
        raise UserError("GPUs of architecture 75 have no bf16", where="--dtype bf16", fix="compile with --dtype fp16")
    return sms


def check_machine(flavour: str) -> None:
    """Raise UserError where ``tensorrt`` is to build without a GPU: it would fail only after everything else."""
    if flavour == "tensorrt" and not has_driver():
        raise UserError(
            "it builds on the GPU it builds for, and no GPU driver is here (libcuda.so.1)", where=f"--target {flavour}",
            fix="compile on that machine, or use --target tensorrt-rtx",
        )  # fmt: skip


def build_engine(
    onnx_path: Path | str,
    engine_path: Path | str,
    *,
    flavour: str = "tensorrt-rtx",
    sm: int | Sequence[int] | None = None,
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> EngineInfo:
    """Build ``engine_path`` from a graph and the weights beside it; the file appears whole or not at all.

    Two builds of one graph may differ in bytes: the library stores outputs in the order of their addresses.
    Raises UserError for a target that is not there or cannot be (see :func:`check_target`) and for options it does
    not have, SecateurError with the node's name when the graph is not understood, or with the builder's last words
    when no engine comes out.
    """
    onnx_path, engine_path, options = Path(onnx_path), Path(engine_path), options or EngineOptions()
    sms = check_target(flavour, sm=sm)
    check_options(flavour, options)
    library = load_library(flavour)
    check_library(flavour, library.trt, options)
    watch = Watch(progress)
    monitor = watch.as_monitor(library.trt)
    with (
        listening() as speech,
        stop_on_interrupt(watch),
        take_weights_out(onnx_path, options.weights) as (graph, outside),
    ):
        builder, network, parser = parse(library, graph, speech, onnx_path)
        layer_types = Counter(layer.type for layer in layers_of(network))
        if options.weights == "stripped":
            mark_stripped(network, outside, str(onnx_path))

        def configure(builder: Any, network: Any) -> Any:
            return _configure(library, builder, sms, options, monitor)

        plan, failure = None, None
        try:
            plan = library.loaders.engine_bytes_from_network(
                (builder, network, parser), config=configure,
                save_timing_cache=options.timing_cache and str(options.timing_cache),
            )  # fmt: skip
        except Exception as error:
            failure = speech.last_error() if speech.errors else str(error)
    if watch.stopped_by is not None:
        raise watch.stopped_by
    if plan is None:
        fix = "give more --workspace" if options.workspace and "workspace" in str(failure) else None
        raise SecateurError(f"{flavour} builds no engine: {failure}", where=str(onnx_path), fix=fix)
    size = _write_atomically(engine_path, plan)
    for warning in speech.warnings:
        _log.info("%s: %s", onnx_path.name, warning)
    return EngineInfo(
        engine_path, flavour, library.version, sms, size, tuple(sorted(layer_types.items())), tuple(speech.warnings),
        outside,
    )  # fmt: skip


def _configure(library: Library, builder: Any, sms: Sequence[int], options: EngineOptions, monitor: Any) -> Any:
    """A builder configuration. Polygraphy's own would add a timing cache, which asks for a GPU."""
    trt, config = library.trt, builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # scores are chosen in fp32: keep all of its bits
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for `inspect --layers`; costs a few kilobytes
    config.progress_monitor = monitor
    if library.flavour == "tensorrt-rtx":
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.weights == "stripped":
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)  # what is marked is what a refit asks for, by our names
    if options.timing_cache is not None:
        _load_timing_cache(config, options.timing_cache)
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    """Start from a cache's measurements; one of another GPU or version is no use, and is written anew."""
    held = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(held), False):
        _log.warning("%s: the timing cache is of another GPU or version and is made anew", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _write_atomically(path: Path, plan: Any) -> int:
    """Write the engine beside its place, then move it there. Returns its size in bytes."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            size = file.write(memoryview(plan))
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise UserError(f"cannot write: {error.strerror}", where=str(path), fix="make room, then try again") from None
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return size
