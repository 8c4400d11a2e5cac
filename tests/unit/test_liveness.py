"""The peak of intermediate results, against sums by hand. A ``float[1,256]`` is 1 KiB."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from secateur.exporters.liveness import peak_bytes

HEAD = '<ir_version: 10, opset_import: ["" : 23]> '
KIB = 1024


def peak(text: str, materializes: bool = False) -> int:
    model = ir.from_onnx_text(HEAD + text)
    return peak_bytes(ir.passes.common.ShapeInferencePass()(model).model.graph, materializes)


def test_a_chain_holds_what_is_read_and_what_is_made() -> None:
    # a is made of the input, b of a, and y lies in the output's buffer: a and b together.
    assert peak("g (float[1,256] x) => (float[1,256] y) { a = Ceil(x) b = Ceil(a) y = Ceil(b) }") == 2 * KIB


def test_what_is_read_late_stays() -> None:
    # While c is made of b, a waits for the last node.
    assert (
        peak("g (float[1,256] x) => (float[1,256] y) { a = Ceil(x) b = Ceil(a) c = Ceil(b) y = Add(a, c) }") == 3 * KIB
    )


def test_element_wise_results_take_the_place_of_an_operand() -> None:
    # b could not, a is still read; c takes b's place.
    text = "g (float[1,256] x) => (float[1,256] y) { a = Ceil(x) b = Exp(a) c = Mul(a, b) d = Neg(c) y = Ceil(d) }"
    assert peak(text) == 2 * KIB
    # Of half its size it has a place of its own.
    wide = "g (float[1,256] x, float[4,256] w) => (float[4,256] y) { a = Ceil(x) b = Add(a, w) y = Ceil(b) }"
    assert peak(wide) == (1 + 4) * KIB


def test_views_take_nothing_and_keep_what_they_view() -> None:
    text = """g (float[1,256] x, int64[2] s) => (float[256,1] y)
    { a = Ceil(x) v = Reshape(a, s) b = Ceil(x) c = Ceil(b) d = Ceil(v) e = Ceil(c) y = Reshape(d, s) }"""
    model = ir.from_onnx_text(HEAD + text)
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.dtype = ir.Shape((1, 256)), ir.DataType.FLOAT
    # a, b and c while c is made: v needs a. A view of the input needs nothing.
    assert peak_bytes(model.graph, False) == 3 * KIB
    only = ir.from_onnx_text(HEAD + "g (float[1,256] x) => (float[1,256] y) { v = Identity(x) y = Ceil(v) }")
    assert peak_bytes(ir.passes.common.ShapeInferencePass()(only).model.graph, False) == 0


@pytest.mark.parametrize("rows", [1, 8])
def test_attention_is_fused_or_writes_its_products_out(rows: int) -> None:
    text = f"""g (float[2,4,{rows},16] q, float[2,2,32,16] k, float[2,2,32,16] v) => (float[2,4,{rows},16] y)
    {{ a = Attention(q, k, v) y = Ceil(a) }}"""
    made = 4 * 2 * 4 * rows * 16
    assert peak(text) == made
    assert peak(text, materializes=True) == made + 4 * 2 * (4 + 1) * rows * 32


def test_a_loop_holds_its_bodys_peak_and_what_it_reads_around_it() -> None:
    text = """g (float[256] start, float[8,256] steps) => (float[256] y, float[8,256] all)
    { a = Ceil(start)
      b = Ceil(start)
      y, all = Scan <num_scan_inputs = 1, body = step (float[256] s, float[256] x) => (float[256] t, float[256] o)
        { c = Ceil(s) d = Add(c, a) t = Ceil(d) o = Ceil(x) }> (b, steps) }"""
    model = ir.from_onnx_text(HEAD + text)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.shape is None:
                value.shape, value.dtype = ir.Shape((256,)), ir.DataType.FLOAT
    # a and b around it, four ports of the body, and c, whose place d takes.
    assert peak_bytes(model.graph, False) == (2 + 4 + 1) * KIB
