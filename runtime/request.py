"""One request: its caches, its inputs and outputs, and the three programs tied to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.backends import Backend, Buffer
from secateur.runtime.errors import BundleError, SecateurError, UserError
from secateur.runtime.kv import cache_shapes, decode_positions, decode_slots, present_port
from secateur.runtime.schema import Manifest, Stage

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Request:
    """State of one generation. Weights are the session's; everything written is here.

    A request is used by one thread at a time; different requests of a session may run at once. It can be
    used again for another prompt: ``prefill`` starts over.
    """

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self.manifest = manifest
        self.lengths: Ints = np.zeros(manifest.geometry.batch, dtype=np.int64)
        """Real tokens of each row before pruning, int64 [B]."""
        self.step: int | None = None
        """Decode steps done since prefill; None before it."""
        self._backend = backend
        shared: dict[str, Buffer] = {}
        for name, shape in cache_shapes(manifest).items():
            shared[name] = shared[present_port(name)] = backend.buffer(shape, manifest.dtype)
        # Vision writes its features where prefill reads them.
        shared["features"] = self._buffer("vision", "features")
        self._ports: dict[str, dict[str, Buffer]] = {}
        self._bound = {name: self._bind(name, shared) for name in manifest.programs}
        self._kept: dict[str, Ints] = {}

    def encode(self, pixel_values: Floats) -> Floats:
        """Run ``vision``: [B*n, 3, H, W] -> the features that prefill will read, [B, F, D]."""
        self._ports["vision"]["pixel_values"].write(pixel_values)
        self._bound["vision"].run()
        self._kept = {}
        self._follow("vision")
        features = self._ports["vision"]["features"].read()
        _require_finite("vision", features)
        return np.asarray(features, dtype=np.float32)

    def prefill(self, input_ids: Ints, lengths: Ints, features: Floats | None = None) -> Floats:
        """Run ``prefill`` on ids [B, N] with ``lengths`` [B] real tokens -> logits [B, vocab].

        ``features`` None takes what :meth:`encode` left. Given features keep the survivors of the last
        ``encode`` where prefill asks for original indices.
        """
        geometry, ports = self.manifest.geometry, self._ports["prefill"]
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.shape != (geometry.batch,) or lengths.min() < geometry.features + 1:
            raise UserError(f"lengths {lengths.tolist()} do not fit the geometry", where="prefill")
        if lengths.max() > geometry.sequence:
            raise UserError(
                f"a row of {int(lengths.max())} tokens, the bundle was compiled for {geometry.sequence}",
                where="prefill",
                fix="shorten the prompt, or compile with a larger --text-tokens",
            )
        ports["input_ids"].write(np.asarray(input_ids))
        ports["lengths"].write(lengths)
        if features is not None:
            ports["features"].write(np.asarray(features))
        self._kept = {name: k for name, k in self._kept.items() if not self._stage(name).in_decoder}
        if "kept" in ports:
            if not self._kept:
                raise UserError(
                    "prefill needs the vision program's survivors", where="prefill", fix="call encode first"
                )
            ports["kept"].write(list(self._kept.values())[-1])
        self.step = None
        self._bound["prefill"].run()
        self._follow("prefill")
        self.lengths, self.step = lengths, 0
        return self._logits("prefill")

    def decode(self, tokens: Ints) -> Floats:
        """Run ``decode`` on one token per row, int64 [B] -> logits [B, vocab]."""
        if self.step is None:
            raise UserError("decode before prefill", where="decode", fix="call prefill first")
        ports = self._ports["decode"]
        slots = decode_slots(self.manifest, self.lengths, self.step)
        for name, slot in slots.items():
            ports[name].write(slot)
        if "position" in ports:  # a decoder without position ids has no such input
            ports["position"].write(decode_positions(self.manifest, self.lengths, self.step))
        ports["input_ids"].write(np.asarray(tokens, dtype=np.int64).reshape(-1, 1))
        self._bound["decode"].run()
        self.step += 1
        return self._logits("decode")

    @property
    def kept(self) -> dict[str, Ints]:
        """Per stage so far: the row's original patch indices that are left after it, int64 [B, K]."""
        return dict(self._kept)

    @property
    def cache(self) -> dict[str, NDArray[Any]]:
        """Copies of the caches by past port name, for comparing runs."""
        ports = self._ports["decode"]
        return {name: ports[name].read() for name in cache_shapes(self.manifest)}

    def read(self, program: str, port: str) -> NDArray[Any]:
        """A copy of what a program's input or output holds now, for comparing runs."""
        return self._ports[program][port].read()

    def _bind(self, program: str, shared: dict[str, Buffer]) -> Any:
        declared = self.manifest.programs[program]
        groups: list[dict[str, Buffer]] = []
        for ports in (declared.inputs, declared.outputs):
            groups.append({})
            for port in ports:
                buffer = shared.get(port.name) or self._backend.buffer(port.shape, port.dtype)
                if buffer.shape != tuple(port.shape):
                    raise BundleError(
                        f"{port.name} has shape {port.shape}, other parts of the manifest say {list(buffer.shape)}",
                        where=f"program {program}",
                        fix="compile the bundle again",
                    )
                groups[-1][port.name] = buffer
        self._ports[program] = groups[0] | groups[1]
        return self._backend.bind(program, *groups)

    def _buffer(self, program: str, name: str) -> Buffer:
        declared = self.manifest.programs[program]
        port = next(port for port in (*declared.inputs, *declared.outputs) if port.name == name)
        return self._backend.buffer(port.shape, port.dtype)

    def _stage(self, name: str) -> Stage:
        return next(stage for stage in self.manifest.recipe.stages if stage.name == name)

    def _follow(self, program: str) -> None:
        """Trace the survivors of each stage that ``program`` ran back to the row's original patches."""
        geometry = self.manifest.geometry
        for stage in self.manifest.recipe.stages:
            port = self._ports[program].get(f"kept.{stage.name}")
            if port is None:
                continue
            indices = port.read().astype(np.int64)
            before = list(self._kept.values())[-1] if self._kept else None
            size = geometry.images * geometry.tokens_per_image if before is None else before.shape[1]
            if indices.min() < 0 or indices.max() >= size:
                raise SecateurError(
                    f"{stage.name} kept token {int(indices.max())} of {size}", where=f"program {program}"
                )
            self._kept[stage.name] = indices if before is None else np.take_along_axis(before, indices, axis=1)

    def _logits(self, program: str) -> Floats:
        logits = np.asarray(self._ports[program]["logits"].read(), dtype=np.float32)
        _require_finite(program, logits.max(axis=-1))
        return logits


def _require_finite(program: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise SecateurError(
            "the outputs are not finite numbers (NaN or infinity)",
            where=f"program {program}",
            fix="check the weights with: secateur verify; fp16 may overflow where fp32 or bf16 does not",
        )
