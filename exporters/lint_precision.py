"""Rules about number formats: which a backend has, and what half precision cannot hold.

TensorRT is strongly typed: what a graph has in fp16 is computed and stored in fp16.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from secateur.exporters.lint_subject import Problem, Subject, dtype_of, given, int_of, made_by, numbers_of

HALF_MAX = 65504.0
"""The largest fp16 number."""

SUMS = (
    "CumSum", "Exp", "Pow", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum",
    "ReduceSumSquare",
)  # fmt: skip

NO_BF16_ON_CUDA = (
    "Clip", "Cos", "CumSum", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log", "LogSoftmax", "Pad",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "Round", "Sin", "TopK",
)  # fmt: skip
"""As onnxruntime's own list of kernels (docs/OperatorKernels.md) has them, of those our graphs may hold."""

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ISLAND = "cast its input to fp32 and its result back"
_TOWARDS_SOFTMAX = ("Add", "Cast", "Div", "Expand", "Identity", "Mul", "Reshape", "Sub", "Transpose", "Unsqueeze")


def bf16_needs_kernels(subject: Subject) -> Iterator[Problem]:
    """ONNX Runtime on the CPU computes no bf16."""
    if subject.dtype == "bf16":
        yield "ONNX Runtime has no bf16 kernels on the CPU", "compile with --dtype fp32, or for a target on a GPU"


def bf16_has_a_cuda_kernel(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """Operators that ONNX Runtime's CUDA provider has, but not in bf16."""
    if dtype_of(node) == ir.DataType.BFLOAT16:
        yield f"ONNX Runtime has no {node.op_type} of bf16 on CUDA", "compile with --dtype fp16"


def bf16_needs_ampere(subject: Subject) -> Iterator[Problem]:
    """GPUs of architecture 75 compute no bf16."""
    if subject.dtype == "bf16" and subject.sm == 75:
        yield "GPUs of architecture 75 have no bf16", "compile with --dtype fp16"


def norm_is_fp32(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT normalises and exponentiates in the dtype it is given; only RMS honours its stash_type."""
    if dtype_of(node) not in _HALF:
        return
    if node.op_type != "RMSNormalization":
        yield f"{node.op_type} runs in half precision", _ISLAND
    elif int_of(node, "stash_type", 1) != ir.DataType.FLOAT.value:
        yield f"{node.op_type} runs in half precision", "set stash_type to 1"


def sum_fits_half(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """Sums, powers and exponentials of fp16 numbers leave its range of 65,504 soon: squares of 256 do."""
    if dtype_of(node) != ir.DataType.FLOAT16:
        return
    square = made_by(given(node, 0), "Mul", "Pow")
    squared = square is not None and (square.op_type == "Pow" or square.inputs[0] is square.inputs[1])
    what = "a sum of squares" if squared else f"{node.op_type}"
    yield f"{what} in fp16 may leave its range of {HALF_MAX:.0f}", _ISLAND


def constant_fits_half(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """Numbers beyond 65,504 are infinite in fp16, and what fills a mask there may become so by one addition.

    A row that is masked throughout is then NaN after Softmax.
    """
    for value in node.inputs:
        half = value is not None and value.dtype == ir.DataType.FLOAT16
        becomes_half = node.op_type == "Cast" and int_of(node, "to") == ir.DataType.FLOAT16.value
        numbers = numbers_of(value) if half or becomes_half else None
        if value is None or numbers is None or not numbers.size:
            continue
        largest = float(np.abs(numbers.astype(np.float64)).max())
        if largest > HALF_MAX:
            yield (
                f"{value.name} holds a number beyond {HALF_MAX:.0f}, which is infinite in fp16",
                "use a boolean mask, or a number that fits (-30000 masks as well)",
            )
        elif half and node.op_type in ("Add", "Sub") and largest > HALF_MAX / 2:
            yield (
                f"{value.name} holds {largest:.0f}: another number beside it leaves the range of fp16",
                "use a boolean mask, or -30000",
            )


def scores_are_fp32(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """Products of queries and keys that Softmax reads: unscaled, they leave the range of fp16."""
    product = made_by(given(node, 0), "MatMul", through=_TOWARDS_SOFTMAX)
    if product is None or dtype_of(product) != ir.DataType.FLOAT16:
        return
    # Where one side is a weight, they are a router's.
    if all(ir.convenience.get_const_tensor(value) is None for value in product.inputs if value is not None):
        yield (
            f"attention's scores ({product.name or product.outputs[0].name}) are multiplied in fp16",
            "use Attention, or cast queries and keys to fp32",
        )
