"""Compute every value's shape and dtype anew, now that all lengths are constants; nothing is executed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.compiler.program import Program, args_of
from secateur.passes.edit import erase_dead
from secateur.runtime.errors import SecateurError


def refresh_shapes(program: Program) -> Program:
    """Raises SecateurError that names the node whose shapes do not fit."""
    module = program.edit()
    erase_dead(module)
    program = program.with_module(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty(value.shape, dtype=value.dtype)

    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            values[node] = fake(node.meta["val"])
        elif node.op == "get_attr":
            values[node] = fake(getattr(module, str(node.target)))
        else:
            args, kwargs = fx.map_arg((args_of(node), node.kwargs), lambda n: values[n])
            try:
                with mode:
                    values[node] = node.target(*args, **kwargs)
            except Exception as error:
                shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
                raise SecateurError(
                    f"{node.name} ({node.target}) does not fit its inputs {shapes}: {error}",
                    where=f"refresh_shapes: {program.name}",
                ) from error
        node.meta["val"] = values[node]
    return program
