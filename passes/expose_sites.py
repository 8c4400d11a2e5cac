"""Add the hidden rows each decoder stage leaves to the outputs, so that runs can be compared there."""

from __future__ import annotations

from secateur.compiler.program import Program, args_of


def expose_sites(program: Program) -> Program:
    """New outputs ``hidden.stage<i> [B,L',D]``. Other programs come back as they are."""
    module = program.edit()
    found = {str(n.meta["exposes"]): n for n in module.graph.nodes if "exposes" in n.meta}
    output = module.graph.output_node()
    output.args = ((*args_of(output)[0], *found.values()),)
    return program.with_module(module, (*program.outputs, *found))
