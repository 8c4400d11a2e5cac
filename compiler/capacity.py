"""Whether the machine at hand, and the GPU a bundle is for, have what its forecast says: else advice, in one line."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.compiler.forecast import Needs
from secateur.runtime.errors import UserError
from secateur.runtime.host_memory import CGROUP, PROC, available_memory
from secateur.runtime.manifest import Forecast
from secateur.runtime.sizes import size_text

IGNORE = "--ignore-forecast goes on anyway"


@dataclass(frozen=True)
class Room:
    """Bytes there are for this process; None for what cannot be found out."""

    memory: int | None
    """That it may hold in all, what it holds already counted in."""
    device: int | None
    """Free on this machine's first GPU, where the bundle is for that one."""
    disk: int
    """Free where the bundle goes."""


@dataclass(frozen=True)
class Expected:
    """What is done with a bundle's forecast before anything of it is written.

    ``device_memory``: bytes of the GPU it is for, where its user knows. ``tell`` is called with the forecast. With
    ``ignore`` nothing is refused for it.
    """

    device_memory: int | None = None
    tell: Callable[[Needs], None] | None = None
    ignore: bool = False

    def consider(self, needs: Needs, out: Path) -> Needs:
        """Tell, then raise UserError where the machine or the device has too little; see :func:`check_room`."""
        if self.tell is not None:
            self.tell(needs)
        if not self.ignore:
            check_room(needs, find_room(out, needs.target), out, self.device_memory)
        return needs


def find_room(out: Path, target: str, proc: Path = PROC, cgroup: Path = CGROUP) -> Room:
    """Look at the machine: the kernel's count of memory and the limits of control groups, the disk, the GPU."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    device = free_device_memory() if target == "tensorrt" else None
    return Room(available_memory(proc, cgroup), device, shutil.disk_usage(place).free)


def free_device_memory() -> int | None:
    """Free bytes of the first GPU; None without one, its driver or cuda-python."""
    try:
        runtime: Any = importlib.import_module("cuda.bindings.runtime")
        status, free, _ = runtime.cudaMemGetInfo()
        return None if int(status) else int(free)
    except (ImportError, ValueError, RuntimeError):
        return None


def check_room(needs: Needs, room: Room, out: Path, device_memory: int | None = None) -> None:
    """Raise UserError when the machine cannot compile the bundle, or the device cannot run it.

    ``device_memory``: bytes of the GPU the bundle is for, as its user says; without it, what is free on this machine's
    where the bundle is for that one.
    """
    if room.memory is not None and needs.host > room.memory:
        raise UserError(
            f"compiling takes {size_text(needs.host)} of memory, this machine has {size_text(room.memory)} for it",
            where="forecast", fix=f"{_advise_host(needs)}; {IGNORE}",
        )  # fmt: skip
    if needs.disk > room.disk:
        raise UserError(
            f"disk full: the bundle takes {size_text(needs.disk)}, {size_text(room.disk)} are free",
            where=str(out.parent), fix=f"{_advise_disk(needs)}; {IGNORE}",
        )  # fmt: skip
    limit = room.device if device_memory is None else device_memory
    if limit is not None and needs.device > limit:
        what, size = largest_part(needs)
        whose = "are free on this machine's GPU" if device_memory is None else "are there"
        raise UserError(
            f"running takes {size_text(needs.device)} of the device's memory, {size_text(limit)} {whose}: "
            f"{needs.device - limit} bytes too much; the largest part is {size_text(size)} of {what}",
            where="forecast" if device_memory is None else "--device-memory",
            fix=f"{_advise_device(needs, what, limit)}; {IGNORE}",
        )  # fmt: skip


def largest_part(needs: Needs) -> tuple[str, int]:
    """What takes most of the device, and its bytes."""
    worst = _worst(needs)
    parts = {"weights": needs.weights, "caches": worst.caches, "activations": worst.activations,
             "inputs and outputs": worst.buffers}  # fmt: skip
    return max(parts.items(), key=lambda part: part[1])


def _worst(needs: Needs) -> Forecast:
    """The geometry that takes most beside its weights."""
    return max(needs.geometries, key=lambda one: one.device - one.weights)


def _advise_host(needs: Needs) -> str:
    advice = []
    if needs.engine_weights in ("plan", "stripped"):
        advice.append("take --engine-weights inputs, so that builders hold no weights")
    elif needs.engine_weights is None and needs.weights_mode == "stream":
        advice.append("take --weights reference, so that no tensor is read")
    if len(needs.geometries) > 1:
        advice.append("compile fewer geometries at a time")
    return ", or ".join([*advice, "compile on a machine with more memory and copy the bundle"])


def _advise_disk(needs: Needs) -> str:
    advice = ["free some space or choose another directory"]
    if needs.weights_mode != "reference":
        advice.insert(0, "take --weights reference, which links the checkpoint's files")
    if needs.engine_weights == "plan":
        advice.insert(0, "take --engine-weights inputs, so that engines are small")
    return ", or ".join(advice)


def _advise_device(needs: Needs, what: str, limit: int) -> str:
    advice = []
    if what == "weights":
        if needs.engine_weights in ("plan", "stripped"):
            advice.append("take --engine-weights inputs, so that weights are there once")
        elif needs.engine_weights is None:
            advice.append("compile for a TensorRT target, in half precision")
        else:
            advice.append("choose a smaller model")
    worst = _worst(needs)
    batch = needs.batches[needs.geometries.index(worst)]
    left = limit - needs.weights
    # All but weights grows with the batch, to a few bytes.
    fits = left * batch // max(1, worst.device - worst.weights)
    if 1 <= fits < batch:
        advice.append(f"take --batch {fits}, which fits")
    elif left > 0:
        shrink = "--batch 1, " if batch > 1 else ""
        share = left / max(1, (worst.device - worst.weights) / batch)
        advice.append(
            f"take {shrink}a lower --keep, fewer --images and smaller --text-tokens: {share:.0%} of what one row of "
            "the geometry takes beside the weights would fit"
        )  # fmt: skip
    return ", or ".join(advice or ["take a GPU with more memory"])
