"""Rules about attention and its caches. A rule yields what is wrong and what to do, for one node.

Found by building graphs with TensorRT-RTX 1.7; what a rule calls silent passes its parser and builder.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from secateur.exporters.lint_subject import Problem, Subject, dtype_of, given, int_of, shape_of, source_of, text_of

FEWEST_ROWS, MOST_KEYS = 4, 24576
"""Attention from one row: the fewest rows of all heads of a batch, and the most that keys and a head's size add up to.
From 289 rows on the latter is 28,672; the smaller holds for any number of them."""
MANY_SCORES = 1 << 24
"""Batch x queries x keys from which a single head has a kernel after all."""

_Q, _K, _MASK, _PAST_KEY, _PAST_VALUE, _NONPAD = 0, 1, 3, 4, 5, 6
"""Inputs of ONNX Attention."""


def attention_is_half(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT has no attention in fp32."""
    if dtype_of(node, _Q) == ir.DataType.FLOAT:
        yield "TensorRT has no fused attention in fp32", "cast q, k and v to fp16 or bf16"


def attention_has_a_kernel(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """The shapes without a dedicated kernel that were found; TensorRT does not fall back by itself."""
    queries, keys = shape_of(node, _Q), shape_of(node, _K)
    if queries is None or keys is None or len(queries) != 4:
        return
    batch, heads, rows, size = queries
    masked = given(node, _MASK) is not None
    if size > 256 or size < (8 if rows == 1 else 9) or ((rows == 1 or masked) and size % 8):
        yield f"TensorRT has no such attention for heads of {size}", "pad them to a multiple of 8 from 16 to 256"
    repeat = "repeat the query row and drop the second result"
    if rows == 1 and batch * heads < FEWEST_ROWS:
        yield (
            f"TensorRT attends from one row with {FEWEST_ROWS} heads or more, not {batch * heads}",
            repeat if heads > 1 else f"repeat the query's head {FEWEST_ROWS} times and keep the first result",
        )
    elif rows == 1 and keys[2] + size > MOST_KEYS:
        yield f"TensorRT attends from one row to {MOST_KEYS - size} keys of {size} at most, not {keys[2]}", repeat
    elif rows > 1 and heads == 1 and (batch == 1 or masked) and batch * rows * keys[2] < MANY_SCORES:
        where = "under a mask" if batch > 1 else "in a batch of one"
        yield (
            f"TensorRT has no attention with a single head {where}",
            "repeat the query's head and drop the second result",
        )


def attention_keys_are_not_its_queries(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """One tensor as queries and keys, a copy of it too, ends the process in TensorRT's builder."""
    if source_of(given(node, _Q), ("Identity",)) is source_of(given(node, _K), ("Identity",)):
        yield "TensorRT crashes over Attention whose queries are its keys", "choose --target onnxruntime for this model"


def attention_has_one_output(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """Attention that also returns caches is refused."""
    if len(node.outputs) > 1:
        yield "TensorRT allows one output of Attention", "write the caches with TensorScatter beside it"


def attention_has_no_past(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """Attention that appends to caches by itself is refused."""
    if given(node, _PAST_KEY) is not None or given(node, _PAST_VALUE) is not None:
        yield (
            "TensorRT takes no past_key or past_value",
            "write k and v into the caches with TensorScatter and attend to those",
        )


def attention_mask_is_explicit(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT ignores nonpad_kv_seqlen, and padding is attended."""
    if given(node, _NONPAD) is not None:
        yield (
            "TensorRT silently ignores nonpad_kv_seqlen: padding would be attended",
            "give a boolean mask [B,1,S,C] instead",
        )


def nonpad_excludes_past(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """ONNX allows nonpad_kv_seqlen or past_key, not both."""
    if given(node, _NONPAD) is not None and given(node, _PAST_KEY) is not None:
        yield "nonpad_kv_seqlen cannot be combined with past_key", "write the caches with TensorScatter"


def attention_keeps_backend_softmax(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT rejects softmax_precision."""
    if "softmax_precision" in node.attributes:
        yield "TensorRT rejects softmax_precision", "leave it out: the fused kernel accumulates in fp32"


def attention_has_no_softcap(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT rejects softcap."""
    if node.attributes.get_float("softcap", 0.0):
        yield "TensorRT rejects a soft cap on Attention", "choose --target onnxruntime for this model"


def attention_masks_once(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT takes is_causal or a mask, not both."""
    if int_of(node, "is_causal") and given(node, _MASK) is not None:
        yield "TensorRT rejects is_causal together with a mask", "put causality into the mask and drop is_causal"


def causal_attention_is_square(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """is_causal aligns the first query with the first key, so a decode step would see slot 0 only."""
    queries, keys = shape_of(node, _Q), shape_of(node, _K)
    if not int_of(node, "is_causal") or given(node, _PAST_KEY) is not None or not queries or not keys:
        return
    if queries[-2] != keys[-2]:
        yield (
            f"is_causal over {queries[-2]} queries and {keys[-2]} keys silently hides the later keys",
            "drop is_causal and give a boolean mask [B,1,S,C]",
        )


def cache_is_input_and_output(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    """A cache is updated in place: an input of the graph before, an output of it behind."""
    graph = subject.model.graph
    if not any(value is node.inputs[0] for value in graph.inputs):
        yield "the cache is not an input of the graph", "feed the graph input to TensorScatter with nothing between"
    if not any(value is node.outputs[0] for value in graph.outputs):
        yield "the updated cache is not an output of the graph", "make TensorScatter's own result a graph output"


def cache_is_written_once(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    """One update per cache and run: two results cannot lie at the address of one input."""
    if (cache := node.inputs[0]) is None:
        return
    writers = [reader for reader in cache.consumers() if reader.op_type == "TensorScatter"]
    if writers[0] is not node:
        yield f"cache {cache.name} is updated twice", "write all rows in one TensorScatter"


def cache_is_read_behind_its_update(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    """What else reads the input of an update that works in place sees it before or after: nobody says which."""
    if (cache := node.inputs[0]) is None:
        return
    for reader in cache.consumers():
        if reader.op_type != "TensorScatter":
            yield (
                f"{reader.op_type} reads cache {cache.name}, which is overwritten in the same run",
                "read the result of TensorScatter",
            )
            return


def cache_does_not_grow(subject: Subject, node: ir.Node) -> Iterator[Problem]:
    """A cache that Concat makes longer is another tensor: copied whole at every step, and never in one place."""
    graph = subject.model.graph
    inputs = [value for value in node.inputs if any(value is port for port in graph.inputs)]
    grown = [value for value in inputs if value is not None and value.shape is not None and len(value.shape) == 4]
    if grown and any(node.outputs[0] is port for port in graph.outputs):
        yield (
            f"cache {grown[0].name} is copied into a longer one",
            "give it its final length and write rows with TensorScatter",
        )


def cache_is_linear(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """TensorRT writes caches in linear mode, along axis -2."""
    mode = text_of(node, "mode", "linear")
    if mode != "linear":
        yield f"TensorRT writes caches in linear mode only, not {mode}", "use mode linear and check the slot"
    shape, axis = shape_of(node), int_of(node, "axis", -2)
    if axis != -2 and (shape is None or axis != len(shape) - 2):
        yield f"TensorRT writes along axis -2 only, not {axis}", "lay the cache out as [B,H,C,d]"
