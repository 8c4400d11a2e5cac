"""Fold the arithmetic of RMS normalisation into one ``secateur::rms_norm`` node."""

from __future__ import annotations

from typing import Any

from secateur.compiler import ops
from secateur.compiler.program import Program, args_of
from secateur.passes.edit import Node, aten, erase_dead, is_call, replace_node


def fold_rms_norm(program: Program) -> Program:
    """``weight * cast(x32 * rsqrt(mean(x32 ** 2, -1) + eps))`` with ``x32 = cast(x, float32)``; casts are optional.

    This is the form of Llama's, Mistral's and Qwen2's norm. Gemma's is ``cast(normed32 * (1 + cast(weight)))``. Norms
    written differently stay as they are.
    """
    module = program.edit()
    for node in list(module.graph.nodes):
        if (found := _match(node)) is None:
            continue
        x, weight, eps, offset = found
        last = _narrowed(node, x) if offset else node
        if last is None:
            continue
        with module.graph.inserting_before(last):
            folded = module.graph.call_function(ops.rms_norm, (x, weight, eps, *([True] if offset else [])))
        folded.meta = dict(last.meta)
        replace_node(last, folded)
    erase_dead(module)
    return program.with_module(module)


def _match(node: Node) -> tuple[Node, Node, float, bool] | None:
    """What is normed, the weight, epsilon, and whether the weight counts from 1."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for factor, normed in (args_of(node)[:2], args_of(node)[1::-1]):
        weight, offset = _weight(factor)
        if weight is None:
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
            return _uncast(wide), weight, float(eps), offset
    return None


def _weight(factor: Any) -> tuple[Node | None, bool]:
    """The weight a factor is, or is 1 more than."""
    if not isinstance(factor, Node):
        return None, False
    offset = is_call(factor, aten.add.Tensor) and args_of(factor)[1] == 1.0
    weight = _uncast(args_of(factor)[0]) if offset else factor
    return (weight if weight.op == "get_attr" else None), offset


def _narrowed(product: Node, x: Node) -> Node | None:
    """The product of a norm that is computed in float32, or the one cast of it back to the type of ``x``."""
    if product.meta["val"].dtype == x.meta["val"].dtype:
        return product
    (cast, *others) = product.users
    same = is_call(cast, aten._to_copy.default) and cast.meta["val"].dtype == x.meta["val"].dtype
    return cast if same and not others else None


def _uncast(value: Node) -> Node:
    return args_of(value)[0] if is_call(value, aten._to_copy.default) else value  # type: ignore[return-value]  # a cast of a node
