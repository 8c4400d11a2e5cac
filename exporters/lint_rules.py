"""What each backend trips over, as data: a function per rule, and the list of where each one holds.

A rule yields what is wrong and what to do, for a node or for the whole graph. The TensorRT rules were found by
building graphs with TensorRT-RTX 1.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from secateur.exporters import lint_attention as attention
from secateur.exporters.lint_subject import Problem, Subject, constant_of, dtype_of, given, int_of, shape_of, text_of

TENSORRT = ("tensorrt", "tensorrt-rtx")
EVERY = ("onnxruntime", "plain", *TENSORRT)

TOPK_LIMIT = 3840

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Rule:
    """``check`` over the nodes of type ``ops`` ('*' for all), for these ``targets``."""

    check: Callable[[Subject, ir.Node], Iterator[Problem]]
    targets: tuple[str, ...]
    ops: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.check.__name__


@dataclass(frozen=True)
class GraphRule:
    """``check`` once over the whole graph, for these ``targets``."""

    check: Callable[[Subject], Iterator[Problem]]
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.check.__name__


# The graph as a whole


def bf16_needs_kernels(subject: Subject) -> Iterator[Problem]:
    if subject.dtype == "bf16":
        yield "ONNX Runtime has no bf16 kernels on the CPU", "compile with --dtype fp32, or for a TensorRT target"


def bf16_needs_ampere(subject: Subject) -> Iterator[Problem]:
    if subject.dtype == "bf16" and subject.sm == 75:
        yield "GPUs of architecture 75 have no bf16", "compile with --dtype fp16"


def engine_is_not_fp32(subject: Subject) -> Iterator[Problem]:
    if subject.dtype == "fp32":
        yield "TensorRT has no fused attention in fp32", "compile with --dtype fp16 or bf16"


def inputs_are_static(subject: Subject) -> Iterator[Problem]:
    for value in subject.model.graph.inputs:
        if value.shape is None or not value.shape.is_static():
            yield f"input {value.name} has no static shape", "fix every size: an engine is built for one geometry"


# Every node


def operator_exists(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    """The operator must exist in the version of its domain that the graph imports."""
    from onnx import defs

    if node.domain not in ("", "ai.onnx"):
        return
    opset = subject.model.opset_imports.get("", 0)
    if defs.has(node.op_type, max_inclusive_version=opset, domain=""):
        return
    if not defs.has(node.op_type, domain=""):
        yield f"ONNX has no operator {node.op_type}", "lower it to standard operators first"
        return
    since = defs.get_schema(node.op_type, domain="").since_version
    yield f"{node.op_type} is not in opset {opset}", f"declare opset {since} or later"


def domain_is_known(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    """Only ONNX Runtime knows com.microsoft; TensorRT takes a plugin's domain when the node says so, TensorRT-RTX none
    that is compiled ahead of time."""
    known = ["", "ai.onnx"] + (["com.microsoft"] if subject.target == "onnxruntime" else [])
    known += [function[0] for function in subject.model.functions]
    takes = subject.target == "tensorrt" or (subject.target == "tensorrt-rtx" and not int_of(node, "aot"))
    plugin = takes and "plugin_namespace" in node.attributes
    if node.domain not in known and not plugin:
        yield (
            f"operator {node.domain}.{node.op_type} is unknown to {subject.target}",
            f"export with the dialect of {subject.target}",
        )


def operator_is_parsed(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if node.op_type in ("ReduceMax", "ReduceMin"):
        if dtype_of(node) == ir.DataType.BOOL:
            yield f"TensorRT has no {node.op_type} over bool", "cast to int32 first"
    else:
        yield f"TensorRT has no {node.op_type}", "write it with static-shape operators (TopK, Where, Mul)"


# Precision


def norm_is_fp32(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT normalises and exponentiates in the dtype it is given; only RMS honours its stash_type."""
    if dtype_of(node) not in _HALF:
        return
    if node.op_type == "RMSNormalization" and int_of(node, "stash_type", 1) == ir.DataType.FLOAT.value:
        return
    fix = "cast its input to fp32 and its result back"
    yield f"{node.op_type} runs in half precision", fix if node.op_type != "RMSNormalization" else "set stash_type to 1"


# Selection


def topk_is_within_limit(_: Subject, node: ir.Node) -> Iterator[Problem]:
    count = constant_of(given(node, 1))
    if count and count[0] > TOPK_LIMIT:
        yield (
            f"TopK of {count[0]}, TensorRT takes at most {TOPK_LIMIT}",
            "keep fewer tokens, or rank by counting comparisons",
        )


def arg_is_at_least_2d(_: Subject, node: ir.Node) -> Iterator[Problem]:
    shape = shape_of(node)
    if shape is not None and len(shape) < 2:
        yield f"TensorRT needs two dimensions for {node.op_type}", "keep the group dimension: [G,N]"


def scatter_does_not_reduce(_: Subject, node: ir.Node) -> Iterator[Problem]:
    mode = text_of(node, "reduction", "none")
    if mode != "none":
        yield f"TensorRT scatters without reduction, not {mode}", "write the sum as a product with a 0/1 matrix"


def scatter_fits_its_data(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """ONNX lets several indices hit one place; TensorRT wants room for each of them."""
    data, indices = shape_of(node, 0), shape_of(node, 1)
    if data and indices and any(count > room for count, room in zip(indices, data, strict=True)):
        yield (
            f"TensorRT scatters at most as many values as there are places, not {list(indices)} into {list(data)}",
            "scatter into a longer tensor and slice it",
        )


def scan_has_an_input(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if int_of(node, "num_scan_inputs") == 0:
        yield "a Scan without scan inputs crashes TensorRT's parser", "scan over a constant of length K"


def loop_has_a_condition(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if given(node, 1) is None:
        yield "TensorRT needs Loop's condition input", "give the constant true, or write a Scan"


GRAPH_RULES = (
    GraphRule(bf16_needs_kernels, ("onnxruntime",)),
    GraphRule(bf16_needs_ampere, TENSORRT),
    GraphRule(engine_is_not_fp32, TENSORRT),
    GraphRule(inputs_are_static, TENSORRT),
)

NODE_RULES = (
    Rule(operator_exists, EVERY, ("*",)),
    Rule(domain_is_known, EVERY, ("*",)),
    Rule(operator_is_parsed, TENSORRT, ("BitShift", "NonZero", "ReduceMax", "ReduceMin", "Unique")),
    Rule(attention.attention_is_half, TENSORRT, ("Attention",)),
    Rule(attention.attention_has_a_kernel, TENSORRT, ("Attention",)),
    Rule(attention.attention_has_one_output, TENSORRT, ("Attention",)),
    Rule(attention.attention_has_no_past, TENSORRT, ("Attention",)),
    Rule(attention.attention_mask_is_explicit, TENSORRT, ("Attention",)),
    Rule(attention.nonpad_excludes_past, ("onnxruntime", "plain"), ("Attention",)),
    Rule(attention.attention_keeps_backend_softmax, TENSORRT, ("Attention",)),
    Rule(attention.attention_has_no_softcap, TENSORRT, ("Attention",)),
    Rule(attention.attention_masks_once, TENSORRT, ("Attention",)),
    Rule(attention.causal_attention_is_square, EVERY, ("Attention",)),
    Rule(attention.cache_is_input_and_output, TENSORRT, ("TensorScatter",)),
    Rule(attention.cache_is_linear, TENSORRT, ("TensorScatter",)),
    Rule(norm_is_fp32, TENSORRT, ("LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax")),
    Rule(topk_is_within_limit, TENSORRT, ("TopK",)),
    Rule(arg_is_at_least_2d, TENSORRT, ("ArgMax", "ArgMin")),
    Rule(scatter_does_not_reduce, TENSORRT, ("ScatterElements", "ScatterND")),
    Rule(scatter_fits_its_data, TENSORRT, ("ScatterElements",)),
    Rule(scan_has_an_input, TENSORRT, ("Scan",)),
    Rule(loop_has_a_condition, TENSORRT, ("Loop",)),
)
