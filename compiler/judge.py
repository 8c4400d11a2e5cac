"""Whether a run that kept other tokens than the oracle met a tie, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from secateur.compiler.image_sizes import split_kept
from secateur.compiler.inputs import RowInput
from secateur.compiler.oracle import Oracle, RowRun
from secateur.compiler.prompt_order import from_prompt
from secateur.compiler.pruned import Job
from secateur.compiler.ties import is_tied
from secateur.passes.stage import StageFunction

Verdict = Literal["equal", "tied", "different"]


def judge(
    oracle: Oracle, item: RowInput, chosen: Mapping[str, Tensor], free: RowRun
) -> tuple[dict[str, Verdict], RowRun]:
    """How each stage chose among what the stages before it left, and the oracle's run that keeps the same tokens.

    ``free`` is the oracle's own run of ``item``. Greedy and forced tokens are the item's.
    """
    verdicts: dict[str, Verdict] = {}
    forced: dict[str, Tensor] = {}
    run = free
    for stage in oracle.job.stages:
        name = stage.planned.name
        if name not in chosen:
            continue
        kept = chosen[name]
        if torch.equal(kept, run.kept[name]):
            verdicts[name], forced[name] = "equal", kept
            continue
        seen = run_oracle(oracle, item, forced, keep_signals=True)
        tied = all(is_tied(*each) for each in _split_choice(oracle.job, stage, kept, seen))
        verdicts[name], forced[name] = "tied" if tied else "different", kept
        # Later stages are judged on what this choice left, not on what another would have.
        run = run_oracle(oracle, item, forced)
    return verdicts, run


def _split_choice(
    job: Job, stage: StageFunction, kept: Tensor, seen: RowRun
) -> list[tuple[StageFunction, Tensor, Tensor | None, Mapping[str, Tensor]]]:
    """A stage, what it chose, its score and signals; of images of several sizes those of each."""
    name = stage.planned.name
    names = [s.planned.name for s in job.vision_stages]
    if name not in names or not job.sizes:
        return [(stage, kept, seen.score.get(name), seen.signals[name])]
    index = names.index(name)
    parts = split_kept(job, index, from_prompt(job, index, kept))
    return [
        (one.vision_stages[index], part, found.score.get(name), found.signals[name])
        for one, part, found in zip(job.sizes, parts, seen.sizes, strict=True)
    ]


def run_oracle(
    oracle: Oracle, item: RowInput, forced: Mapping[str, Tensor] | None = None, keep_signals: bool = False
) -> RowRun:
    pixels = torch.from_numpy(item.pixel_values)
    sound = None if item.input_features is None else torch.from_numpy(item.input_features)
    return oracle.run(item.input_ids, pixels, item.forced_tokens, forced, keep_signals, input_features=sound)
