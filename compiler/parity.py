"""Compare a bundle with the eager oracle: what it chose, then what it computed with the choice held equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.compiler.oracle import Oracle, RowRun
from secateur.compiler.ties import is_tied
from secateur.runtime.manifest import Manifest

TOLERANCE = 1e-4
"""Largest difference allowed at fp32 in features, hidden rows, keys, values and logits, where the largest
magnitude compared is at most 1; in proportion to it above: about 800 units in the last place."""


@dataclass
class Parity:
    """Sums over compared rows. Differences are largest absolute ones, with the choice of tokens held equal."""

    rows: int = 0
    chose_equally: int = 0
    tied: int = 0
    """Rows that kept other tokens where two scores met within the tie tolerance."""
    chose_differently: int = 0
    features: float = 0.0
    hidden: float = 0.0
    cache: float = 0.0
    logits: float = 0.0
    scales: dict[str, float] = field(default_factory=dict)
    """Largest magnitude among the oracle's values, by kind."""
    mismatches: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.rows > 0 and self.chose_differently == 0 and all(
            getattr(self, kind) <= TOLERANCE * max(1.0, scale) for kind, scale in self.scales.items()
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def note(self, what: str, ours: np.ndarray[Any, Any], theirs: Tensor) -> None:
        difference = float(np.abs(ours - theirs.numpy()).max()) if ours.size else 0.0
        # NaN compares false with everything: let it fail, not vanish in max().
        difference = float("inf") if np.isnan(difference) else difference
        setattr(self, what, max(getattr(self, what), difference))
        self.scales[what] = max(self.scales.get(what, 0.0), float(theirs.abs().max()) if theirs.numel() else 0.0)


@dataclass(frozen=True)
class RowInput:
    """One row: unpadded ids with P placeholders an image, ``pixel_values [n,3,H,W]``, tokens to force on decode."""

    input_ids: Sequence[int]
    pixel_values: np.ndarray[Any, Any]
    forced_tokens: Sequence[int]


def compare_batch(
    session: Any, oracle: Oracle, batch: Sequence[RowInput], into: Parity, cache: dict[Any, RowRun]
) -> None:
    """Run one batch through a session's programs and each row through the oracle; add to ``into``.

    ``cache`` keeps the oracle's free runs by (row identity), so that several bundles can be compared with one run.
    All rows must force the same number of tokens.
    """
    manifest: Manifest = session.manifest
    request = session.request()
    run_rows(session, request, batch)
    for index, item in enumerate(batch):
        key = id(item)
        if key not in cache:
            cache[key] = oracle.run(item.input_ids, torch.from_numpy(item.pixel_values), item.forced_tokens)
        free = cache[key]
        chosen = read_choices(manifest, request, index)
        into.rows += 1
        run = free
        different = [n for n, kept in chosen.items() if not np.array_equal(kept, free.kept[n].numpy())]
        if different:
            # Later stages see other tokens once an earlier one chose otherwise: the first is the one to judge.
            stage = next(s for s in oracle.job.stages if s.planned.name == different[0])
            kept = torch.from_numpy(chosen[different[0]])
            again = oracle.run(item.input_ids, torch.from_numpy(item.pixel_values), keep_signals=True)
            if is_tied(stage, kept, free.score.get(different[0]), again.signals[different[0]]):
                into.tied += 1
            else:
                into.chose_differently += 1
                into.mismatches.append(f"{different[0]} row {into.rows - 1}")
            forced = {n: torch.from_numpy(k) for n, k in chosen.items()}
            run = oracle.run(item.input_ids, torch.from_numpy(item.pixel_values), item.forced_tokens, forced)
        else:
            into.chose_equally += 1
        compare_row(manifest, request, index, item, run, into)


def run_rows(session: Any, request: Any, batch: Sequence[RowInput]) -> None:
    """Prefill and teacher-forced decode; the logits of every step are kept on the request as ``seen``."""
    sizes = session.manifest.geometry
    ids = np.full((sizes.batch, sizes.sequence), session.manifest.model.pad_token_id, np.int64)
    for index, item in enumerate(batch):
        ids[index, : len(item.input_ids)] = item.input_ids
    lengths = np.array([len(i.input_ids) for i in batch], np.int64)
    pixels = np.concatenate([i.pixel_values for i in batch])
    request.seen = [session.prefill(request, ids, lengths, pixel_values=pixels).copy()]
    request.prompt_features = request.read("vision", "features").copy()
    request.site_rows = {
        s.name: request.read("prefill", f"hidden.{s.name}").copy()
        for s in session.manifest.recipe.stages
        if any(p.name == f"hidden.{s.name}" for p in session.manifest.programs["prefill"].outputs)
    }
    for step in range(len(batch[0].forced_tokens)):
        tokens = np.array([i.forced_tokens[step] for i in batch], np.int64)
        request.seen.append(session.decode(request, tokens).copy())


def read_choices(manifest: Manifest, request: Any, index: int) -> dict[str, np.ndarray[Any, Any]]:
    """Stage -> kept indices of one row, counted among the tokens that entered the stage."""
    return {
        s.name: request.read("prefill" if s.in_decoder else "vision", f"kept.{s.name}")[index]
        for s in manifest.recipe.stages
        if s.chooses
    }


def compare_row(manifest: Manifest, request: Any, index: int, item: RowInput, run: RowRun, into: Parity) -> None:
    """Features, hidden rows at sites, caches and logits of one row; padding is left out."""
    into.note("features", request.prompt_features[index], run.features)
    for name, rows in request.site_rows.items():
        into.note("hidden", rows[index][: len(run.hidden[name])], run.hidden[name])
    for step, logits in enumerate(request.seen):
        into.note("logits", logits[index], run.logits[step])
    caches = request.cache
    for layer in range(manifest.model.layers):
        for role, theirs in (("key", run.keys[layer]), ("value", run.values[layer])):
            into.note("cache", caches[f"past_{role}.{layer}"][index][:, : theirs.shape[1]], theirs)


def batches(items: Sequence[RowInput], size: int) -> Iterable[list[RowInput]]:
    """Batches of exactly ``size``; the last one is filled up with the first rows."""
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        yield chunk + list(items[: size - len(chunk)])


def generate_reference(
    model: Any, input_ids: Sequence[int], pixel_values: Tensor, new_tokens: int
) -> Mapping[str, Any]:
    """Hugging Face's own greedy ``generate`` on one unpadded row: tokens, and logits per step ``[T,vocab]``."""
    ids = torch.tensor([list(input_ids)])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixel_values, do_sample=False,
            max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return {"tokens": out.sequences[0, ids.shape[1] :].tolist(), "logits": torch.stack(out.logits)[:, 0].numpy()}
