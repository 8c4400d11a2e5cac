"""KV caches: one pair per layer, as long as the layer's segment, and where the next token goes in them.

Layers behind a pruning site hold fewer rows, so every segment has its own capacity and its own slot; where the
recipe shrinks caches, the layers before it hold as few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import BundleError, SecateurError
from secateur.runtime.host_memory import available_memory
from secateur.runtime.schema import DTYPE_BYTES, PORT_BYTES, Manifest, Port, Program
from secateur.runtime.sizes import size_text

Ints = NDArray[np.int64]
_CACHES = ("past_key.", "past_value.", "present_key.", "present_value.")


def cache_shapes(manifest: Manifest) -> dict[str, tuple[int, int, int, int]]:
    """Past port name -> [batch, kv heads, capacity of the layer's segment, head size]."""
    model, batch = manifest.model, manifest.geometry.batch
    return {
        f"past_{kind}.{layer}": (batch, model.kv_heads, segment.capacity, model.head_dim)
        for segment in manifest.segments
        for layer in range(segment.first_layer, segment.last_layer)
        for kind in ("key", "value")
    }


def present_port(past: str) -> str:
    """The output that is bound to the same buffer as the input ``past``."""
    return past.replace("past_", "present_", 1)


def cache_bytes(manifest: Manifest) -> int:
    """Bytes of all caches of one request."""
    size = DTYPE_BYTES[manifest.dtype]
    return sum(size * a * b * c * d for a, b, c, d in cache_shapes(manifest).values())


def handed_on(programs: Mapping[str, Program]) -> dict[str, Port]:
    """By name, what one program writes where the next one reads it: vision its features and what else prefill goes on
    with, prefill the positions of cached rows that decode sees. Each has one buffer."""
    found: dict[str, Port] = {}
    for writer, reader in (("vision", "prefill"), ("prefill", "decode")):
        for port in programs[writer].outputs:
            if programs[reader].has_input(port.name):
                found.setdefault(port.name, port)
    return found


def buffer_bytes(programs: Mapping[str, Program]) -> int:
    """Bytes of what a request's programs read and write beside the caches."""
    shared, total = handed_on(programs), 0
    for program in programs.values():
        for port in (*program.inputs, *program.outputs):
            if port.name not in shared and not port.name.startswith(_CACHES):
                total += port_bytes(port)
    return total + sum(map(port_bytes, shared.values()))


def port_bytes(port: Port) -> int:
    return PORT_BYTES[port.dtype] * math.prod(port.shape)


def check_room(manifest: Manifest, where: str) -> None:
    """Raise BundleError where the machine has less memory than the caches, inputs and outputs of one request take."""
    needed, room = cache_bytes(manifest) + buffer_bytes(manifest.programs), available_memory()
    if room is not None and needed > room:
        raise BundleError(
            f"a request takes {size_text(needed)} of memory, this machine has {size_text(room)} for it",
            where=where, fix="compile a smaller geometry, or run it on a machine with more",
        )  # fmt: skip


def decode_slots(manifest: Manifest, lengths: Ints, step: int) -> dict[str, Ints]:
    """Cache row that decode step ``step`` (0 = first) writes, per segment: ``slot.<name>`` -> int64 [B].

    ``lengths`` [B] counts each row's real tokens before pruning. A backend may ignore a write out of
    range without a word, so it is refused here.
    """
    slots = {}
    for segment in manifest.segments:
        slot = lengths - segment.removed - segment.evicted + step
        if int(slot.min()) < 0 or int(slot.max()) >= segment.capacity:
            raise SecateurError(
                f"step {step} would write cache row {int(slot.max())}, the capacity is {segment.capacity}",
                where=f"decode, segment {segment.name}",
                fix=f"generate at most {manifest.geometry.new_tokens} new tokens, or compile with more --new-tokens",
            )
        slots[f"slot.{segment.name}"] = slot
    return slots


def decode_positions(manifest: Manifest, lengths: Ints, step: int) -> Ints:
    """Position id of the token that decode step ``step`` reads: int64 [B], in the recipe's numbering."""
    return lengths + manifest.position_offset + step
