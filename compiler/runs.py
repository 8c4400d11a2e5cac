"""What can be compared: the eager oracle, pruned programs in eager PyTorch, and bundles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from secateur.compiler.inputs import RowInput, respace
from secateur.compiler.oracle import Oracle, RowRun
from secateur.compiler.parity import Run, likeliest
from secateur.compiler.program import Program
from secateur.compiler.trace import Source
from secateur.exporters.checkpoint import Checkpoint
from secateur.exporters.onnx import port_name
from secateur.exporters.tensor_names import tied_names
from secateur.runtime.manifest import Manifest
from secateur.runtime.request import Request


class OracleRun:
    """The eager oracle. With ``remember`` a row runs once, however many runs are held against it."""

    defines = True

    def __init__(self, oracle: Oracle, remember: bool = False) -> None:
        self.oracle, self.remember = oracle, remember
        self._seen: dict[tuple[int, int], tuple[RowInput, RowRun]] = {}

    def run(self, batch: Sequence[RowInput], greedy: int = 0) -> list[RowRun]:
        return [self._row(item, greedy) for item in batch]

    def _row(self, item: RowInput, greedy: int) -> RowRun:
        key = (id(item), greedy)
        if key in self._seen:
            return self._seen[key][1]
        pixels = torch.from_numpy(item.pixel_values)
        # The prompt's own logits are the first of the greedy ones.
        sound = None if item.input_features is None else torch.from_numpy(item.input_features)
        made = self.oracle.run(
            item.input_ids, pixels, item.forced_tokens, greedy=max(0, greedy - 1), input_features=sound
        )
        if self.remember:  # the row is held as well: its id is then no other's
            self._seen[key] = item, made
        return made


class CompiledRun:
    """Programs behind a request: a bundle's on its backend, or a pruned model's in PyTorch."""

    defines = False

    def __init__(self, manifest: Manifest, request: Request) -> None:
        self.manifest, self.request = manifest, request
        ports = {p.name for p in manifest.programs["prefill"].outputs}
        self.exposed = [s.name for s in manifest.recipe.stages if f"hidden.{s.name}" in ports]
        # Hidden rows at sites are among a bundle's results only where whoever compiled it asked for them, and a stage
        # that leaves no token has no choice to show.
        hidden = set() if self.exposed else {"hidden"}
        self.omits = frozenset(hidden | {f"kept.{s.name}" for s in manifest.recipe.stages if not s.chooses})

    def run(self, batch: Sequence[RowInput], greedy: int = 0) -> list[RowRun]:
        request, sizes = self.request, self.manifest.geometry
        ids = np.full((sizes.batch, sizes.sequence), self.manifest.model.pad_token_id, np.int64)
        for index, item in enumerate(batch):
            ids[index, : len(item.input_ids)] = item.input_ids
        lengths = np.array([len(i.input_ids) for i in batch], np.int64)
        sound = [i.input_features for i in batch if i.input_features is not None]
        request.encode(np.concatenate([i.pixel_values for i in batch]), np.concatenate(sound) if sound else None)
        features = request.read("vision", "features").copy()
        logits = [request.prefill(ids, lengths).copy()]
        hidden = {name: request.read("prefill", f"hidden.{name}").copy() for name in self.exposed}
        kept = {
            s.name: request.read("prefill" if s.in_decoder else "vision", f"kept.{s.name}").copy()
            for s in self.manifest.recipe.stages
            if s.chooses
        }
        forced = [list(item.forced_tokens) for item in batch]
        for step in range(len(forced[0]) + max(0, greedy - 1)):
            given = [row[step] if step < len(row) else int(logits[-1][i].argmax()) for i, row in enumerate(forced)]
            logits.append(request.decode(np.array(given, np.int64)).copy())
        caches, rows = request.cache, []
        for index in range(len(batch)):
            row = RowRun(
                kept={name: torch.from_numpy(k[index]) for name, k in kept.items()},
                hidden={n: torch.from_numpy(h[index, : self._left(n, lengths[index])]) for n, h in hidden.items()},
                features=torch.from_numpy(features[index]),
                logits=[torch.from_numpy(step[index]) for step in logits],
                omits=self.omits,
            )
            for layer in range(self.manifest.model.layers):
                segment = next(s for s in self.manifest.segments if s.first_layer <= layer < s.last_layer)
                filled = int(lengths[index]) - segment.removed - segment.evicted + len(logits) - 1
                row.keys.append(torch.from_numpy(caches[f"past_key.{layer}"][index, :, :filled]))
                row.values.append(torch.from_numpy(caches[f"past_value.{layer}"][index, :, :filled]))
            rows.append(row)
        return rows

    def _left(self, stage: str, length: int) -> int:
        """Real rows behind a decoder stage, of ``length`` that entered the decoder."""
        removed = 0
        for one in self.manifest.recipe.stages:
            if one.in_decoder:
                removed += one.groups * (one.length_in - one.length_out)
            if one.name == stage:
                break
        return int(length) - removed


class Respaced:
    """A run whose prompts hold another number of placeholders per image than the rows it is given."""

    def __init__(self, run: Run, image_token: int, before: Sequence[int], after: Sequence[int]) -> None:
        self.inner, self.spacing = run, (image_token, before, after)

    @property
    def defines(self) -> bool:
        return self.inner.defines

    def run(self, batch: Sequence[RowInput], greedy: int = 0) -> list[RowRun]:
        return self.inner.run([respace(item, *self.spacing) for item in batch], greedy)


def answer(run: Run, item: RowInput, batch: int, tokens: int) -> list[int]:
    """A row's greedy tokens; it stands in every place of the ``batch``."""
    free = replace(item, forced_tokens=())
    return likeliest(run.run([free] * batch, tokens)[0])


class Weights:
    """Parameters of a checkpoint in float32 by their names in the Hugging Face model, each read once."""

    def __init__(self, source: Source, model: Any) -> None:
        self._checkpoint = Checkpoint(source.path, model)
        self._aliases = tied_names(model)
        self._read: dict[str, Tensor] = {}

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        name = self._aliases.get(name, name)
        if name not in self._read:
            self._read[name] = self._checkpoint.read(name, tuple(shape)).float()
        return self._read[name]


class EagerProgram:
    """A program with its weights, run node by node in PyTorch."""

    def __init__(self, program: Program, weights: Weights) -> None:
        self.program, module = program, program.edit()
        for node in module.graph.nodes:
            if node.op == "get_attr" and "weight" in node.meta:
                target = str(node.target)
                value = weights.read(node.meta["weight"], getattr(module, target).shape)
                setattr(module, target, torch.nn.Buffer(value, persistent=False))
        self._interpreter = _OnCpu(module)

    @torch.no_grad()
    def __call__(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs to outputs, by name. Names of inputs the program does not have are passed over."""
        values = self._interpreter.run(*[feed[name] for name in self.program.inputs])
        return dict(zip(self.program.outputs, values, strict=True))


class _OnCpu(fx.Interpreter):
    """A graph that was traced on the ``meta`` device says so here and there before the first pass tidies it."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        cpu = torch.device("cpu")

        def move(value: Any) -> Any:
            return cpu if isinstance(value, torch.device) else value

        moved = {name: move(value) for name, value in kwargs.items()}
        return super().call_function(target, tuple(move(value) for value in args), moved)


class EagerBackend:
    """A runtime backend of eager programs, so that they are fed and read as a bundle's are."""

    name = "fx"

    def __init__(self, programs: Mapping[str, Program], weights: Weights) -> None:
        self._programs = {name: EagerProgram(program, weights) for name, program in programs.items()}

    def buffer(self, shape: Sequence[int], dtype: str) -> _Memory:
        return _Memory(torch.zeros(*shape, dtype=_DTYPES[dtype]))

    def bind(self, program: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *, variant: int = 0) -> _Tied:
        return _Tied(self._programs[program], inputs, outputs)

    def close(self) -> None:
        self._programs = {}


_DTYPES = {"fp32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


class _Memory(NamedTuple):
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def write(self, values: np.ndarray[Any, Any]) -> None:
        self.tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)).expand(self.tensor.shape))

    def read(self) -> np.ndarray[Any, Any]:
        return self.tensor.numpy().copy()


class _Tied(NamedTuple):
    program: EagerProgram
    inputs: Mapping[str, _Memory]
    outputs: Mapping[str, _Memory]

    def run(self) -> None:
        feed = {name: self.inputs[port_name(name)].tensor for name in self.program.program.inputs}
        for name, value in self.program(feed).items():
            self.outputs[name].tensor.copy_(value)
