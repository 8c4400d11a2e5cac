"""Which pass changes numbers first: the programs as every pass leaves them, run in eager PyTorch on one row.

After a pass that keeps a program's ports and lengths, its results are held against those before the pass. After one
that changes them by design (stages inserted, caches attached) they are held against the eager oracle with the stages
that are in by then; the choice of tokens is judged as in any comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from secateur.compiler.inputs import RowInput, respace
from secateur.compiler.judge import run_oracle
from secateur.compiler.oracle import Oracle, RowRun, mark_prunable
from secateur.compiler.parity import ALWAYS, Parity, compare_row
from secateur.compiler.program import ProgramSet
from secateur.compiler.pruned import Job
from secateur.compiler.runs import EagerProgram, Weights
from secateur.compiler.tile_slots import follow_kept, lay_out_rows
from secateur.compiler.trace import Traced
from secateur.passes.expose_sites import expose_sites
from secateur.passes.join_phases import number_blocks

TRACE = "trace"
"""Stands in front of the passes: the traced programs before any."""


class Step(Protocol):
    """A pass of the pipeline."""

    @property
    def name(self) -> str: ...
    @property
    def run(self) -> Callable[[ProgramSet, Job], ProgramSet]: ...


@dataclass(frozen=True)
class Footprint:
    """One pass: what its programs were held against ("the pass before" or "the oracle"), and what came out."""

    name: str
    against: str
    parity: Parity

    @property
    def changes(self) -> bool:
        return not self.parity.passed

    def as_json(self) -> dict[str, Any]:
        what, difference = self.parity.worst
        return {
            "pass": self.name, "against": self.against, "changes": self.changes, "worst": what,
            "difference": difference, "chose_differently": self.parity.mismatches,
        }  # fmt: skip


def follow_passes(
    traced: Traced,
    job: Job,
    passes: Sequence[Step],
    model: nn.Module,
    item: RowInput,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Footprint]:
    """Run ``item`` through the programs after every pass, up to and with the first that changes what they compute.

    ``model`` is the one the oracle runs (:func:`secateur.compiler.oracle.load_recording_model`).
    """
    item = replace(item, forced_tokens=list(item.forced_tokens)[:1])
    weights = Weights(traced.source, traced.model)
    references: dict[int, _Reference] = {}
    programs, inserted, before = traced.programs, set[str](), None
    found: list[Footprint] = []
    for step in (None, *passes):
        name = TRACE if step is None else step.name
        tell(name)
        if step is not None:
            programs = step.run(programs, job)
        inserted.add(name)
        part = _part_of(job, inserted)
        if len(part.stages) not in references:
            references[len(part.stages)] = _Reference(part, model, item)
        reference = references[len(part.stages)]
        seen = _Walk(programs, reference, weights).run()
        found.append(_judge(name, seen, reference, before))
        if found[-1].changes:
            break
        before = reference, seen
    return found


def _part_of(job: Job, done: Container[str]) -> Job:
    """The job without the stages that no pass has inserted yet."""
    chosen = [
        (function, planned)
        for function, planned in zip(job.stages, job.plan.stages, strict=True)
        if ("insert_decoder_stages" if planned.site.kind == "decoder.layer" else "insert_vision_stages") in done
    ]
    plan = replace(job.plan, stages=tuple(planned for _, planned in chosen))
    return replace(job, plan=plan, stages=tuple(function for function, _ in chosen))


def _judge(name: str, seen: RowRun, reference: _Reference, before: tuple[_Reference, RowRun] | None) -> Footprint:
    cached = "key" not in seen.omits
    parity = Parity(expects=ALWAYS if cached else [kind for kind in ALWAYS if kind != "cache"])
    if before is not None and before[0] is reference and _holds(before[1], seen):
        parity.note_choices(dict.fromkeys(seen.kept, "equal"), before[1], seen)
        parity.note_row(seen, before[1], (f"after {name}", "before it"))
        return Footprint(name, "the pass before", parity)
    sides = ((True, reference.row), (False, seen))
    compare_row(reference.item, sides, parity, reference.oracle)
    return Footprint(name, "the oracle", parity)


def _holds(before: RowRun, after: RowRun) -> bool:
    """Whether the same is known after a pass as before it, and the same tokens were chosen."""
    chosen = before.kept.keys() == after.kept.keys()
    return (
        before.omits == after.omits
        and chosen
        and all(torch.equal(kept, before.kept[name]) for name, kept in after.kept.items())
    )


class _Entered(NamedTuple):
    """A run of the oracle, and what its decoder read: ``hidden [1,N,D]``, ``positions [1,N]``, ``carried [1,V]``."""

    row: RowRun
    hidden: Tensor
    positions: Tensor
    carried: Tensor | None


class _Reference:
    """The oracle with some of the stages, its run of the row, and what entered and left the decoder in it."""

    def __init__(self, job: Job, model: nn.Module, item: RowInput) -> None:
        self.job, self.oracle = job, _Watched(job, model)
        image_token, facts = job.source.config.image_token_id, job.source.vision
        placeholders = sum(token == image_token for token in item.input_ids) // facts.items
        assert placeholders <= facts.tokens_per_item + facts.extra_rows, "an item has as many slots at most"
        self.item = respace(item, image_token, [placeholders], [job.features_per_item])
        self.entered = self.enter({})

    @property
    def row(self) -> RowRun:
        return self.entered.row

    def enter(self, forced: Mapping[str, Tensor]) -> _Entered:
        """Run the row with some stages told what to keep."""
        row, found = run_oracle(self.oracle, self.item, forced), self.oracle.found
        return _Entered(row, found["inputs_embeds"], found["position_ids"], self.oracle.carried)


class _Watched(Oracle):
    """The oracle, whose rows also hold what the decoder leaves, ``hidden.decoder``; ``found``: what entered it."""

    def run(self, *args: Any, **kwargs: Any) -> RowRun:
        found: dict[str, Tensor] = {}

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if "inputs_embeds" in kwargs:
                found.update({name: kwargs[name] for name in ("inputs_embeds", "position_ids")})

        def after(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault("left", output.last_hidden_state)

        hooks = (
            self.decoder.register_forward_pre_hook(before, with_kwargs=True),
            self.decoder.register_forward_hook(after),
        )
        try:
            row = super().run(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        row.hidden["decoder"] = found["left"][0]
        self.found = found
        return row


class _Walk:
    """One row through a set of programs, whichever they are at this point of the pass list.

    Programs that are still apart are fed what the oracle's decoder reads; joined ones feed each other.
    """

    def __init__(self, programs: ProgramSet, reference: _Reference, weights: Weights) -> None:
        self.programs, self.reference, self.job = programs, reference, reference.job
        self.weights = weights
        self.batch = self.job.geometry.batch
        ids = torch.tensor(list(reference.item.input_ids))
        self.length = len(ids)
        self.ids = torch.full((1, self.job.sequence), self.job.source.pad_token)
        self.ids[0, : self.length] = ids
        self.image = self.ids == self.job.source.config.image_token_id
        empty = (stage.planned.name for stage in self.job.stages if not stage.planned.length_out)
        self.row = RowRun(omits=frozenset(f"kept.{name}" for name in empty))

    def run(self) -> RowRun:
        pixels = torch.from_numpy(self.reference.item.pixel_values)
        vision = self._call("vision", {"pixel_values": pixels.repeat(self.batch, 1, 1, 1)})
        self._note_kept(vision)
        facts = self.job.source.vision
        items = self.batch * facts.items
        features = vision["features"].reshape(items, -1, vision["features"].shape[-1])
        if "extra_rows" in self.programs.programs:
            extra = self._call("extra_rows", {})["rows"]
            if (tiles := facts.tiles) is not None and self.row.kept:
                rows = features.reshape(self.batch, facts.items, -1, features.shape[-1])[0]
                features = lay_out_rows(facts, follow_kept(facts, self.row.kept), rows, extra[0])
                features = features.expand(self.batch, *features.shape)
            else:
                features = torch.cat([features, extra.expand(len(features), -1, -1)], 1)
                features = features if tiles is None else features[:, list(tiles.order)]
        self.row.features = features.reshape(self.batch, -1, features.shape[-1])[0]
        if "prefill" in self.programs.programs:
            self._run_joined(vision)
        else:
            self._run_apart()
        return self.row

    def _run_joined(self, vision: Mapping[str, Tensor]) -> None:
        self.row.omits |= {"hidden.decoder"}
        patches = follow_kept(self.job.source.vision, self.row.kept)
        feed = {**vision, "input_ids": self.ids, "lengths": torch.tensor([self.length]), "kept": patches[None]}
        out = self._call("prefill", feed)
        self._note_kept(out)
        self.row.logits.append(out["logits"][0])
        if self.reference.item.forced_tokens:
            token = torch.tensor([[self.reference.item.forced_tokens[0]]])
            position = torch.tensor([self.length + self.job.position_offset])
            out |= self._call("decode", {"input_ids": token, "position": position, **self._slots(), **_pasts(out)})
            self.row.logits.append(out["logits"][0])
        self._note_caches(out)

    def _run_apart(self) -> None:
        name = "decoder" if "decoder" in self.programs.programs else "prefill_decoder"
        reference, row = self.reference, self.row
        entered = reference.entered
        if any(not torch.equal(kept, reference.row.kept[n]) for n, kept in row.kept.items()):
            entered = reference.enter(row.kept)  # what follows is judged on what the vision side chose here
        positions = torch.arange(self.job.sequence)[None] - self.length + entered.positions[:, -1:] + 1
        positions[:, : self.length] = entered.positions
        embedded = self._call("embedding", {"ids": torch.where(self.image, self.job.source.pad_token, self.ids)})
        hidden = embedded["hidden"][:1].clone()
        hidden[self.image] = entered.hidden[self.image[:, : self.length]]
        feed = {
            "hidden": hidden, "position_ids": positions, "prunable": mark_prunable(self.job, self.image, row.kept),
            "image": self.image, "block_ids": number_blocks(self.image), "last": torch.tensor([self.length - 1]),
            "question": self.length - 1 - self.image[0].nonzero()[-1],
            "carried": entered.carried,
        }  # fmt: skip
        out = self._call(name, feed)
        self._note_kept(out)
        last = int(out["last"][0]) if "last" in out else self.length - 1
        row.hidden["decoder"] = out["hidden"][0, : last + 1]
        row.logits.append(self._call("head", {"row": out["hidden"][:1, last]})["logits"][0])
        if not any(n.startswith("present_") for n in out):
            self.row.omits |= {"key", "value", "logits.1"}
            return
        if reference.item.forced_tokens:
            token = torch.tensor([[reference.item.forced_tokens[0]]])
            position = torch.tensor([[self.length + self.job.position_offset]])
            hidden = self._call("embedding", {"ids": token})["hidden"][:1]
            feed = {"hidden": hidden, "position_ids": position, **self._slots(), **_pasts(out)}
            out |= self._call("decode_decoder", feed)
            row.logits.append(self._call("head", {"row": out["hidden"][:1, 0]})["logits"][0])
        self._note_caches(out)

    def _call(self, name: str, feed: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """One program on this row in every place of the batch; caches that nobody gives are empty."""
        program = expose_sites(self.programs[name])
        full: dict[str, Tensor] = {}
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            value = feed.get(node.name)
            if value is None:
                value = torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
            full[node.name] = value if len(value) != 1 else value.expand(self.batch, *value.shape[1:])
        return EagerProgram(program, self.weights)(full)

    def _slots(self) -> dict[str, Tensor]:
        return {f"slot_{s.name}": torch.tensor([self.length - s.removed - s.evicted]) for s in self.programs.segments}

    def _note_kept(self, out: Mapping[str, Tensor]) -> None:
        for name, value in out.items():
            kind, _, stage = name.partition(".")
            if kind == "kept":
                self.row.kept[stage] = value[0]
            elif kind == "hidden" and stage:
                self.row.hidden[stage] = value[0, : self.length - self._removed_by(stage)]

    def _removed_by(self, name: str) -> int:
        """Rows of the decoder that are gone after a stage."""
        planned = [stage.planned for stage in self.job.decoder_stages if not stage.planned.observes]
        until = next(index for index, stage in enumerate(planned) if stage.name == name)
        return sum(s.groups * (s.length_in - s.length_out) for s in planned[: until + 1])

    def _note_caches(self, out: Mapping[str, Tensor]) -> None:
        decoded = len(self.row.logits) - 1
        for segment in self.programs.segments:
            filled = self.length - segment.removed - segment.evicted + decoded
            for layer in range(segment.first_layer, segment.last_layer):
                self.row.keys.append(out[f"present_key.{layer}"][0, :, :filled])
                self.row.values.append(out[f"present_value.{layer}"][0, :, :filled])


def _pasts(out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A program's new caches, and the positions of their rows, as the next one reads them."""
    return {
        name.replace("present_", "past_").replace(".", "_"): value
        for name, value in out.items()
        if name.startswith(("present_", "positions."))
    }
