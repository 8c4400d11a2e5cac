"""One request: its caches, its inputs and outputs, and the three programs tied to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.backends import Backend, Buffer, Shared
from secateur.runtime.errors import BundleError, SecateurError, UserError
from secateur.runtime.given import check_array, check_ids, check_kept, check_placeholders
from secateur.runtime.kv import cache_shapes, decode_positions, decode_slots, handed_on, present_port
from secateur.runtime.media import media_positions
from secateur.runtime.schema import Manifest

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Request:
    """State of one generation. Weights are the session's; everything written is here.

    A request is used by one thread at a time; different requests of a session may run at once. It can be
    used again for another prompt: ``prefill`` starts over. ``variant`` says which of a bundle's geometries it has;
    its ``manifest`` is that geometry's alone.
    """

    def __init__(self, backend: Backend, manifest: Manifest, variant: int = 0) -> None:
        self.manifest = manifest = manifest.variant(variant)
        self.variant = variant
        self.lengths: Ints = np.zeros(manifest.geometry.batch, dtype=np.int64)
        """Real tokens of each row before pruning, int64 [B]."""
        self.step: int | None = None
        """Decode steps done since prefill; None before it."""
        self._next: Ints | None = None
        """Position id of each row's first new token, int64 [B], where media count otherwise than slots."""
        self._backend = backend
        shared: dict[str, Buffer] = {}
        for name, shape in cache_shapes(manifest).items():
            shared[name] = shared[present_port(name)] = backend.buffer(shape, manifest.dtype)
        for name, port in handed_on(manifest.programs).items():
            shared[name] = backend.buffer(port.shape, port.dtype)
        self._ports: dict[str, dict[str, Buffer]] = {}
        self._bound = {name: self._bind(name, shared) for name in manifest.programs}
        self._kept: dict[str, Ints] = {}
        self._patches: Ints | None = None
        """Original patch of each visual token that prefill will read, int64 [B, V]; None where nobody said."""

    def encode(self, pixel_values: Floats | Shared, input_features: Floats | Shared | None = None) -> Floats:
        """Run ``vision``: [B*n, 3, H, W], or what its port says, -> the features that prefill will read, [B, F, D].

        ``input_features`` float32 [B, mel bins, frames] where the bundle hears. Both may lie on the GPU that the bundle
        runs on, in the ports' own types (DLPack).
        """
        ports = self._ports["vision"]
        if ("input_features" in ports) != (input_features is not None):
            lacks = "input_features are missing" if input_features is None else "input_features, but no sound"
            raise UserError(
                f"{lacks}; a row of this bundle holds {self.manifest.shown}", where="encode",
                fix="give input_features" if input_features is None else "leave them out",
            )  # fmt: skip
        for name, values in (("pixel_values", pixel_values), ("input_features", input_features)):
            if values is not None:
                ports[name].write(check_array(name, values, ports[name].shape, "encode"))
        self._kept, self._patches = {}, None
        self._bound["vision"].run()
        self._patches = self._follow("vision", self._all_patches())
        features = self._ports["vision"]["features"].read()
        _require_finite("vision", features)
        return np.asarray(features, dtype=np.float32)

    def prefill(
        self, input_ids: Ints, lengths: Ints, features: Floats | Shared | None = None, kept: Ints | None = None
    ) -> Floats:
        """Run ``prefill`` on ids [B, N] with ``lengths`` [B] real tokens -> logits [B, vocab].

        ``features`` None takes what :meth:`encode` left. Given features [B, F, D] come with ``kept``, int64
        [B, V]: each feature's original patch in its row, extra rows (of which a model may have some behind each
        image) left out. Where the vision side prunes, prefill may need it, and without it :attr:`kept` says
        nothing of this prompt.
        """
        geometry, ports = self.manifest.geometry, self._ports["prefill"]
        ids = np.asarray(input_ids)
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.shape != (geometry.batch,) or lengths.min() < geometry.features + 1:
            raise UserError(f"lengths {lengths.tolist()} do not fit the geometry", where="prefill")
        if lengths.max() > geometry.sequence:
            raise UserError(
                f"a row of {int(lengths.max())} tokens, the bundle was compiled for {geometry.sequence}",
                where="prefill",
                fix="shorten the prompt, or compile with a larger --text-tokens",
            )
        given = check_array("input_ids", ids, ports["input_ids"].shape, "prefill")
        check_ids(self.manifest, ids, "prefill")
        ports["input_ids"].write(given)
        ports["lengths"].write(lengths)
        check_placeholders(self.manifest, ids, lengths)
        if features is not None:
            self._take(features, kept)
        elif kept is not None:
            raise UserError("kept without features", where="prefill", fix="give both, or neither after encode")
        self._kept = {name: k for name, k in self._kept.items() if name in self._vision_stages()}
        if "kept" in ports:
            if self._patches is None:
                raise UserError(
                    "prefill needs the vision program's survivors", where="prefill", fix="call encode first"
                )
            ports["kept"].write(self._patches)
        if "positions" in ports and self.manifest.media is not None:
            positions, self._next = media_positions(self.manifest, self.manifest.media, ids, lengths)
            ports["positions"].write(positions)
        self.step = None
        self._bound["prefill"].run()
        if self._patches is not None:
            self._follow("prefill", self._patches)
        self.lengths, self.step = lengths, 0
        return self._logits("prefill")

    def decode(self, tokens: Ints) -> Floats:
        """Run ``decode`` on one token per row, int64 [B] -> logits [B, vocab]."""
        if self.step is None:
            raise UserError("decode before prefill", where="decode", fix="call prefill first")
        ports, tokens = self._ports["decode"], np.asarray(tokens, dtype=np.int64)
        check_ids(self.manifest, tokens, "decode")
        slots = decode_slots(self.manifest, self.lengths, self.step)
        for name, slot in slots.items():
            ports[name].write(slot)
        if "position" in ports:  # a decoder without position ids has no such input
            at = decode_positions(self.manifest, self.lengths, self.step)
            ports["position"].write(at if self._next is None else self._next + self.step)
        ports["input_ids"].write(tokens.reshape(-1, 1))
        self._bound["decode"].run()
        self.step += 1
        return self._logits("decode")

    @property
    def kept(self) -> dict[str, Ints]:
        """Per stage so far: the row's original patch indices that are left after it, int64 [B, K].

        A stage is left out where they are not known: features were given without theirs.
        """
        return dict(self._kept)

    @property
    def cache(self) -> dict[str, NDArray[Any]]:
        """Copies of the caches by past port name, for comparing runs."""
        ports = self._ports["decode"]
        return {name: ports[name].read() for name in cache_shapes(self.manifest)}

    def read(self, program: str, port: str) -> NDArray[Any]:
        """A copy of what a program's input or output holds now, for comparing runs."""
        return self._ports[program][port].read()

    def share(self, program: str, port: str) -> Shared:
        """The memory of a program's input or output itself, for ``from_dlpack``: later runs change it.

        On a GPU they do not wait for whoever reads it: synchronise your stream before the next run of the request.
        """
        buffer = self._ports[program][port]
        if not isinstance(buffer, Shared):
            raise UserError(f"{port} is not memory that can be shared", where=f"program {program}", fix="use read")
        return buffer

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
        return self._backend.bind(program, *groups, variant=self.variant)

    def _vision_stages(self) -> list[str]:
        return [stage.name for stage in self.manifest.recipe.stages if stage.chooses and not stage.in_decoder]

    def _all_patches(self) -> Ints:
        """Every patch of every row, int64 [B, n*T]."""
        geometry = self.manifest.geometry
        return np.tile(np.arange(geometry.places), (geometry.batch, 1))

    def _take(self, features: Floats | Shared, kept: Ints | None) -> None:
        """Features made elsewhere: what the last ``encode`` kept is not theirs."""
        ports, stages = self._ports["prefill"], self._vision_stages()
        if "carried" in ports:
            raise UserError(
                "this bundle's decoder goes on with scores of its vision program",
                where="prefill",
                fix="call encode instead of giving features",
            )
        if "deepstack.0" in ports:
            raise UserError(
                "this model's decoder also reads features of inner layers of its tower",
                where="prefill",
                fix="call encode instead of giving features",
            )
        if kept is not None:
            kept = check_kept(self.manifest, kept)
        elif "kept" in ports:
            raise UserError(
                "the features' original patches are needed",
                where="prefill",
                fix=f"give kept, int64 {list(ports['kept'].shape)}, with features",
            )
        ports["features"].write(check_array("features", features, ports["features"].shape, "prefill"))
        self._kept = {stages[-1]: kept} if stages and kept is not None else {}
        self._patches = self._all_patches() if kept is None and not stages else kept

    def _follow(self, program: str, patches: Ints) -> Ints:
        """Trace the survivors of each stage that ``program`` ran back to the row's original patches.

        ``patches`` int64 [B, N]: the original patches that enter; returns those that leave.
        """
        for stage in self.manifest.recipe.stages:
            if stage.in_decoder and program == "prefill" and stage.length_out == 0:
                self._kept[stage.name] = patches = patches[:, :0]
            port = self._ports[program].get(f"kept.{stage.name}")
            if port is None:
                continue
            indices = port.read().astype(np.int64)
            size = patches.shape[1]
            if indices.min() < 0 or indices.max() >= size:
                raise SecateurError(
                    f"{stage.name} kept token {int(indices.max())} of {size}", where=f"program {program}"
                )
            self._kept[stage.name] = patches = np.take_along_axis(patches, indices, axis=1)
        return patches

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
