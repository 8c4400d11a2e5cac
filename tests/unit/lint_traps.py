"""For each rule of the linter the smallest graph that breaks it and no other: inputs, outputs, nodes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

ATTENTION = "float16[1,4,8,64] q, float16[1,2,8,64] k, float16[1,2,8,64] v"
Y = "float16[1,4,8,64] y"
CACHE = "float16[1,2,8,64] c, float16[1,2,1,64] u, int64[1] s"


def graph(inputs: str, outputs: str, body: str, opset: int = 24, domains: str = "") -> ir.Model:
    imports = f'"" : {opset}' + domains
    text = f"<ir_version: 11, opset_import: [{imports}]> g ({inputs}) => ({outputs}) {{ {body} }}"
    model = ir.from_onnx_text(text)
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return model


BROKEN = {
    "attention_is_half": (
        "float[1,4,8,64] q, float[1,2,8,64] k, float[1,2,8,64] v", "float[1,4,8,64] y",
        "y = Attention <is_causal=1> (q, k, v)",
    ),
    "attention_has_a_kernel": (
        "float16[1,3,1,64] q, float16[1,1,8,64] k, float16[1,1,8,64] v, bool[1,1,1,8] m", "float16[1,3,1,64] y",
        "y = Attention (q, k, v, m)",
    ),
    "attention_keys_are_not_its_queries": ("float16[1,4,8,64] q", Y, "y = Attention <is_causal=1> (q, q, q)"),
    "attention_has_one_output": (
        ATTENTION, Y + ", float16[1,2,8,64] pk", "y, pk = Attention <is_causal=1> (q, k, v)",
    ),
    "attention_has_no_past": (
        ATTENTION + ", float16[1,2,8,64] a, float16[1,2,8,64] b", Y, "y = Attention (q, k, v, , a, b)",
    ),
    "attention_mask_is_explicit": (
        ATTENTION + ", int64[1] n", Y, "y = Attention (q, k, v, , , , n)",
    ),
    "attention_keeps_backend_softmax": (
        ATTENTION, Y, "y = Attention <is_causal=1, softmax_precision=1> (q, k, v)",
    ),
    "attention_has_no_softcap": (
        ATTENTION, Y, "y = Attention <is_causal=1, softcap=30.0> (q, k, v)",
    ),
    "attention_masks_once": (
        ATTENTION + ", bool[1,1,8,8] m", Y, "y = Attention <is_causal=1> (q, k, v, m)",
    ),
    "causal_attention_is_square": (
        "float16[1,4,1,64] q, float16[1,2,8,64] k, float16[1,2,8,64] v", "float16[1,4,1,64] y",
        "y = Attention <is_causal=1> (q, k, v)",
    ),
    "cache_is_linear": (
        CACHE, "float16[1,2,8,64] p",
        'p = TensorScatter <mode="circular"> (c, u, s)',
    ),
    "cache_is_input_and_output": (
        CACHE, "float16[1,2,8,64] p",
        "t = TensorScatter (c, u, s) p = Identity (t)",
    ),
    "norm_is_fp32": (
        "float16[2,8] x, float16[8] w", "float16[2,8] y", "y = LayerNormalization (x, w)",
    ),
    "topk_is_within_limit": (
        "float[1,5000] x", "float[1,3841] v, int64[1,3841] i", "k = Constant <value_ints=[3841]> () v, i = TopK (x, k)",
    ),
    "arg_is_at_least_2d": ("float[8] x", "int64[1] y", "y = ArgMax <axis=0> (x)"),
    "scatter_does_not_reduce": (
        "float[2,8] x, int64[2,3] i, float[2,3] u", "float[2,8] y",
        'y = ScatterElements <axis=1, reduction="add"> (x, i, u)',
    ),
    "scatter_fits_its_data": (
        "int64[2,3] x, int64[2,8] i, int64[2,8] u", "int64[2,3] y", "y = ScatterElements <axis=1> (x, i, u)",
    ),
    "scan_has_an_input": (
        "float[2,8] x", "float[2,8] y",
        "y = Scan <num_scan_inputs=0, body = b (float[2,8] s) => (float[2,8] t) { t = Neg (s) }> (x)",
    ),
    "loop_has_a_condition": (
        "float[2,8] x, int64 n", "float[2,8] y",
        "y = Loop <body = b (int64 i, bool c, float[2,8] s) => (bool d, float[2,8] t) { d = Identity (c) t = Neg (s) }>"
        " (n, , x)",
    ),
    "loop_stands_without_attention": (
        ATTENTION + ", float[2,8] x, float[16,8] rows", Y + ", float[2,8] z",
        "y = Attention <is_causal=1> (q, k, v) z = Scan <num_scan_inputs=1, body = b (float[2,8] s, float[8] r)"
        " => (float[2,8] t) { t = Min (s, r) }> (x, rows)",
    ),
    "operator_is_parsed": ("int32[2,8] x", "int32[2,8] y", "y = BitwiseNot (x)"),
    "product_is_of_floats": ("int64[8,8] x", "int64[8,8] y", "y = MatMul (x, x)"),
    "sizes_are_fixed": ("float[2,8] x, int64[2] size", "float[n,m] y", "y = Reshape (x, size)"),
    "ports_have_engine_types": ("int16[2,8] x", "int64[2,8] y", "y = Cast <to=7> (x)"),
    "ports_keep_their_width": ("double[2,8] x", "float[2,8] y", "y = Cast <to=1> (x)"),
    "cache_is_written_once": (
        CACHE, "float16[1,2,8,64] p, float16[1,2,8,64] q", "p = TensorScatter (c, u, s) q = TensorScatter (c, u, s)",
    ),
    "cache_is_read_behind_its_update": (
        CACHE, "float16[1,2,8,64] p, float16[1,2,8,64] y", "p = TensorScatter (c, u, s) y = Neg (c)",
    ),
    "cache_does_not_grow": (
        "float16[1,2,8,64] c, float16[1,2,1,64] u", "float16[1,2,9,64] p", "p = Concat <axis=2> (c, u)",
    ),
    "sum_fits_half": (
        "float16[2,8] x", "float16[2,1] y",
        "axis = Constant <value_ints=[1]> () squares = Mul (x, x) y = ReduceSum (squares, axis)",
    ),
    "constant_fits_half": (
        "float16[2,8] scores", "float16[2,8] y",
        "big = Constant <value_float=-1e9> () fill = Cast <to=10> (big) y = Add (scores, fill)",
    ),
    "scores_are_fp32": (
        "float16[1,4,8,64] q, float16[1,4,64,8] k", "float[1,4,8,8] y",
        "wide = Constant <value_float=0.125> () scale = Cast <to=10> (wide) a = MatMul (q, k) b = Mul (a, scale)"
        " c = Cast <to=1> (b) y = Softmax (c)",
    ),
    "norm_is_one_node": (
        "float[2,8] x, float[8] w", "float[2,8] y",
        "eps = Constant <value_float=1e-6> () axis = Constant <value_ints=[-1]> () two = Constant <value_float=2.0> ()"
        " square = Pow (x, two) mean = ReduceMean (square, axis) more = Add (mean, eps) root = Sqrt (more)"
        " scale = Reciprocal (root) normed = Mul (x, scale) y = Mul (w, normed)",
    ),
    "rotary_is_one_node": (
        "float16[1,4,8,64] x, float16[1,1,8,64] cos, float16[1,1,8,64] sin", "float16[1,4,8,64] y",
        "zero = Constant <value_ints=[0]> () half = Constant <value_ints=[32]> () end = Constant <value_ints=[64]> ()"
        " axis = Constant <value_ints=[3]> () low = Slice (x, zero, half, axis) high = Slice (x, half, end, axis)"
        " turned = Neg (high) halves = Concat <axis=3> (turned, low) a = Mul (x, cos) b = Mul (halves, sin)"
        " y = Add (a, b)",
    ),
    "inputs_are_static": ("float16[n,8] x", "float16[n,8] y", "y = Neg (x)"),
}  # fmt: skip


def attend(shape: tuple[int, ...]) -> ir.Model:
    """Attention of ``batch, heads, rows, keys, size, masked``, all of whose heads share keys."""
    batch, heads, rows, keys, size, masked = shape
    inputs = f"float16[{batch},{heads},{rows},{size}] q, float16[{batch},1,{keys},{size}] k"
    mask, body = (f", bool[1,1,{rows},{keys}] m", "(q, k, k, m)") if masked else ("", "(q, k, k)")
    return graph(inputs + mask, f"float16[{batch},{heads},{rows},{size}] y", f"y = Attention {body}")


ATTENTION_SHAPES = {
    (1, 3, 1, 260, 64, True): False,
    (2, 3, 1, 260, 64, True): True,
    (1, 4, 1, 260, 64, True): True,
    (4, 1, 1, 260, 64, True): True,
    (1, 1, 1, 260, 64, False): False,
    (1, 3, 2, 260, 64, True): True,
    (1, 4, 1, 24512, 64, True): True,
    (1, 4, 1, 24513, 64, True): False,
    (1, 4, 1, 24512, 128, False): False,
    (1, 4, 2, 40000, 64, True): True,
    (1, 4, 1, 260, 8, True): True,
    (1, 4, 1, 260, 100, True): False,
    (1, 4, 64, 64, 8, False): False,
    (1, 4, 64, 64, 100, False): True,
    (1, 4, 64, 64, 100, True): False,
    (1, 4, 64, 64, 256, True): True,
    (1, 4, 64, 64, 264, False): False,
    (1, 1, 8, 8, 64, False): False,
    (1, 1, 257, 257, 64, True): False,
    (2, 1, 257, 257, 64, False): True,
    (2, 1, 257, 257, 64, True): False,
    (2, 1, 2, 64, 64, False): True,
    (1, 2, 257, 257, 64, True): True,
    (1, 1, 4096, 4095, 64, False): False,
    (1, 1, 4096, 4096, 64, False): True,
    (2, 1, 4096, 2048, 64, True): True,
}
"""Whether TensorRT has a kernel for it."""
