"""An engine held against the manifest: names, directions, types, shapes, and which outputs lie where inputs do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.runtime.backends import Buffer
from secateur.runtime.backends.device_buffer import DeviceBuffer
from secateur.runtime.errors import BundleError, SecateurError, UserError
from secateur.runtime.kv import cache_shapes, present_port
from secateur.runtime.schema import Manifest, Port, Program, StoredTensor

DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
"""What the library calls the types of ports."""


def check_engine_ports(
    engine: Any, name: str, program: Program, tensors: Mapping[str, StoredTensor], where: str
) -> None:
    """Refuse an engine whose ports are not the program's; ``tensors`` are inputs beside those, weights."""
    expected = {("input", port.name): _describe(port) for port in program.inputs}
    expected |= {("input", weight): _describe(tensor) for weight, tensor in tensors.items()}
    expected |= {("output", port.name): _describe(port) for port in program.outputs}
    found = {}
    for index in range(engine.num_io_tensors):
        port = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(port).name
        shown = f"{DTYPES.get(dtype, dtype)}{list(engine.get_tensor_shape(port))}"
        if engine.get_tensor_location(port).name != "DEVICE":
            shown += " in host memory"
        found[engine.get_tensor_mode(port).name.lower(), port] = shown
    if expected != found:
        kind, port = min(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise BundleError(
            f"{kind} {port} is {found.get((kind, port), 'missing')} in the engine, "
            f"{expected.get((kind, port), 'missing')} in the manifest",
            where=where,
            fix=f"the {name} engine and the manifest are not from one compilation; compile again",
        )


def check_buffers(
    program: str, ports: Iterable[Port], buffers: Mapping[str, Buffer], kind: str
) -> dict[str, DeviceBuffer]:
    """The buffers of every port, of its shape and type."""
    where, bound = f"program {program}", {}
    for port in ports:
        buffer = buffers.get(port.name)
        if not isinstance(buffer, DeviceBuffer):
            shown = "nothing" if buffer is None else f"a {type(buffer).__name__}"
            raise UserError(f"{kind} {port.name} is bound to {shown}", where=where, fix="give a buffer of this backend")
        if (list(buffer.shape), buffer.dtype) != (port.shape, port.dtype):
            raise UserError(
                f"{kind} {port.name} is bound to {buffer.dtype}{list(buffer.shape)}, it is {_describe(port)}",
                where=where,
            )
        bound[port.name] = buffer
    if extra := sorted(buffers.keys() - bound.keys()):
        raise UserError(f"no {kind} {extra[0]}", where=where, available=bound)
    return bound


def check_aliases(
    engine: Any, program: str, inputs: Mapping[str, DeviceBuffer], outputs: Mapping[str, DeviceBuffer]
) -> None:
    """Outputs that an engine writes into an input's memory, caches, must share that input's buffer and no other's.

    Libraries that do not say which those are are believed to write every cache in place.
    """
    aliased_input = getattr(engine, "get_aliased_input_tensor", None)
    by_address = {buffer.address: name for name, buffer in inputs.items()}
    for name, buffer in outputs.items():
        shares = by_address.get(buffer.address)
        if aliased_input is not None:
            must = aliased_input(name) or None
        else:
            must = shares if shares and present_port(shares) == name else None
        if must and shares != must:
            raise SecateurError(
                f"output {name} is written in place of input {must}, but they have two buffers",
                where=f"program {program}", fix="bind one buffer to both",
            )  # fmt: skip
        if shares and shares != must:
            raise SecateurError(
                f"output {name} would overwrite input {shares} while it is read", where=f"program {program}",
                fix="bind two buffers",
            )  # fmt: skip


def guard_writes(program: str, manifest: Manifest, inputs: Mapping[str, DeviceBuffer]) -> None:
    """Make sure nothing can be written behind the end of a cache: engines ignore such a write without a word.

    Prefill writes from row 0 on as many rows as a manifest says whose schema has them fit; where decode writes is up to
    whoever fills the slots, so those buffers refuse what is out of range. ``manifest`` is that of one geometry.
    """
    for name, shape in cache_shapes(manifest).items():
        if name in inputs and inputs[name].shape != shape:
            raise BundleError(
                f"{name} has shape {list(inputs[name].shape)}, its segment's is {list(shape)}",
                where=f"program {program}", fix="compile the bundle again",
            )  # fmt: skip
    if "lengths" in inputs:
        inputs["lengths"].limit(1, manifest.geometry.sequence, "lengths")
    for segment in manifest.segments:
        name = f"slot.{segment.name}"
        if name in inputs:
            inputs[name].limit(0, segment.capacity - 1, name)


def _describe(port: Port | StoredTensor) -> str:
    return f"{port.dtype}{list(port.shape)}"
