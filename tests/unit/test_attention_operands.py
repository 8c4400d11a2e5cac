"""Every operand of attention, in every dialect and phase: torch's numbers, or a refusal that names it.

A new operand of the operators' schemas has no answer in ``GIVEN`` and fails here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx, nn

from secateur.compiler import ops
from secateur.compiler.program import Program, Segment, arrange_operands, operands_of
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import export_program, save_model
from secateur.exporters.weights import WeightLayout
from secateur.passes.attach_caches import attach_caches
from secateur.passes.edit import check_attention
from secateur.runtime.errors import SecateurError, UserError

from .lowering_cases import Call, floats
from .reference_runs import evaluate
from .test_lowerings import build, check_against_schema, list_operators, run_in_runtime

B, H, SHARED, S, C, D = 2, 4, 2, 5, 8, 16
Q, K, V = floats(B, H, S, D), floats(B, SHARED, S, D), floats(B, SHARED, S, D)
PAST = {"past_k": floats(B, SHARED, C, D), "past_v": floats(B, SHARED, C, D)}
START = torch.tensor([3, 6])
PLACES = torch.tensor([[0, 1, 4, 5, 9], [0, 3, 4, 5, 6]])
KNOWN = torch.tensor([[0, 1, 4, *[ops.BEHIND] * 5], [0, 3, 4, 5, 6, 7, *[ops.BEHIND] * 2]])
NEXT = torch.tensor([[5], [8]])
BLOCKS = torch.tensor([[-1, 0, 0, 0, -1], [0, 0, -1, 1, 1]])

REQUIRED: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "tower": (ops.attention, {"q": Q, "k": floats(B, H, S, D), "v": floats(B, H, S, D), "scale": 0.3, "causal": False}),
    "tower, shared keys": (ops.attention, {"q": Q, "k": K, "v": V, "scale": 0.3, "causal": False}),
    "at once": (ops.attention, {"q": Q, "k": K, "v": V, "scale": 0.3, "causal": True}),
    "fresh": (
        ops.cached_attention,
        {"q": Q, "k": K, "v": V, **PAST, "start": torch.zeros(B, dtype=torch.int64), "fresh": True, "scale": 0.3},
    ),
    "decode": (
        ops.cached_attention,
        {"q": Q[:, :, :1], "k": K[:, :, :1], "v": V[:, :, :1], **PAST, "start": START, "fresh": False, "scale": 0.3},
    ),
}
SEES = ("at once", "fresh", "decode")
"""Phases whose rows do not see all others."""


def rows_of(phase: str) -> tuple[int, int]:
    """Queries and keys."""
    return (1, C) if phase == "decode" else (S, S)


def give(phase: str, operand: str) -> list[dict[str, Any]] | str:
    """Operands that give ``operand`` a value that matters, or why it is refused there."""
    if operand == "window":
        return [{"window": 2}] if phase in SEES else "where it is not causal"
    if operand == "softcap":
        return [{"softcap": 0.7}, {"softcap": 30.0}]
    if operand == "bias":
        return [{"bias": floats(b, h, *rows_of(phase)) * 2} for b, h in ((B, H), (1, H), (B, 1), (1, 1))]
    if operand == "block_ids":
        return [{"block_ids": BLOCKS}] if phase in ("at once", "fresh") else "fresh|not causal"
    if operand == "positions":
        if phase == "decode":
            return [{"window": 4, "positions": NEXT, "past_positions": KNOWN}]
        return [{"window": 3, "positions": PLACES}] if phase in SEES else "where it is not causal"
    if operand == "past_positions":
        return [{"window": 4, "positions": NEXT, "past_positions": KNOWN}] if phase == "decode" else "fresh"
    raise AssertionError(f"no answer for {operand}: is it written, or refused, in every dialect?")


def list_optional(operator: Any) -> list[str]:
    return [a.name for a in operator._schema.arguments if a.has_default_value()]


WALK = [(p, n) for p, (operator, _) in REQUIRED.items() for n in list_optional(operator)]


def hold(dialect: str, phase: str, more: Mapping[str, Any]) -> None:
    """What the dialect writes gives torch's numbers, in whatever runs it here."""
    operator, required = REQUIRED[phase]
    program, feeds, expected = build(operator, Call(arrange_operands(operator, {**required, **more})))
    model = ir.to_proto(export_program(program, DIALECTS[dialect], WeightLayout({}, b"", {})))
    check_against_schema(model)
    written = list_operators(model)
    runs = [] if any(domain for domain, _ in written) else [list(evaluate(model, feeds).values())]
    if ("", "TensorScatter") not in written:
        runs.append(run_in_runtime(model, feeds))
    assert runs
    for found in runs:
        np.testing.assert_allclose(found[0], expected[0].numpy(), atol=2e-5, rtol=1e-4)
        for cache, wanted in zip(found[1:], expected[1:], strict=True):
            for row in range(B):  # what lies behind a row's last token is nobody's business
                real = S if phase == "fresh" else int(START[row]) + 1
                np.testing.assert_array_equal(cache[row, :, :real], wanted.numpy()[row, :, :real])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("phase", "operand"), WALK)
def test_every_operand_is_computed_or_refused(phase: str, operand: str, dialect: str) -> None:
    operator, required = REQUIRED[phase]
    answer = give(phase, operand)
    if not isinstance(answer, str):
        for more in answer:
            hold(dialect, phase, more)
        return
    value = 2 if operand == "window" else {"block_ids": BLOCKS, "past_positions": KNOWN}.get(operand, PLACES)
    given = arrange_operands(operator, {**required, operand: value})
    with pytest.raises(UserError, match=f"takes no {operand}.*{answer}"):
        operator(*given)
    program, _, _ = build(operator, Call(arrange_operands(operator, required)))  # a pass that gave it all the same
    (node,) = program.graph.find_nodes(op="call_function", target=operator)
    with program.graph.inserting_before(node):
        held = program.graph.placeholder("extra") if isinstance(value, Tensor) else value
    if isinstance(value, Tensor):
        held.meta["val"] = value
    node.args, node.meta["layer"] = (
        arrange_operands(operator, operands_of(node) | {operand: held}),
        "layers.3.self_attn",
    )
    with pytest.raises(SecateurError) as caught:
        export_program(program, DIALECTS[dialect], WeightLayout({}, b"", {}))
    for word in (operand, "layers.3.self_attn", f"dialect {dialect}"):
        assert word in str(caught.value)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("phase", REQUIRED)
def test_operands_are_computed_together(phase: str, dialect: str) -> None:
    """A soft cap with a bias, in windows, in blocks: the cap comes first, and hides nothing that the mask hides."""
    softened = [{"softcap": 0.7}, {"bias": floats(1, H, *rows_of(phase))}]
    seen = [{}]
    if phase in ("at once", "fresh"):
        seen += [{"window": 2}, {"block_ids": BLOCKS}, {"window": 3, "positions": PLACES, "block_ids": BLOCKS}]
    if phase == "decode":
        seen += [{"window": 2}, {"window": 4, "positions": NEXT, "past_positions": KNOWN}]
    hold(dialect, phase, {})
    for limits, (cap, bias) in itertools.product(seen, itertools.product((False, True), repeat=2)):
        hold(dialect, phase, limits | (softened[0] if cap else {}) | (softened[1] if bias else {}))


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_torch_itself_adds_a_bias_as_transformers_does(softcap: float | None) -> None:
    """Against transformers' eager attention, that of Gemma 2, which has both."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    bias = floats(B, 1, S, S)
    module = nn.Module()
    module.num_key_value_groups = H // SHARED
    wanted, _ = eager_attention_forward(module, Q, K, V, bias, scaling=0.3, softcap=softcap)
    found = ops.attention(Q, K, V, 0.3, False, None, softcap, bias)
    torch.testing.assert_close(found.transpose(1, 2), wanted)


@pytest.mark.parametrize("shape", [(B, H, S, 1), (1, 1, 1, S), (H, S, S), (3, H, S, S)])
def test_a_bias_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"secateur::attention takes no bias float32\[.*give floats of shape \[2 or 1"):
        ops.attention(Q, K, V, 0.3, True, None, None, floats(*shape))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_decode_of_several_rows_is_refused(dialect: str) -> None:
    _, required = REQUIRED["fresh"]
    program, _, _ = build(
        ops.cached_attention, Call(arrange_operands(ops.cached_attention, {**required, "fresh": False}))
    )
    with pytest.raises(SecateurError, match=r"one (new )?row at a time, or say that rows are fresh"):
        export_program(program, DIALECTS[dialect], WeightLayout({}, b"", {}))


# -- passes ---------------------------------------------------------------------------------------------------------


def decoder_of(**operands: Any) -> Program:
    """One layer that attends with those operands, of which tensors are inputs."""
    graph = fx.Graph()

    def place(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(name)
        node.meta["val"] = value
        return node

    place("hidden", floats(B, S, H * D))
    place("last", torch.tensor([4, 3]))
    given = {"q": Q, "k": K, "v": V, "scale": 0.3, "causal": True, **operands}
    held = {name: place("position_ids" if name == "positions" else name, value) for name, value in given.items()}
    node = graph.call_function(ops.attention, arrange_operands(ops.attention, held))
    node.meta |= {"val": Q, "layer": "layers.0.self_attn"}
    graph.output((node,))
    return Program("decoder", fx.GraphModule(nn.Module(), graph), ("y",))


CARRIED = {
    "window": {"window": 3}, "softcap": {"softcap": 0.7}, "bias": {"bias": floats(1, H, S, S)},
    "block_ids": {"block_ids": BLOCKS}, "positions": {"window": 3, "positions": PLACES},
}  # fmt: skip


@pytest.mark.parametrize("operand", list_optional(ops.attention))
def test_caches_carry_every_operand(operand: str) -> None:
    given = CARRIED[operand]
    program = decoder_of(**given)
    attached = attach_caches(program, "layers", [Segment("s0", 0, 1, S, C, 0)], B, fresh=True)
    (node,) = attached.graph.find_nodes(op="call_function", target=ops.cached_attention)
    operands = operands_of(node)
    for name, value in given.items():
        held = operands[name]
        assert held.meta["val"] is value if isinstance(value, Tensor) else held == value
    out = ops.cached_attention(*arrange_operands(ops.cached_attention, REQUIRED["fresh"][1] | given))[0]
    torch.testing.assert_close(out, ops.attention(Q, K, V, 0.3, True, **given))


def test_a_new_token_gets_every_operand_but_blocks() -> None:
    given = {"softcap": 0.7, "bias": floats(1, H, 1, C), "window": 3, "block_ids": BLOCKS, "positions": NEXT}
    segments = [Segment("s0", 0, 1, S, C, 0)]
    attached = attach_caches(decoder_of(**given), "layers", segments, B, fresh=False)
    (node,) = attached.graph.find_nodes(op="call_function", target=ops.cached_attention)
    operands = operands_of(node)
    assert (operands["softcap"], operands["window"], operands["block_ids"]) == (0.7, 3, None)
    assert (operands["bias"].name, operands["positions"].name) == ("bias", "position_ids")
    assert operands["past_positions"].name == "positions_s0"
    with pytest.raises(UserError, match=r"layer 0 adds a bias to attention, of 5 keys, where its cache has 8 slots"):
        attach_caches(decoder_of(bias=floats(1, H, S, S)), "layers", segments, B, fresh=False)
    with pytest.raises(UserError, match="layer 0 attends to tokens after its own"):
        attach_caches(decoder_of(causal=False), "layers", segments, B, fresh=True)


@pytest.mark.parametrize("operand", ["softcap", "bias"])
def test_scores_that_do_not_know_an_operand_say_so(operand: str) -> None:
    (node,) = decoder_of(**CARRIED[operand]).graph.find_nodes(op="call_function", target=ops.attention)
    with pytest.raises(
        UserError, match=rf"^layers.0.self_attn: a score does not know the {operand} of attention; choose"
    ):
        check_attention(node, ("softcap", "bias"), "a score")


@pytest.mark.parametrize("name", ["attention_mask", "s_aux", "position_bias"])
def test_what_a_model_gives_its_attention_is_read_or_refused(name: str) -> None:
    from secateur.compiler import attention

    given: dict[str, Any] = {"attention_mask": None, "scaling": 0.3, "dropout": 0.0, name: floats(S, S)}
    for function in (attention._attention_function, attention._packed_attention_function):
        with pytest.raises(UserError, match=f"^trace: Module gives its attention {name}, which the traced operator"):
            function(nn.Module(), Q, K, V, **given)


# -- engines --------------------------------------------------------------------------------------------------------


def halves(*shape: int) -> Tensor:
    return floats(*shape).half()


@pytest.mark.parametrize("operand", ["softcap", "bias"])
def test_tensorrt_builds_soft_caps_and_biases(operand: str, tmp_path: Path) -> None:
    """A tower, prefill and decode."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    from secateur.exporters.tensorrt import build_engine

    q, k, v, past = (
        halves(B, H, 16, 64),
        halves(B, SHARED, 16, 64),
        halves(B, SHARED, 16, 64),
        halves(B, SHARED, 24, 64),
    )
    one = {"q": q[:, :, :1].contiguous(), "k": k[:, :, :1].contiguous(), "v": v[:, :, :1].contiguous()}
    calls: dict[str, tuple[Any, dict[str, Any], int, int]] = {
        "tower": (ops.attention, {"q": q, "k": halves(*q.shape), "v": halves(*q.shape), "causal": False}, 16, 16),
        "prefill": (ops.attention, {"q": q, "k": k, "v": v, "causal": True}, 16, 16),
        "decode": (
            ops.cached_attention,
            {**one, "past_k": past, "past_v": past.clone(), "start": torch.tensor([16, 9]), "fresh": False},
            1,
            24,
        ),
    }
    for name, (operator, given, rows, keys) in calls.items():
        more = {"softcap": 30.0} if operand == "softcap" else {"bias": halves(1, H, rows, keys)}
        program, _, _ = build(operator, Call(arrange_operands(operator, {**given, "scale": 0.125, **more})))
        path = tmp_path / f"{name}.onnx"
        save_model(export_program(program, DIALECTS["tensorrt"], WeightLayout({}, b"", {})), path)
        assert build_engine(path, tmp_path / f"{name}.engine").bytes
