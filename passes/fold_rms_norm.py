"""Fold the arithmetic of RMS normalisation into one ``secateur::rms_norm`` node."""

from __future__ import annotations

from secateur.compiler import ops
from secateur.compiler.program import Program, args_of
from secateur.passes.edit import Node, aten, erase_dead, is_call, replace_node


def fold_rms_norm(program: Program) -> Program:
    """``weight * cast(x32 * rsqrt(mean(x32 ** 2, -1) + eps))`` with ``x32 = cast(x, float32)``; casts are optional.

    This is the form of Llama's, Mistral's and Qwen2's norm. Norms written differently stay as they are.
    """
    module = program.edit()
    for node in list(module.graph.nodes):
        if (found := _match(node)) is None:
            continue
        x, weight, eps = found
        with module.graph.inserting_before(node):
            folded = module.graph.call_function(ops.rms_norm, (x, weight, eps))
        folded.meta = dict(node.meta)
        replace_node(node, folded)
    erase_dead(module)
    return program.with_module(module)


def _match(node: Node) -> tuple[Node, Node, float] | None:
    if not is_call(node, aten.mul.Tensor):
        return None
    for weight, normed in (args_of(node)[:2], args_of(node)[1::-1]):
        if not (isinstance(weight, Node) and weight.op == "get_attr"):
            continue
        scaled = _uncast(normed)
        if not is_call(scaled, aten.mul.Tensor) or not is_call(args_of(scaled)[1], aten.rsqrt.default):
            continue
        wide, biased = args_of(scaled)[0], args_of(args_of(scaled)[1])[0]
        if not is_call(biased, aten.add.Tensor) or not is_call(args_of(biased)[0], aten.mean.dim):
            continue
        mean, eps = args_of(biased)[:2]
        power = args_of(mean)[0]
        if args_of(mean)[1:] == ([-1], True) and is_call(power, aten.pow.Tensor_Scalar) and args_of(power) == (wide, 2):
            return _uncast(wide), weight, float(eps)
    return None


def _uncast(value: Node) -> Node:
    return args_of(value)[0] if is_call(value, aten._to_copy.default) else value  # type: ignore[return-value]
