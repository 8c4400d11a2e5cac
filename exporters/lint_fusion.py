"""Rules about patterns that backends have one kernel for and do not always find: RMSNorm and RoPE node by node."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from secateur.exporters.lint_subject import Problem, Subject, given, made_by, readers_of, source_of

_SLICES = ("Gather", "Slice", "Split")


def norm_is_one_node(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """RMSNorm and LayerNorm as arithmetic: x / sqrt(mean(x * x) + eps)."""
    square = made_by(given(node, 0), "Mul", "Pow")
    if square is None or (square.op_type == "Mul" and square.inputs[0] is not square.inputs[1]):
        return
    roots = [
        reader for add in readers_of(node) if add.op_type == "Add"
        for reader in readers_of(add) if reader.op_type in ("Pow", "Sqrt")
    ]  # fmt: skip
    rows = source_of(given(square, 0))
    if rows is None or not any(_scales(root, rows) for root in roots):
        return
    centred = made_by(rows, "Sub")
    mean = made_by(given(centred, 1), "ReduceMean") if centred is not None else None
    name = "LayerNormalization" if mean is not None else "RMSNormalization"
    yield f"{name} is left as single operators", f"write it as {name} (opset 23)"


def _scales(root: ir.Node, rows: ir.Value) -> bool:
    """Whether ``rows`` are divided by the root, or multiplied with its inverse."""
    for reader in readers_of(root):
        if reader.op_type == "Reciprocal":
            if _scales(reader, rows):
                return True
        elif reader.op_type in ("Div", "Mul") and any(source_of(value) is rows for value in reader.inputs):
            return True
    return False


def rotary_is_one_node(_: Subject, node: ir.Node) -> Iterator[Problem]:
    """RoPE as arithmetic: halves turned by Neg and Concat, or both products written out."""
    if len(node.inputs) != 2:
        return
    first, second = (source_of(value) for value in node.inputs)
    if _turned_halves(first, second, node) or _written_out(first, second):
        yield (
            "rotary embedding is left as single operators",
            "write it as RotaryEmbedding (opset 23), with cos and sin gathered for the rows that are left",
        )


def _half_of(value: ir.Value | None) -> ir.Value | None:
    """The value that this one is a slice of."""
    part = made_by(value, *_SLICES)
    return source_of(given(part, 0)) if part is not None else None


def _turned_halves(first: ir.Value | None, second: ir.Value | None, node: ir.Node) -> bool:
    negated = made_by(first, "Neg")
    rows = _half_of(given(negated, 0)) if negated is not None else None
    return rows is not None and rows is _half_of(second) and any(r.op_type == "Mul" for r in readers_of(node))


def _written_out(first: ir.Value | None, second: ir.Value | None) -> bool:
    """``[x1 * cos - x2 * sin, x2 * cos + x1 * sin]``."""
    minus, plus = made_by(first, "Sub"), made_by(second, "Add")
    if minus is None or plus is None:
        return False
    found = set()
    for product in (made_by(value, "Mul") for value in (*minus.inputs, *plus.inputs)):
        halves = [half for value in (product.inputs if product is not None else ()) if (half := _half_of(value))]
        if not halves:
            return False
        found.add(frozenset(halves))
    return bool(frozenset.intersection(*found))
