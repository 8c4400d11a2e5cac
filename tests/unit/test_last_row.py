"""Which row of prefill the next token is read from: with pads, in a batch, and behind stages that took rows out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from secateur.compiler.bundle import outline
from secateur.compiler.function import trace_function
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import KINDS, Parity, compare_runs
from secateur.compiler.pipeline import prune
from secateur.compiler.program import Program
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.compiler.runs import CompiledRun, EagerBackend, EagerProgram, OracleRun, Weights
from secateur.passes.join_phases import join_prefill
from secateur.runtime.request import Request

from .layout_checks import check_found

IMAGE, SEQUENCE, DEEP = 3, 9, 2
IDS = torch.tensor([[11, 12, 3, 3, 13, 14, 15, 16, 17], [21, 3, 3, 22, 0, 0, 0, 0, 0], [31, 32, 33, 3, 3, 0, 0, 0, 0]])
LENGTHS = torch.tensor([9, 4, 5])
FEATURES = torch.arange(100.0, 106.0).reshape(3, 2, 1).expand(3, 2, DEEP)


def stub(name: str, function: Callable[..., Any], **feed: Tensor) -> Program:
    return trace_function(name, function, feed, ("hidden", "last")[: 1 + (name == "decoder")])


def join(cut: int = 0) -> Program:
    """Prefill of programs that pass numbers through: the decoder leaves out its first ``cut`` rows."""
    hidden, ids = torch.zeros(3, SEQUENCE, DEEP), torch.zeros(3, SEQUENCE, dtype=torch.int64)
    decoder = stub("decoder", lambda hidden, position_ids, last: (hidden[:, cut:] * 1.0, last - cut),
                   hidden=hidden, position_ids=ids, last=ids[:, 0].clone())  # fmt: skip
    embedding = stub("embedding", lambda ids: ids[..., None].expand(3, SEQUENCE, DEEP).float(), ids=ids)
    head = stub("head", lambda row: row * 1.0, row=hidden[:, 0].clone())
    return join_prefill(
        decoder, embedding, head, features=FEATURES.contiguous(), sequence=SEQUENCE, image_token=IMAGE, pad_token=0,
        tokens_per_item=2, kept_per_item=2, original_positions=False,
    )  # fmt: skip


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_logits_are_those_of_each_rows_own_last_token(cut: int) -> None:
    """The first row is full, the third ends with an image's feature."""
    program = join(cut)
    feed = {"input_ids": IDS, "lengths": LENGTHS, "features": FEATURES.contiguous()}
    logits = fx.Interpreter(program.edit()).run(*[feed[name] for name in program.inputs])[0]
    assert logits.tolist() == [[17.0] * DEEP, [22.0] * DEEP, [105.0] * DEEP]


STAGES = (
    Stage(Site("decoder.layer", 1), score=Term("last_query_attention_mean"), select=Term("top_k"), share=0.75),
    Stage(Site("decoder.layer", 2), score=Term("last_query_attention_mean"), select=Term("top_k"), share=0.5,
          scope="whole"),
    Stage(Site("decoder.layer", 3), score=Term("last_query_attention_mean"), select=Term("top_k"), share=0.25,
          scope="whole"),
)  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3])
def test_behind_every_stage_the_last_row_is_where_counting_finds_it(count: int, traced: Callable[..., Any]) -> None:
    """Two images of sixteen tokens in each of two rows, of which the stages leave twelve, eight and four."""
    trace = traced("llama", "fp32", 2, 2)
    recipe = Recipe("three", "three", "", STAGES[:count])
    pruned = prune(trace, recipe, stop_after="insert_decoder_stages")
    program = pruned.programs["prefill_decoder"]
    # A row of text, two images, text; pads behind it.
    length, prunable = pruned.job.sequence, torch.zeros(2, pruned.job.sequence, dtype=torch.bool)
    prunable[:, 2:18] = prunable[:, 20:36] = True
    last = torch.tensor([length - 1, 37])
    feed: dict[str, Tensor] = {"prunable": prunable, "last": last}
    draw = torch.Generator().manual_seed(0)
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name == "hidden":
            feed["hidden"] = torch.randn(2, length, 64, generator=draw)
        elif node.name == "position_ids":
            feed["position_ids"] = torch.arange(length).expand(2, length)
    out = EagerProgram(program, Weights(trace.source, trace.model))(feed)
    gone = 2 * (16 - (12, 8, 4)[count - 1])
    assert out["last"].tolist() == [length - 1 - gone, 37 - gone]
    assert out["hidden"].shape[1] == length - gone


def test_programs_answer_from_that_row(traced: Callable[..., Any]) -> None:
    """Rows of different length side by side, against the eager oracle, which has no pads."""
    trace = traced("llama", "fp32", 2, 2)
    pruned = prune(trace, Recipe("three", "three", "", STAGES), expose=True)
    told = outline(pruned.job, pruned.programs)
    ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, Weights(trace.source, trace.model)), told))
    rows = random_rows(told, 4, 1, seed=2)
    assert len({len(row.input_ids) for row in rows}) > 2
    found = Parity(expects=KINDS)
    compare_runs(ours, OracleRun(Oracle(pruned.job)), rows, 2, found)
    check_found(found, 4)
