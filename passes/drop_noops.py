"""Remove what tracing leaves behind: assertions, copies that change nothing, lists taken apart and put together."""

from __future__ import annotations

import operator

from secateur.compiler.program import Program, args_of
from secateur.passes.edit import Node, aten, erase_dead, is_call, replace_node


def drop_noops(program: Program) -> Program:
    module = program.edit()
    for node in list(module.graph.nodes):
        if node.kwargs.get("device") is not None:
            # That the model was traced on the meta device is no matter of the graph.
            node.kwargs = {**node.kwargs, "device": None}
        if is_call(node, aten._assert_tensor_metadata.default):
            module.graph.erase_node(node)
        elif is_call(node, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default):
            replace_node(node, args_of(node)[0])
        elif is_call(node, aten.view.default, aten._unsafe_view.default):
            # Strides are a matter of the backend; without the copies a view may no longer exist.
            node.target = aten.reshape.default
        elif is_call(node, aten.conv2d.padding) and args_of(node)[4:5] in ((), ("valid",)):
            # "valid" is no padding; so is leaving it out.
            node.args = (*args_of(node)[:4], [0, 0], *args_of(node)[5:])
            node.target = aten.conv2d.default
        elif (
            (is_call(node, aten.dropout.default) and not args_of(node)[2])
            or (is_call(node, aten.mul.Tensor) and isinstance(args_of(node)[1], float) and args_of(node)[1] == 1.0)
            or (is_call(node, aten._to_copy.default) and _same_dtype(node))
        ):
            replace_node(node, args_of(node)[0])
        elif is_call(node, aten.stack.default) and (whole := _restacked(node)) is not None:
            replace_node(node, whole)
    erase_dead(module)
    return program.with_module(module)


def _same_dtype(node: Node) -> bool:
    source = args_of(node)[0]
    return isinstance(source, Node) and source.meta["val"].dtype == node.meta["val"].dtype


def _restacked(node: Node) -> Node | None:
    """``x`` when the node is ``stack(unbind(x, 0), 0)``."""
    items = args_of(node)[0]
    if not isinstance(items, (list, tuple)) or (len(args_of(node)) > 1 and args_of(node)[1] != 0):
        return None
    if not is_call(items[0], operator.getitem):
        return None
    source = args_of(items[0])[0]
    if not is_call(source, aten.unbind.int) or (len(args_of(source)) > 1 and args_of(source)[1] != 0):
        return None
    whole = args_of(source)[0]
    in_order = all(is_call(n, operator.getitem) and args_of(n) == (source, i) for i, n in enumerate(items))
    return whole if in_order and len(items) == whole.meta["val"].shape[0] else None
