"""What TensorRT makes of a graph before it builds: the parsed network and its layers, on any machine."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.exporters.engine_weights import take_weights_out
from secateur.exporters.tensorrt_library import Library, Speech, listening, load_library
from secateur.runtime.errors import SecateurError, UserError

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class ParsedLayer:
    """A layer of the network TensorRT made of a graph, and the ONNX node it stems from (None if unknown)."""

    type: str
    name: str
    node: str | None


def parsed_layers(onnx_path: Path | str, *, flavour: str = "tensorrt-rtx", weights: str = "plan") -> list[ParsedLayer]:
    """The layers the parser makes of a graph, in order. Needs no GPU, and no engine is built.

    An engine cannot be opened without a driver, so this is where fused layers are seen: ATTENTION_INPUT and
    ATTENTION_OUTPUT, ROTARY_EMBEDDING, KV_CACHE_UPDATE, NORMALIZATION. RMS normalisation has no layer type in
    this API: its arithmetic carries the node's name, and its last layer is reported as RMS_NORMALIZATION.
    ``weights`` as for :class:`EngineOptions`; as ``inputs`` they are not read, and are no CONSTANT layers.
    """
    onnx_path = Path(onnx_path)
    library = load_library(flavour)
    with listening() as speech, take_weights_out(onnx_path, weights) as (graph, _):
        _, network, _ = parse(library, graph, speech, onnx_path)
        layers = layers_of(network)
    last_of = {layer.node: index for index, layer in enumerate(layers)}
    rms = _node_names(onnx_path, "RMSNormalization")
    return [
        ParsedLayer("RMS_NORMALIZATION", layer.name, layer.node)
        if layer.node in rms and last_of[layer.node] == index
        else layer
        for index, layer in enumerate(layers)
    ]


def parsed_layer_types(onnx_path: Path | str, *, flavour: str = "tensorrt-rtx", weights: str = "plan") -> Counter[str]:
    """How many layers of each type the parser makes of a graph; see :func:`parsed_layers`."""
    return Counter(layer.type for layer in parsed_layers(onnx_path, flavour=flavour, weights=weights))


def layers_of(network: Any) -> list[ParsedLayer]:
    """The layers of a network as the library names them."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [_ONNX_NODE.search(layer.metadata or "") for layer in layers]
    return [
        ParsedLayer(str(layer.type).rpartition(".")[2], layer.name, match[1] if match else None)
        for layer, match in zip(layers, found, strict=True)
    ]


def parse(library: Library, path: Path, speech: Speech, shown: Path) -> tuple[Any, Any, Any]:
    """Builder, network and parser of a graph; messages and the network call it ``shown``."""
    if not path.is_file():
        raise UserError("no such file", where=str(shown))
    # From TensorRT 11 on a network is always strongly typed; the flag says the same to older ones.
    typed = hasattr(library.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    try:
        builder, network, parser = library.loaders.network_from_onnx_path(str(path), strongly_typed=typed)
    except Exception as error:
        node, reason = speech.parser_error() if speech.errors else (None, str(error))
        where = f"{shown}: {node}" if node else str(shown)
        raise SecateurError(f"{library.flavour} does not take the graph: {reason}", where=where) from None
    network.name = shown.stem  # the default is a running number
    return builder, network, parser


def _node_names(onnx_path: Path, op_type: str) -> set[str]:
    import onnx_ir as ir

    return {node.name for node in ir.load(onnx_path).graph.all_nodes() if node.op_type == op_type and node.name}
