"""Where an engine's weights are: in it, or outside so that all engines of a bundle can share one copy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.runtime.errors import SecateurError
from secateur.runtime.leftovers import held_directory

SMALL = 1 << 16
"""Bytes below which a weight stays in the engine: norms and biases, a thousandth of a model in hundreds of tensors."""


@contextmanager
def take_weights_out(onnx_path: Path, weights: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The file to build from, and the weights its engine takes from outside, by the names of their initializers.

    With ``inputs`` that file is a variant of the graph that has those as inputs, for the time of the build, in a
    directory of its own: the graph's may be one that nothing is written to. With ``stripped`` the graph is as it is.
    """
    model = None if weights == "plan" else _load(onnx_path)
    names = [] if model is None else list_shared(model.graph)
    if model is None or weights == "stripped" or not names:
        yield onnx_path, tuple(names)
        return
    import onnx_ir as ir

    turn_into_inputs(model, names)
    _embed(model.graph, onnx_path.parent)
    with held_directory(Path(tempfile.gettempdir()), "secateur-engine-") as folder:
        variant = Path(folder) / onnx_path.name
        variant.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        yield variant, tuple(names)


def list_shared(graph: Any) -> list[str]:
    """Names of the initializers that may lie outside an engine, sorted: large ones that lie outside the graph.

    Kernels of convolutions stay inside: a builder lays them out anew, which it cannot do with what it does not have.
    They are in one program only, and small beside the decoder.
    """
    import onnx_ir as ir

    kinds = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT)
    found = []
    for name, value in graph.initializers.items():
        stored = value.const_value
        if not isinstance(stored, ir.ExternalTensor) or stored.dtype not in kinds or stored.nbytes < SMALL:
            continue
        if not any(use.node.op_type in ("Conv", "ConvTranspose") for use in value.uses()):
            found.append(name)
    return sorted(found)


def turn_into_inputs(model: Any, names: Iterable[str]) -> None:
    """Make initializers inputs of the graph, behind its own, by the same names and in the same shapes."""
    for name in names:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)


def _embed(graph: Any, directory: Path) -> None:
    """Put the weights that stay, which are small, into the graph itself, so that it points to no file.

    onnx-ir reads no hard links, which is what a bundle has of a checkpoint's files.
    """
    import onnx
    import onnx_ir as ir

    for name, value in graph.initializers.items():
        stored = value.const_value
        if isinstance(stored, ir.ExternalTensor):
            with open(directory / stored.location, "rb") as file:
                file.seek(stored.offset or 0)
                data = file.read(stored.nbytes)
            kind, dims = stored.dtype.value, list(stored.shape.numpy())
            proto = onnx.TensorProto(name=name, data_type=kind, dims=dims, raw_data=data)
            value.const_value = ir.serde.deserialize_tensor(proto)


def mark_stripped(network: Any, names: tuple[str, ...], where: str) -> None:
    """Name the weights that are to be stripped. A refit then asks for these and no others.

    Raises SecateurError for a weight that the parser gave another name.
    """
    for name in names:
        if not network.mark_weights_refittable(name):
            raise SecateurError(f"the parsed network has no weight {name}", where=where, fix="take weights as inputs")


def _load(path: Path) -> Any:
    """The model; None for what is no graph, of which the library's parser complains in its own words."""
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception:  # onnx-ir raises what its parts raise
        return None
