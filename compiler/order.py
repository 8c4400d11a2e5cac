"""One order of nodes, whatever order a model's own code happened to compute things in."""

from __future__ import annotations

from torch import fx

from secateur.compiler.program import Program


def order_entry(program: Program, layers: str) -> Program:
    """What is computed before the layers at module path ``layers``, in the order in which they first need it.

    transformers walks through a set of layer types, so tables of several types come in an order that changes from
    process to process: the same inputs would not give the same bytes.
    """
    module = program.edit()
    inside = [n for n in module.graph.nodes if str(n.meta.get("layer", "")).startswith(f"{layers}.")]
    first = inside[0]
    before = set()
    for node in module.graph.nodes:
        if node is first:
            break
        if node.op == "call_function":
            before.add(node)
    done: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        if node in before and node not in done:
            done.add(node)
            for source in node.all_input_nodes:
                place(source)
            first.prepend(node)

    for reader in inside:
        for source in reader.all_input_nodes:
            place(source)
    for node in reversed(list(module.graph.nodes)):
        if node in before and not node.users:
            module.graph.erase_node(node)
    return program.with_module(module)
