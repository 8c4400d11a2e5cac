"""Rules about operators: which exist, which a backend's parser takes, and with what arguments.

A rule yields what is wrong and what to do, for one node.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from secateur.exporters.lint_subject import Problem, Subject, constant_of, dtype_of, given, int_of, shape_of, text_of

TENSORRT = ("tensorrt", "tensorrt-rtx")

TOPK_LIMIT = 3840

UNROLLED = 15
"""Steps of a loop up to which TensorRT-RTX unrolls it."""

UNPARSED = (
    "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "CenterCropPad", "Col2Im", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT", "DeformConv", "Det",
    "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix",
    "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement", "QLinearConv",
    "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer",
)  # fmt: skip
"""Standard operators without an importer, as its parser tells them, but for those of ``sizes_are_fixed``."""

_WHOLE = (
    ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16,
    ir.DataType.UINT32, ir.DataType.UINT64,
)  # fmt: skip


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
    """Only ONNX Runtime knows com.microsoft; TensorRT takes a plugin's domain when the node says so, TensorRT-RTX
    unless it is compiled ahead of time."""
    known = ["", "ai.onnx"] + (["com.microsoft"] if subject.target.startswith("onnxruntime") else [])
    known += [function[0] for function in subject.model.functions]
    takes = subject.target == "tensorrt" or (subject.target == "tensorrt-rtx" and not int_of(node, "aot"))
    plugin = takes and "plugin_namespace" in node.attributes
    if node.domain not in known and not plugin:
        yield (
            f"operator {node.domain}.{node.op_type} is unknown to {subject.target}",
            f"export with the dialect of {subject.target}",
        )


def operator_is_parsed(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """Operators that TensorRT's parser does not know, and ReduceMax and ReduceMin over bool."""
    if node.op_type not in ("ReduceMax", "ReduceMin"):
        yield f"TensorRT has no {node.op_type}", "write it with static-shape operators (TopK, Where, Mul)"
    elif dtype_of(node) == ir.DataType.BOOL:
        yield f"TensorRT has no {node.op_type} over bool", "cast to int32 first"


def product_is_of_floats(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT multiplies no matrices of integers, and takes no L2 norm or log-sum-exp of them."""
    kind = dtype_of(node)
    if kind in _WHOLE:
        yield f"TensorRT has no {node.op_type} over {str(kind).lower()}", "cast to fp32 first, and the result back"


def topk_is_within_limit(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT's TopK gives at most 3,840 entries."""
    count = constant_of(given(node, 1))
    if count and count[0] > TOPK_LIMIT:
        yield (
            f"TopK of {count[0]}, TensorRT takes at most {TOPK_LIMIT}",
            "sort runs of at most that many and merge them, as the tensorrt dialect does",
        )


def arg_is_at_least_2d(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT's ArgMax and ArgMin need two dimensions."""
    shape = shape_of(node)
    if shape is not None and len(shape) < 2:
        yield f"TensorRT needs two dimensions for {node.op_type}", "keep the group dimension: [G,N]"


def scatter_does_not_reduce(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT scatters without adding, multiplying or comparing."""
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
    """A Scan over nothing crashes TensorRT's parser."""
    if int_of(node, "num_scan_inputs") == 0:
        yield "a Scan without scan inputs crashes TensorRT's parser", "scan over a constant of length K"


def loop_has_a_condition(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT needs the input of Loop that ONNX leaves open."""
    if given(node, 1) is None:
        yield "TensorRT needs Loop's condition input", "give the constant true, or write a Scan"


def loop_stands_without_attention(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    """A loop that TensorRT does not unroll breaks its builder where attention is fused, wherever the two stand."""
    if node.op_type == "Scan":
        feed, axes = shape_of(node, len(node.inputs) - 1), node.attributes.get("scan_input_axes")
        steps = None if feed is None else feed[axes.as_ints()[-1] if axes is not None else 0]
    else:
        trip = constant_of(given(node, 0))
        steps = None if trip is None else trip[0]
    if steps is not None and steps <= UNROLLED:
        return
    if any(other.op_type == "Attention" for other in subject.model.graph.all_nodes()):
        yield (
            f"TensorRT fails or crashes over a loop of more than {UNROLLED} steps beside Attention",
            "write out the steps, as the tensorrt dialect does",
        )
