"""Builds engine files from ``tensorrt``-dialect graphs: the same code for TensorRT and TensorRT-RTX.

TensorRT-RTX compiles ahead of time for a GPU architecture that is named, on a machine that may have none.
TensorRT builds for the GPU of the machine it runs on. Both take the graph as it is typed.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.exporters.tensorrt_library import MODULES, Library, Speech, listening, load_library
from secateur.exporters.tensorrt_progress import Progress, Watch, stop_on_interrupt
from secateur.runtime.errors import SecateurError, UserError

__all__ = [
    "DEFAULT_SM", "MODULES", "SMS", "EngineInfo", "ParsedLayer", "Progress", "build_engine", "check_target",
    "parsed_layer_types", "parsed_layers",
]  # fmt: skip

SMS = (75, 80, 86, 89, 120, 121)
"""GPU architectures TensorRT-RTX compiles for: Turing, Ampere (data centre, desktop), Ada, Blackwell."""

DEFAULT_SM = 89

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineInfo:
    """An engine file and what it was built from. ``sm`` is None when it fits the GPU of this machine only."""

    path: Path
    flavour: str
    version: str
    sm: int | None
    bytes: int
    layer_types: tuple[tuple[str, int], ...]
    """Type and count of the parsed network's layers, sorted by type."""
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        place = f"SM{self.sm}" if self.sm else "this machine's GPU"
        return f"{self.path.name}: {self.flavour} {self.version}, {place}, {self.bytes} bytes"


@dataclass(frozen=True)
class ParsedLayer:
    """A layer of the network TensorRT made of a graph, and the ONNX node it stems from (None if unknown)."""

    type: str
    name: str
    node: str | None


def check_target(flavour: str, *, dtype: str | None = None, sm: int | None = None) -> int | None:
    """Refuse what cannot be built, before anything is traced. Returns the architecture to build for.

    That is ``sm`` or the default for TensorRT-RTX and None for TensorRT. Needs no library installed.
    """
    if flavour not in MODULES:
        raise UserError(f"no TensorRT flavour {flavour!r}", where="--target", available=MODULES)
    if dtype == "fp32":
        raise UserError(
            f"{flavour} has no fused attention in fp32", where="--dtype fp32", available=("fp16", "bf16"),
            fix="compile with --dtype fp16; norms and scores stay in fp32 inside the graph",
        )  # fmt: skip
    if flavour == "tensorrt":
        if sm is not None:
            raise UserError(
                "tensorrt builds for the GPU of this machine and takes no architecture", where=f"--sm {sm}",
                fix="leave --sm out, or use --target tensorrt-rtx",
            )  # fmt: skip
        return None
    sm = DEFAULT_SM if sm is None else sm
    if sm not in SMS:
        raise UserError(f"tensorrt-rtx does not compile for SM{sm}", where="--sm", available=SMS)
    if dtype == "bf16" and sm == 75:
        raise UserError("GPUs of architecture 75 have no bf16", where="--dtype bf16", fix="compile with --dtype fp16")
    return sm


def build_engine(
    onnx_path: Path | str,
    engine_path: Path | str,
    *,
    flavour: str = "tensorrt-rtx",
    sm: int | None = None,
    progress: Progress | None = None,
) -> EngineInfo:
    """Build ``engine_path`` from a graph and the weights beside it; the file appears whole or not at all.

    Two builds of one graph may differ in bytes: the library stores outputs in the order of their addresses.
    Raises UserError for a target that is not there or cannot be (see :func:`check_target`), SecateurError
    with the node's name when the graph is not understood, or with the builder's last words when no engine
    comes out.
    """
    onnx_path, engine_path = Path(onnx_path), Path(engine_path)
    sm = check_target(flavour, sm=sm)
    library = load_library(flavour)
    watch = Watch(progress)
    monitor = watch.as_monitor(library.trt)
    with listening() as speech, stop_on_interrupt(watch):
        builder, network, parser = _parse(library, onnx_path, speech)
        layer_types = Counter(layer.type for layer in _layers(network))

        def configure(builder: Any, network: Any) -> Any:
            return _configure(library, builder, sm, monitor)

        plan, failure = None, None
        try:
            plan = library.loaders.engine_bytes_from_network((builder, network, parser), config=configure)
        except Exception as error:
            failure = speech.last_error() if speech.errors else str(error)
    if watch.stopped_by is not None:
        raise watch.stopped_by
    if plan is None:
        raise SecateurError(f"{flavour} builds no engine: {failure}", where=str(onnx_path))
    size = _write_atomically(engine_path, plan)
    for warning in speech.warnings:
        _log.info("%s: %s", onnx_path.name, warning)
    return EngineInfo(
        engine_path, flavour, library.version, sm, size, tuple(sorted(layer_types.items())), tuple(speech.warnings)
    )


def parsed_layers(onnx_path: Path | str, *, flavour: str = "tensorrt-rtx") -> list[ParsedLayer]:
    """The layers the parser makes of a graph, in order. Needs no GPU, and no engine is built.

    An engine cannot be opened without a driver, so this is where fused layers are seen: ATTENTION_INPUT and
    ATTENTION_OUTPUT, ROTARY_EMBEDDING, KV_CACHE_UPDATE, NORMALIZATION. RMS normalisation has no layer type in
    this API: its arithmetic carries the node's name, and its last layer is reported as RMS_NORMALIZATION.
    """
    with listening() as speech:
        _, network, _ = _parse(load_library(flavour), Path(onnx_path), speech)
        layers = _layers(network)
    last_of = {layer.node: index for index, layer in enumerate(layers)}
    rms = _node_names(Path(onnx_path), "RMSNormalization")
    return [
        ParsedLayer("RMS_NORMALIZATION", layer.name, layer.node)
        if layer.node in rms and last_of[layer.node] == index
        else layer
        for index, layer in enumerate(layers)
    ]


def parsed_layer_types(onnx_path: Path | str, *, flavour: str = "tensorrt-rtx") -> Counter[str]:
    """How many layers of each type the parser makes of a graph; see :func:`parsed_layers`."""
    return Counter(layer.type for layer in parsed_layers(onnx_path, flavour=flavour))


def _node_names(onnx_path: Path, op_type: str) -> set[str]:
    import onnx_ir as ir

    return {node.name for node in ir.load(onnx_path).graph.all_nodes() if node.op_type == op_type and node.name}


def _layers(network: Any) -> list[ParsedLayer]:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [_ONNX_NODE.search(layer.metadata or "") for layer in layers]
    return [
        ParsedLayer(str(layer.type).rpartition(".")[2], layer.name, match[1] if match else None)
        for layer, match in zip(layers, found, strict=True)
    ]


def _parse(library: Library, onnx_path: Path, speech: Speech) -> tuple[Any, Any, Any]:
    if not onnx_path.is_file():
        raise UserError("no such file", where=str(onnx_path))
    try:
        # From TensorRT 11 on a network is always strongly typed; the flag says the same to older ones.
        builder, network, parser = library.loaders.network_from_onnx_path(str(onnx_path), strongly_typed=True)
    except Exception as error:
        node, reason = speech.parser_error() if speech.errors else (None, str(error))
        where = f"{onnx_path}: {node}" if node else str(onnx_path)
        raise SecateurError(f"{library.flavour} does not take the graph: {reason}", where=where) from None
    network.name = onnx_path.stem  # the default is a running number
    return builder, network, parser


def _configure(library: Library, builder: Any, sm: int | None, monitor: Any) -> Any:
    """A builder configuration. Polygraphy's own would add a timing cache, which asks for a GPU."""
    config = builder.create_builder_config()
    config.clear_flag(library.trt.BuilderFlag.TF32)  # scores are chosen in fp32: keep all of its bits
    if sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(library.trt.ComputeCapability, f"SM{sm}"), 0)
    config.progress_monitor = monitor
    return config


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
