"""Weights that lie outside the engines: once on the device as inputs of all of them, or put into each at load."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur.runtime.backends.cuda import DeviceMemory, Event, PinnedMemory, Stream
from secateur.runtime.backends.engine_ports import DTYPES
from secateur.runtime.backends.host_types import byte_size
from secateur.runtime.errors import BundleError
from secateur.runtime.schema import Manifest, StoredTensor

_ALIGNMENT = 256
"""Of the address of an engine's input."""
_PIECE = 16 << 20

_LIBRARY_TYPES = {ours: theirs for theirs, ours in DTYPES.items()}


def check_tensors(tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Every tensor has the bytes of its shape and type."""
    for name, tensor in sorted(tensors.items()):
        if byte_size(tensor.shape, tensor.dtype) != tensor.bytes:
            raise BundleError(
                f"tensor {name} has {tensor.bytes} bytes, {tensor.dtype}{tensor.shape} has "
                f"{byte_size(tensor.shape, tensor.dtype)}",
                where=where, fix="compile the bundle again",
            )  # fmt: skip


class SharedWeights:
    """All tensors that any engine of a bundle takes as inputs, in one allocation; ``address`` of each by its name.

    They are read from the weights files in pieces, through two pinned buffers in turn: while one is copied to the
    device the other is filled, and never more than both are in host memory.
    """

    def __init__(self, directory: Path, manifest: Manifest, piece: int = _PIECE) -> None:
        programs = [p for one in manifest.each_variant() for p in one.programs.values()]
        tensors = {name: manifest.tensors[name] for p in programs for name in p.weights}
        check_tensors(tensors, str(directory))
        # In the order they lie in, so that files are read from front to back.
        ordered = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset))
        places, size = {}, 0
        for name, tensor in ordered:
            places[name] = size
            size += -(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT
        self.memory = DeviceMemory(size)
        self.address = {name: self.memory.address + place for name, place in places.items()}
        self._fill(directory, ordered, piece)

    def _fill(self, directory: Path, ordered: list[tuple[str, StoredTensor]], piece: int) -> None:
        stream = Stream()
        piece = max(1, min(piece, max((tensor.bytes for _, tensor in ordered), default=1)))
        staging = [(PinnedMemory(piece), Event()) for _ in range(2)]
        turn = 0
        try:
            for name, tensor in ordered:
                with open(directory / tensor.file, "rb", buffering=0) as file:
                    file.seek(tensor.offset)
                    for done in range(0, tensor.bytes, piece):
                        pinned, copied = staging[turn]
                        turn = 1 - turn
                        copied.synchronize()  # its last piece has left
                        size = min(piece, tensor.bytes - done)
                        _read_whole(file, pinned.bytes[:size].data, f"{directory / tensor.file}: {name}")
                        stream.upload(self.address[name] + done, pinned.address, size)
                        copied.record(stream)
        finally:
            stream.synchronize()  # nothing may be copying when the staging memory goes


def _read_whole(file: Any, target: memoryview, where: str) -> None:
    while target:
        count = file.readinto(target)
        if not count:
            raise BundleError("the file ends in the middle of a tensor", where=where, fix="compile the bundle again")
        target = target[count:]


def refit(trt: Any, engine: Any, logger: Any, directory: Path, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Give a stripped engine its weights, from the mapped files: their pages are read as the library reads them."""
    check_tensors(tensors, where)
    refitter = trt.Refitter(engine, logger)
    wanted = set(refitter.get_all_weights())
    if missing := sorted(wanted - tensors.keys()):
        raise BundleError(f"the engine wants weights {missing[0]}, the manifest does not list it", where=where,
                          fix="compile the bundle again")  # fmt: skip
    mapped: dict[str, np.ndarray] = {}
    for name in sorted(wanted):
        tensor = tensors[name]
        if tensor.file not in mapped:
            mapped[tensor.file] = _map(directory / tensor.file)
        data = mapped[tensor.file][tensor.offset : tensor.offset + tensor.bytes]
        count = int(np.prod(tensor.shape, dtype=np.int64))
        weights = trt.Weights(getattr(trt.DataType, _LIBRARY_TYPES[tensor.dtype]), data.ctypes.data, count)
        if not refitter.set_named_weights(name, weights):
            raise BundleError(_said(f"the library does not take weights {name}", logger), where=where,
                              fix="compile the bundle again")  # fmt: skip
    if missing := sorted(refitter.get_missing_weights()):
        raise BundleError(f"weights {missing[0]} are missing", where=where, fix="compile the bundle again")
    if not refitter.refit_cuda_engine():
        raise BundleError(_said("the library does not put the weights in", logger), where=where)


def _map(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _said(what: str, logger: Any) -> str:
    return f"{what}: {logger.last}" if logger.last else what


def pick_tensors(manifest: Manifest, names: Iterable[str]) -> dict[str, StoredTensor]:
    return {name: manifest.tensors[name] for name in names}
