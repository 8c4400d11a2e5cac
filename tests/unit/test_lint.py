"""The linter: each rule on the smallest graph that breaks it, and the same graph put right."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from secateur.exporters.lint import Finding, lint_graph, refuse
from secateur.exporters.lint_rules import EVERY, GRAPH_RULES, NODE_RULES
from secateur.runtime.errors import UserError

from .lint_traps import ATTENTION, ATTENTION_SHAPES, BROKEN, Y, attend, graph

EVERYWHERE = {rule.name for rule in NODE_RULES if rule.targets == EVERY}


def rules(model: ir.Model, target: str = "tensorrt-rtx", dtype: str = "fp16", sm: int | None = 89) -> list[str]:
    return [finding.rule for finding in lint_graph(model, target, dtype, sm)]


@pytest.mark.parametrize("rule", BROKEN)
def test_breaking_one_rule_gives_one_finding(rule: str) -> None:
    assert rules(graph(*BROKEN[rule])) == [rule]


@pytest.mark.parametrize("rule", sorted(set(BROKEN) - EVERYWHERE))
def test_tensorrt_rules_leave_other_targets_alone(rule: str) -> None:
    assert rules(graph(*BROKEN[rule]), target="onnxruntime", dtype="fp32", sm=None) == []


def test_every_rule_is_tested() -> None:
    elsewhere = {
        "bf16_has_a_cuda_kernel", "bf16_needs_ampere", "bf16_needs_kernels", "domain_is_known", "nonpad_excludes_past",
        "operator_exists", "weights_are_in_reach",
    }  # fmt: skip
    assert {rule.name for rule in (*NODE_RULES, *GRAPH_RULES)} == set(BROKEN) | elsewhere


def test_the_tensorrt_dialect_passes() -> None:
    model = graph(
        "float16[1,4,1,64] q, float16[1,2,1,64] k, float16[1,2,1,64] v, float16[1,1,32] cos, float16[1,1,32] sin,"
        " float16[1,2,8,64] ck, float16[1,2,8,64] cv, int64[1] slot, bool[1,1,1,8] m, float16[64] w",
        "float16[1,4,1,64] y, float16[1,2,8,64] pk, float16[1,2,8,64] pv",
        "r = RotaryEmbedding (q, cos, sin) n = RMSNormalization <stash_type=1> (r, w)"
        " pk = TensorScatter (ck, k, slot) pv = TensorScatter <axis=2> (cv, v, slot)"
        " y = Attention <scale=0.125> (n, pk, pv, m)",
    )
    assert lint_graph(model, "tensorrt-rtx", "fp16", 89) == []
    assert lint_graph(model, "tensorrt", "bf16") == []


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_attention_shapes(shape: tuple[int, ...]) -> None:
    assert rules(attend(shape)) == ([] if ATTENTION_SHAPES[shape] else ["attention_has_a_kernel"])


def test_half_precision_norms() -> None:
    softmax = graph("float16[2,8] x", "float16[2,8] y", "y = Softmax (x)")
    assert rules(softmax) == ["norm_is_fp32"]
    rms = graph("float16[2,8] x, float16[8] w", "float16[2,8] y", "y = RMSNormalization <stash_type=10> (x, w)")
    (finding,) = lint_graph(rms, "tensorrt-rtx", "fp16")
    assert finding.fix == "set stash_type to 1"
    around = "a = Cast <to=1> (x) b = Softmax (a) y = Cast <to=10> (b)"
    assert rules(graph("float16[2,8] x", "float16[2,8] y", around)) == []


def test_cache_layout() -> None:
    inputs, outputs = "float16[1,8,2,64] c, float16[1,1,2,64] u, int64[1] s", "float16[1,8,2,64] p"
    assert rules(graph(inputs, outputs, "p = TensorScatter <axis=1> (c, u, s)")) == ["cache_is_linear"]


def test_bf16_on_cuda() -> None:
    pad = graph("bfloat16[2,8] x", "bfloat16[3,8] y", "p = Constant <value_ints=[0,0,1,0]> () y = Pad (x, p)")
    assert rules(pad, "onnxruntime-cuda", "bf16", None) == ["bf16_has_a_cuda_kernel"]
    assert rules(pad, "tensorrt-rtx", "bf16") == []
    wide = graph("float[2,8] x", "float[3,8] y", "p = Constant <value_ints=[0,0,1,0]> () y = Pad (x, p)")
    assert rules(wide, "onnxruntime-cuda", "bf16", None) == []


def test_limits_themselves_are_allowed() -> None:
    body = "k = Constant <value_ints=[3840]> () v, i = TopK (x, k)"
    assert rules(graph("float[1,5000] x", "float[1,3840] v, int64[1,3840] i", body)) == []
    assert rules(graph(ATTENTION, Y, "y = Attention <is_causal=1> (q, k, v)")) == []


def test_rules_reach_into_loop_bodies() -> None:
    body = (
        "y, z = Scan <num_scan_inputs=1, body = b (float[8] s, float[8] e) => (float[8] t, int64[1] j)"
        " { t = Neg (s) j = ArgMax <axis=0> (e) }> (x, steps)"
    )
    model = graph("float[8] x, float[3,8] steps", "float[8] y, int64[3,1] z", body)
    (finding,) = lint_graph(model, "tensorrt-rtx", "fp16")
    assert (finding.rule, finding.node) == ("arg_is_at_least_2d", "j (ArgMax)")


def test_operators_must_exist_in_the_opset() -> None:
    old = graph("float[2,8] x, float[8] w", "float[2,8] y", "y = RMSNormalization (x, w)", opset=22)
    (finding,) = lint_graph(old, "plain", "fp32")
    assert str(finding) == (
        "y (RMSNormalization): RMSNormalization is not in opset 22; declare opset 23 or later [operator_exists]"
    )
    made_up = graph("float[2] x", "float[2] y", "y = Frobnicate (x)")
    assert rules(made_up, target="plain") == ["operator_exists"]


def test_domains_belong_to_their_backend() -> None:
    model = graph("float[2] x", "float[2] y", "y = com.microsoft.QuickGelu (x)", domains=', "com.microsoft" : 1')
    assert rules(model, target="onnxruntime", dtype="fp32") == []
    assert rules(model, target="plain", dtype="fp32") == ["domain_is_known"]
    assert rules(model) == ["domain_is_known"]
    plugin = 'y = secateur.Rank <plugin_namespace="secateur"> (x)'
    assert rules(graph("float[2] x", "float[2] y", plugin, domains=', "secateur" : 1')) == []


def test_nonpad_lengths_exclude_past_caches() -> None:
    inputs = ATTENTION + ", float16[1,2,8,64] a, float16[1,2,8,64] b, int64[1] n"
    model = graph(inputs, Y, "y = Attention (q, k, v, , a, b, n)")
    assert rules(model, target="plain") == ["nonpad_excludes_past"]


def test_dtypes_of_targets() -> None:
    model = graph("float[2] x", "float[2] y", "y = Neg (x)")
    assert rules(model, "tensorrt-rtx", "bf16", 75) == ["bf16_needs_ampere"]
    assert rules(model, "tensorrt-rtx", "bf16", 80) == []
    assert rules(model, "onnxruntime", "bf16", None) == ["bf16_needs_kernels"]
    assert rules(model, "onnxruntime", "fp32", None) == []


def test_refuse_names_the_node_and_the_fix() -> None:
    refuse([])
    broken = Finding("topk_is_within_limit", "rank (TopK)", "TopK of 5000, TensorRT takes at most 3840", "keep fewer")
    with pytest.raises(UserError) as caught:
        refuse([broken, broken, broken], where="prefill.onnx")
    assert str(caught.value) == (
        "prefill.onnx: rank (TopK): TopK of 5000, TensorRT takes at most 3840 (and 2 more); "
        "keep fewer [topk_is_within_limit]"
    )
    risk = Finding("sum_fits_half", "n (ReduceSum)", "a sum in fp16 may leave its range", "cast it", "risk")
    with pytest.raises(UserError, match=r"^prefill\.onnx: rank \(TopK\): TopK of 5000, [^(]*; keep fewer"):
        refuse([risk, broken], where="prefill.onnx")
    with pytest.raises(UserError, match=r"^graph too big; shrink it \[size\]$"):
        refuse([Finding("size", None, "graph too big", "shrink it")])


def test_what_does_not_stop_is_a_warning() -> None:
    """Which conftest.py turns into an error here."""
    risk = Finding("sum_fits_half", "n (ReduceSum)", "a sum in fp16 may leave its range", "cast it", "risk")
    with pytest.raises(AssertionError, match=r"prefill\.onnx: n \(ReduceSum\): a sum in fp16 .*; cast it \[sum_fits"):
        refuse([risk], where="prefill.onnx")
