"""Compute every value's shape and dtype anew, now that all lengths are constants; nothing is executed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.compiler.function import quiet_torch
from secateur.compiler.program import Program, args_of
from secateur.passes.edit import erase_dead
from secateur.runtime.errors import SecateurError


def refresh_shapes(program: Program) -> Program:
    """Raises SecateurError that names the node whose shapes do not fit."""
    module = program.edit()
    erase_dead(module)
    program = program.with_module(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    # Layer after layer does the same to values of the same form: it is worked out once.
    known: dict[Any, Any] = {}

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        form = _form_of((target, args, kwargs))
        if form not in known:
            with mode, quiet_torch():
                known[form] = target(*args, **kwargs)
        return known[form]

    def fake(value: Any) -> Any:
        return call(torch.empty, value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            values[node] = fake(node.meta["val"])
        elif node.op == "get_attr":
            values[node] = fake(getattr(module, str(node.target)))
        else:
            args, kwargs = fx.map_arg((args_of(node), node.kwargs), values.__getitem__)
            try:
                values[node] = call(node.target, *args, **kwargs)
            except Exception as error:
                shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
                raise SecateurError(
                    f"{node.name} ({node.target}) does not fit its inputs {shapes}: {error}",
                    where=f"refresh_shapes: {program.name}",
                ) from error
        node.meta["val"] = values[node]
    return program


def _form_of(value: Any) -> Any:
    """What decides about the form of a call's result, as a key: of tensors their own form, of all else the value."""
    if isinstance(value, Tensor):
        return Tensor, value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_form_of, value))
    if isinstance(value, dict):
        return dict, tuple((key, _form_of(item)) for key, item in value.items())
    return type(value), value  # 1, 1.0 and True are equal
