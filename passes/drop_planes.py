"""The decoder for new tokens, which are all text, adds no features of inner tower layers."""

from __future__ import annotations

from secateur.compiler.deepstack import is_plane
from secateur.compiler.program import Program, args_of
from secateur.passes.edit import aten, is_call, replace_node


def drop_planes(program: Program) -> Program:
    """The decoder without the inputs ``deepstack_<i>``."""
    module = program.edit()
    stream_in = next(n for n in module.graph.nodes if n.op == "placeholder" and not is_plane(n))
    for port in [n for n in module.graph.nodes if is_plane(n)]:
        for user in list(port.users):
            if is_call(user, aten.sym_size.int):
                # Tracing reads a length off any tensor that has it; a plane is as long as the stream.
                user.args = (stream_in, *args_of(user)[1:])
                continue
            assert is_call(user, aten.add.Tensor), "planes are added to the stream and nothing else"
            stream, plane = args_of(user)[:2]
            replace_node(user, stream if plane is port else plane)
        module.graph.erase_node(port)
    return program.with_module(module)
