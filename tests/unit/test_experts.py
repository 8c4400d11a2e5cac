"""Mixture-of-experts layers as one node each: what it computes, where it stands, what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateur.compiler import ops
from secateur.compiler.attention import ATTENTION, register_attention
from secateur.compiler.experts import use_experts
from secateur.compiler.flops import count_flops
from secateur.compiler.function import trace_function
from secateur.compiler.meta_model import compute_buffers
from secateur.compiler.program import Program
from secateur.runtime.errors import UserError

from .tiny_experts import BLOCKS, HIDDEN, LOADS, TEXT, WIDTH, draw, make_block


def experts_of(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is ops.experts]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 8, 2), (5, 8, 8), (40, 16, 3), (40, 4, 1)])
def test_the_operator_equals_transformers(tokens: int, experts: int, chosen: int, load: str) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    config = Qwen3MoeConfig(**TEXT | {"num_experts": experts, "num_experts_per_tok": chosen})
    config._experts_implementation = "eager"
    x, indices, weights, gate_up, down = draw(tokens, experts, chosen, load)
    module = Qwen3MoeExperts(config)
    with torch.no_grad():
        module.gate_up_proj.copy_(gate_up)
        module.down_proj.copy_(down)
        expected = module(x, indices, weights)
    hit = len(indices.unique())
    assert hit == chosen if load == "one" else hit > 0  # experts without tokens, and with all of them
    torch.testing.assert_close(ops.experts(x, indices, weights, gate_up, down), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_one_node_that_follows_the_length(name: str) -> None:
    block, _ = make_block(name)
    hidden = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block(hidden)
    use_experts(block)
    length = torch.export.Dim("s", min=2, max=1 << 20)
    program = trace_function(
        "block", lambda hidden: block(hidden), {"hidden": hidden}, ("out",), {"mlp": block}, {"hidden": {1: length}}
    )
    (node,) = experts_of(program)
    stacked = [argument.meta["weight"] for argument in node.args[3:]]
    assert stacked == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert node.meta["layer"] == "mlp.experts"
    torch.testing.assert_close(program.module(hidden)[0], expected)
    longer = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(program.module(longer)[0], block(longer))


def test_a_decoder_has_one_node_in_each_sparse_layer() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeModel

    register_attention()
    config = Qwen3MoeConfig(**TEXT | {"num_hidden_layers": 4}, mlp_only_layers=[1])
    with torch.device("meta"):
        model = Qwen3MoeModel._from_config(config, attn_implementation=ATTENTION).eval()
        use_experts(model)
        hidden, ids = torch.empty(2, 19, WIDTH), torch.zeros(2, 19, dtype=torch.int64)
    length = torch.export.Dim("s", min=2, max=1 << 20)

    def run(hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=hidden, position_ids=position_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    buffers = {f"model.{name}": buffer for name, buffer in compute_buffers(model).items()}
    program = trace_function(
        "decoder", run, {"hidden": hidden, "position_ids": ids}, ("hidden",), {"model": model},
        {"hidden": {1: length}, "position_ids": {1: length}}, buffers,
    )  # fmt: skip
    assert [node.meta["layer"] for node in experts_of(program)] == [f"model.layers.{i}.mlp.experts" for i in (0, 2, 3)]


def test_flops_are_those_of_the_chosen_experts() -> None:
    feed = dict(zip(("x", "indices", "weights", "gate_up", "down"), draw(10, 8, 2, "even"), strict=True))
    program = trace_function("experts", lambda *feed: ops.experts(*feed), feed, ("out",))
    assert count_flops(program) == 2 * 10 * 2 * 3 * WIDTH * HIDDEN


def test_experts_of_another_form_are_refused() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    biased: Any = GptOssExperts(GptOssConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=4))
    gelu: Any = Qwen3MoeExperts(Qwen3MoeConfig(**TEXT, hidden_act="gelu"))
    x, indices, weights, *_ = draw(3, 4, 2, "even")
    for module, told in (
        (biased, "has_bias is True, is_transposed is True, is_concatenated is False, it has a gate of its own"),
        (gelu, "its activation is GELUActivation"),
    ):
        use_experts(module)
        with pytest.raises(UserError) as caught:
            module(x, indices, weights)
        where = type(module).__name__
        assert str(caught.value).startswith(f"{where}: experts of a form that cannot be compiled: {told}")
        assert "down(silu(gate(x)) * up(x))" in str(caught.value)


def test_a_model_without_experts_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.SiLU())
    use_experts(model)
    assert [type(module) for module in model] == [nn.Linear, nn.SiLU]
