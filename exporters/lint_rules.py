"""What each backend trips over, as data: a function per rule, and the list of where each one holds.

A rule yields (what is wrong, what to do) for a node, or for the whole graph when it lists no operators.
The TensorRT rules were found by building graphs with TensorRT-RTX 1.7. What a rule calls silent passes the
parser and the builder there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

Problem = tuple[str, str]

TENSORRT = ("tensorrt", "tensorrt-rtx")
EVERY = ("onnxruntime", "plain", *TENSORRT)

TOPK_LIMIT = 3840

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_Q, _K, _MASK, _PAST_KEY, _PAST_VALUE, _NONPAD = 0, 1, 3, 4, 5, 6
"""Inputs of ONNX Attention."""


@dataclass(frozen=True)
class Subject:
    """The graph under the rules, and what it is meant for."""

    model: ir.Model
    target: str
    dtype: str
    sm: int | None


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


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dtype(node: ir.Node, index: int = 0) -> ir.DataType | None:
    value = _given(node, index)
    return value.dtype if value is not None else None


def _shape(node: ir.Node, index: int = 0) -> tuple[int, ...] | None:
    """Static sizes of an input, or None when any is unknown."""
    value = _given(node, index)
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None


def _flag(node: ir.Node, name: str, default: int = 0) -> int:
    return node.attributes.get_int(name, default) or 0


def _text(node: ir.Node, name: str, default: str) -> str:
    return node.attributes.get_string(name, default) or default


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
    """Only ONNX Runtime knows com.microsoft; TensorRT takes a plugin's domain when the node says so."""
    known = ["", "ai.onnx"] + (["com.microsoft"] if subject.target == "onnxruntime" else [])
    known += [function[0] for function in subject.model.functions]
    plugin = subject.target in TENSORRT and "plugin_namespace" in node.attributes
    if node.domain not in known and not plugin:
        yield (
            f"operator {node.domain}.{node.op_type} is unknown to {subject.target}",
            f"export with the dialect of {subject.target}",
        )


def operator_is_parsed(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if node.op_type in ("ReduceMax", "ReduceMin"):
        if _dtype(node) == ir.DataType.BOOL:
            yield f"TensorRT has no {node.op_type} over bool", "cast to int32 first"
    else:
        yield f"TensorRT has no {node.op_type}", "write it with static-shape operators (TopK, Where, Mul)"


# Attention


def attention_is_half(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if _dtype(node, _Q) == ir.DataType.FLOAT:
        yield "TensorRT has no fused attention in fp32", "cast q, k and v to fp16 or bf16"


def attention_has_one_output(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if len(node.outputs) > 1:
        yield "TensorRT allows one output of Attention", "write the caches with TensorScatter beside it"


def attention_has_no_past(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if _given(node, _PAST_KEY) is not None or _given(node, _PAST_VALUE) is not None:
        yield (
            "TensorRT takes no past_key or past_value",
            "write k and v into the caches with TensorScatter and attend to those",
        )


def attention_mask_is_explicit(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if _given(node, _NONPAD) is not None:
        yield (
            "TensorRT silently ignores nonpad_kv_seqlen: padding would be attended",
            "give a boolean mask [B,1,S,C] instead",
        )


def nonpad_excludes_past(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if _given(node, _NONPAD) is not None and _given(node, _PAST_KEY) is not None:
        yield "nonpad_kv_seqlen cannot be combined with past_key", "write the caches with TensorScatter"


def attention_keeps_backend_softmax(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if "softmax_precision" in node.attributes:
        yield "TensorRT rejects softmax_precision", "leave it out: the fused kernel accumulates in fp32"


def attention_has_no_softcap(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if node.attributes.get_float("softcap", 0.0):
        yield "TensorRT rejects a soft cap on Attention", "choose --target onnxruntime for this model"


def attention_masks_once(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if _flag(node, "is_causal") and _given(node, _MASK) is not None:
        yield "TensorRT rejects is_causal together with a mask", "put causality into the mask and drop is_causal"


def causal_attention_is_square(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """is_causal aligns the first query with the first key, so a decode step would see slot 0 only."""
    queries, keys = _shape(node, _Q), _shape(node, _K)
    if not _flag(node, "is_causal") or _given(node, _PAST_KEY) is not None or not queries or not keys:
        return
    if queries[-2] != keys[-2]:
        yield (
            f"is_causal over {queries[-2]} queries and {keys[-2]} keys silently hides the later keys",
            "drop is_causal and give a boolean mask [B,1,S,C]",
        )


# Caches


def cache_is_input_and_output(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    graph = subject.model.graph
    if not any(value is node.inputs[0] for value in graph.inputs):
        yield "the cache is not an input of the graph", "feed the graph input to TensorScatter with nothing between"
    if not any(value is node.outputs[0] for value in graph.outputs):
        yield "the updated cache is not an output of the graph", "make TensorScatter's own result a graph output"


def cache_is_linear(_: Subject, node: ir.Node) -> Iterator[Problem]:
    mode = _text(node, "mode", "linear")
    if mode != "linear":
        yield f"TensorRT writes caches in linear mode only, not {mode}", "use mode linear and check the slot"
    shape, axis = _shape(node), _flag(node, "axis", -2)
    if axis != -2 and (shape is None or axis != len(shape) - 2):
        yield f"TensorRT writes along axis -2 only, not {axis}", "lay the cache out as [B,H,C,d]"


# Precision


def norm_is_fp32(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT normalises and exponentiates in the dtype it is given; only RMS honours its stash_type."""
    if _dtype(node) not in _HALF:
        return
    if node.op_type == "RMSNormalization" and _flag(node, "stash_type", 1) == ir.DataType.FLOAT.value:
        return
    fix = "cast its input to fp32 and its result back"
    yield f"{node.op_type} runs in half precision", fix if node.op_type != "RMSNormalization" else "set stash_type to 1"


# Selection


def topk_is_within_limit(_: Subject, node: ir.Node) -> Iterator[Problem]:
    count = _constant(_given(node, 1))
    if count and count[0] > TOPK_LIMIT:
        yield (
            f"TopK of {count[0]}, TensorRT takes at most {TOPK_LIMIT}",
            "keep fewer tokens, or rank by counting comparisons",
        )


def arg_is_at_least_2d(_: Subject, node: ir.Node) -> Iterator[Problem]:
    shape = _shape(node)
    if shape is not None and len(shape) < 2:
        yield f"TensorRT needs two dimensions for {node.op_type}", "keep the group dimension: [G,N]"


def scatter_does_not_reduce(_: Subject, node: ir.Node) -> Iterator[Problem]:
    mode = _text(node, "reduction", "none")
    if mode != "none":
        yield f"TensorRT scatters without reduction, not {mode}", "write the sum as a product with a 0/1 matrix"


def scan_has_an_input(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if _flag(node, "num_scan_inputs") == 0:
        yield "a Scan without scan inputs crashes TensorRT's parser", "scan over a constant of length K"


def loop_has_a_condition(_: Subject, node: ir.Node) -> Iterator[Problem]:
    if _given(node, 1) is None:
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
    Rule(attention_is_half, TENSORRT, ("Attention",)),
    Rule(attention_has_one_output, TENSORRT, ("Attention",)),
    Rule(attention_has_no_past, TENSORRT, ("Attention",)),
    Rule(attention_mask_is_explicit, TENSORRT, ("Attention",)),
    Rule(nonpad_excludes_past, ("onnxruntime", "plain"), ("Attention",)),
    Rule(attention_keeps_backend_softmax, TENSORRT, ("Attention",)),
    Rule(attention_has_no_softcap, TENSORRT, ("Attention",)),
    Rule(attention_masks_once, TENSORRT, ("Attention",)),
    Rule(causal_attention_is_square, EVERY, ("Attention",)),
    Rule(cache_is_input_and_output, TENSORRT, ("TensorScatter",)),
    Rule(cache_is_linear, TENSORRT, ("TensorScatter",)),
    Rule(norm_is_fp32, TENSORRT, ("LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax")),
    Rule(topk_is_within_limit, TENSORRT, ("TopK",)),
    Rule(arg_is_at_least_2d, TENSORRT, ("ArgMax", "ArgMin")),
    Rule(scatter_does_not_reduce, TENSORRT, ("ScatterElements", "ScatterND")),
    Rule(scan_has_an_input, TENSORRT, ("Scan",)),
    Rule(loop_has_a_condition, TENSORRT, ("Loop",)),
)
