"""What each backend trips over, as data: a function per rule, and the list of where each one holds.

What a rule says of TensorRT was found by building graphs with TensorRT-RTX 1.7.1, of ONNX Runtime with 1.31.1
(docs/lint.md). The first line of a rule's docstring is what `secateur lint --rules` prints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from secateur.exporters import lint_attention as attention
from secateur.exporters import lint_fusion as fusion
from secateur.exporters import lint_operators as operators
from secateur.exporters import lint_precision as precision
from secateur.exporters import lint_sizes as sizes
from secateur.exporters.lint_operators import TENSORRT
from secateur.exporters.lint_subject import Problem, Subject

ONNXRUNTIME = ("onnxruntime",)
CUDA = ("onnxruntime-cuda",)
ONNX = ("onnxruntime", "onnxruntime-cuda", "plain")
EVERY = (*ONNX, *TENSORRT)

Effect = Literal["refused", "wrong", "risk", "slow"]
"""What happens without the fix: no engine or session; accepted, but computed otherwise than the graph says or than in
fp32; right or infinite, depending on the numbers; right, but slow."""


@dataclass(frozen=True)
class Rule:
    """``check`` over the nodes of type ``ops`` ('*' for all), for these ``targets``."""

    check: Callable[[Subject, ir.Node], Iterator[Problem]]
    targets: tuple[str, ...]
    effect: Effect
    ops: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def about(self) -> str:
        return _first_line(self.check)


@dataclass(frozen=True)
class GraphRule:
    """``check`` once over the whole graph, for these ``targets``."""

    check: Callable[[Subject], Iterator[Problem]]
    targets: tuple[str, ...]
    effect: Effect

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def about(self) -> str:
        return _first_line(self.check)


def _first_line(function: Callable[..., object]) -> str:
    return (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")


GRAPH_RULES = (
    GraphRule(precision.bf16_needs_kernels, ONNXRUNTIME, "refused"),
    GraphRule(precision.bf16_needs_ampere, TENSORRT, "refused"),
    GraphRule(sizes.inputs_are_static, TENSORRT, "refused"),
    GraphRule(sizes.ports_have_engine_types, TENSORRT, "refused"),
    GraphRule(sizes.ports_keep_their_width, TENSORRT, "wrong"),
    GraphRule(sizes.weights_are_in_reach, EVERY, "refused"),
)

NODE_RULES = (
    Rule(operators.operator_exists, EVERY, "refused", ("*",)),
    Rule(operators.domain_is_known, EVERY, "refused", ("*",)),
    Rule(operators.operator_is_parsed, TENSORRT, "refused", (*operators.UNPARSED, "ReduceMax", "ReduceMin")),
    Rule(
        operators.product_is_of_floats, TENSORRT, "refused",
        ("Einsum", "Gemm", "MatMul", "ReduceL2", "ReduceLogSumExp"),
    ),
    Rule(sizes.sizes_are_fixed, TENSORRT, "refused", (*sizes.SIZED_BY_VALUES, *sizes.SIZED_BY_INPUTS)),
    Rule(attention.attention_is_half, TENSORRT, "refused", ("Attention",)),
    Rule(attention.attention_has_a_kernel, TENSORRT, "refused", ("Attention",)),
    Rule(attention.attention_keys_are_not_its_queries, TENSORRT, "refused", ("Attention",)),
    Rule(attention.attention_has_one_output, TENSORRT, "refused", ("Attention",)),
    Rule(attention.attention_has_no_past, TENSORRT, "refused", ("Attention",)),
    Rule(attention.attention_mask_is_explicit, TENSORRT, "wrong", ("Attention",)),
    Rule(attention.nonpad_excludes_past, ONNX, "refused", ("Attention",)),
    Rule(attention.attention_keeps_backend_softmax, TENSORRT, "refused", ("Attention",)),
    Rule(attention.attention_has_no_softcap, TENSORRT, "refused", ("Attention",)),
    Rule(attention.attention_masks_once, TENSORRT, "refused", ("Attention",)),
    Rule(attention.causal_attention_is_square, EVERY, "wrong", ("Attention",)),
    Rule(attention.cache_is_input_and_output, TENSORRT, "refused", ("TensorScatter",)),
    Rule(attention.cache_is_written_once, TENSORRT, "refused", ("TensorScatter",)),
    Rule(attention.cache_is_read_behind_its_update, TENSORRT, "wrong", ("TensorScatter",)),
    Rule(attention.cache_is_linear, TENSORRT, "refused", ("TensorScatter",)),
    Rule(attention.cache_does_not_grow, TENSORRT, "slow", ("Concat",)),
    Rule(
        precision.norm_is_fp32, TENSORRT, "wrong", ("LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax")
    ),
    Rule(precision.bf16_has_a_cuda_kernel, CUDA, "refused", precision.NO_BF16_ON_CUDA),
    Rule(precision.sum_fits_half, TENSORRT, "risk", precision.SUMS),
    Rule(precision.constant_fits_half, EVERY, "risk", ("*",)),
    Rule(precision.scores_are_fp32, TENSORRT, "risk", ("Softmax",)),
    Rule(fusion.norm_is_one_node, EVERY, "slow", ("ReduceMean",)),
    Rule(fusion.rotary_is_one_node, EVERY, "slow", ("Concat",)),
    Rule(operators.topk_is_within_limit, TENSORRT, "refused", ("TopK",)),
    Rule(operators.arg_is_at_least_2d, TENSORRT, "refused", ("ArgMax", "ArgMin")),
    Rule(operators.scatter_does_not_reduce, TENSORRT, "refused", ("ScatterElements", "ScatterND")),
    Rule(operators.scatter_fits_its_data, TENSORRT, "refused", ("ScatterElements",)),
    Rule(operators.scan_has_an_input, TENSORRT, "refused", ("Scan",)),
    Rule(operators.loop_has_a_condition, TENSORRT, "refused", ("Loop",)),
    Rule(operators.loop_stands_without_attention, TENSORRT, "refused", ("Loop", "Scan")),
)  # fmt: skip
