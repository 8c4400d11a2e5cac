"""``torch.export`` as a function from a Python function to a :class:`Program`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.overrides import TorchFunctionMode

from secateur.compiler.blame import blame_error, blame_shape
from secateur.compiler.inplace import write_values
from secateur.compiler.program import Module, Program
from secateur.runtime.errors import SecateurError

aten = torch.ops.aten
_CONVERSIONS = (
    aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default,
)  # fmt: skip
"""Written as one operator; those that convert nothing are left out."""


class _FunctionError(Exception):
    """What a traced function raised. The exporter hangs the half-made graph on an error and then dumps it to stderr:
    on this one it cannot."""

    @property
    def partial_fx_graph(self) -> Any:
        raise AttributeError

    @partial_fx_graph.setter
    def partial_fx_graph(self, graph: Any) -> None:
        pass


class _KeptGradMode(TorchFunctionMode):
    """Switching gradients off where they are off leaves no trace: the exporter cuts the graph at every switch, and puts
    together again what no switch changed."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch._C._set_grad_enabled and args == (torch.is_grad_enabled(),):
            return None
        return function(*args, **(kwargs or {}))


class _Call(nn.Module):
    """``function`` as a module that owns what it may use, so that the exporter lifts those parameters and no others."""

    def __init__(self, function: Callable[..., Any], owned: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.owned = nn.ModuleList(owned.values())

    def forward(self, *feed: Tensor) -> Any:
        try:
            with _KeptGradMode():
                return self.function(*feed)
        except SecateurError:
            raise
        except Exception as error:
            raise _FunctionError(first_line(error)) from error


class _Names:
    """Names inside ``_Call`` back to names in the Hugging Face model."""

    def __init__(self, owned: Iterable[str]) -> None:
        self.paths = list(owned)

    def restore(self, name: str) -> str:
        if not name.startswith("owned."):
            return ""
        index, _, rest = name.removeprefix("owned.").partition(".")
        return f"{self.paths[int(index)]}.{rest}".rstrip(".")


def trace_function(
    name: str,
    function: Callable[..., Any],
    feed: Mapping[str, Tensor],
    outputs: Iterable[str],
    owned: Mapping[str, nn.Module] | None = None,
    dynamic: Mapping[str, Any] | None = None,
    constants: Mapping[str, Tensor] | None = None,
    fix: str = "scores, selectors and merges must have shapes that do not depend on data",
) -> Program:
    """Export ``function(**feed)`` to a Program.

    ``owned`` holds the modules whose parameters it may use, by their path in the model, ``constants`` the values
    of computed buffers by name, ``dynamic`` the symbolic dimensions per input; ``fix`` goes into the error.

    The function may be anything ``torch.export`` can trace with static shapes. Raises SecateurError with
    the exporter's first line and the function's own line (:mod:`secateur.compiler.blame`) when it cannot, for
    instance for a shape that depends on data.
    """
    shapes = (tuple(dynamic.get(k) for k in feed),) if dynamic else None
    try:
        with torch.no_grad(), warnings.catch_warnings(), quiet_torch(), _lean_export():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                _Call(function, owned or {}), tuple(feed.values()), dynamic_shapes=shapes, strict=False
            )
            write_values(exported.graph_module.graph)
            if _mutates(exported.graph_module):
                # Costs as much again as the export itself, so it is done only where something is written in place.
                exported = exported.run_decompositions({})
    except SecateurError:
        raise
    except Exception as error:
        reason = first_line(error)
        if "data-dependent" in reason:  # what follows are symbols of the exporter's
            reason = "a branch or a size depends on data"
        reason += blame_error(error) or blame_shape(function, feed)
        raise SecateurError(f"cannot trace {name}: {reason}", where="trace", fix=fix) from error
    if shapes is None:
        for node in exported.graph.nodes:
            if isinstance(value := node.meta.get("val"), Tensor) and not all(isinstance(n, int) for n in value.shape):
                reason = f"the shape of {node.target} is dynamic{blame_shape(function, feed)}"
                raise SecateurError(f"cannot trace {name}: {reason}", where="trace", fix=fix)
    return _to_program(name, exported, tuple(feed), tuple(outputs), _Names(owned or ()), constants or {})


def _mutates(module: fx.GraphModule) -> bool:
    """Whether any node, in the bodies of loops as well, writes to a tensor it reads."""
    for inner in module.modules():
        for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
            writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
            if writes and node.target is not aten.detach_.default:
                return True
    return False


def _to_program(
    name: str,
    exported: Any,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    names: _Names,
    constants: Mapping[str, Tensor],
) -> Program:
    module = exported.graph_module
    graph = fx.Graph()
    root = nn.Module()
    values: dict[fx.Node, fx.Node] = {}
    ports = dict(zip(exported.graph_signature.user_inputs, inputs, strict=True))
    held = _list_held(exported, names, constants)
    for node in module.graph.nodes:
        if node.name in ports:
            values[node] = graph.placeholder(ports[node.name])
            values[node].meta = {"val": node.meta["val"]}
        elif node.op == "placeholder" and not node.users:
            continue
        elif node.op == "placeholder":
            values[node] = _lift(graph, root, node, *held[node.name])
        elif node.op == "output":
            graph.output(tuple(values[n] for n in node.args[0]))
        elif node.target is aten.detach_.default or _converts_nothing(node):
            values[node] = values[node.args[0]]
        else:
            if node.op == "get_attr":
                setattr(root, node.target, getattr(module, node.target))
            if node.target in _CONVERSIONS:
                values[node] = graph.call_function(
                    aten._to_copy.default, (values[node.args[0]],), {"dtype": node.meta["val"].dtype}
                )
            else:
                values[node] = graph.node_copy(node, lambda n: values[n])
            values[node].meta = {"val": node.meta.get("val")}
            if layer := _module_path(node, names):
                values[node].meta["layer"] = layer
    return Program(name, Module(root, graph), outputs)


def _converts_nothing(node: fx.Node) -> bool:
    if node.target not in _CONVERSIONS:
        return False
    source: Any = node.args[0]
    return bool(source.meta["val"].dtype == node.meta["val"].dtype)


def _list_held(
    exported: Any, names: _Names, constants: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, dict[str, str]]]:
    """The tensors behind the inputs that the exporter made of what modules and functions hold, by the input's name;
    with that of a weight."""
    signature = exported.graph_signature
    found: dict[str, tuple[Tensor, dict[str, str]]] = {
        place: (exported.constants[name], {}) for place, name in signature.inputs_to_lifted_tensor_constants.items()
    }
    for place, name in {**signature.inputs_to_buffers, **signature.inputs_to_parameters}.items():
        if (full := names.restore(name)) in constants:
            found[place] = constants[full], {}
        elif name in exported.state_dict:
            found[place] = exported.state_dict[name], {"weight": full}
    return found


def _lift(graph: fx.Graph, root: nn.Module, node: fx.Node, tensor: Tensor, weight: Mapping[str, str]) -> fx.Node:
    setattr(root, node.name, nn.Buffer(tensor.detach(), persistent=False))
    new = graph.get_attr(node.name)
    new.meta = {"val": node.meta["val"], **weight}
    return new


def _module_path(node: fx.Node, names: _Names) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0] if stack else ""
    return names.restore(path)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """torch reports through loggers what the error it raises already says."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _lean_export() -> Iterator[None]:
    """Spare the exporter what nothing reads: where every node was called from, the graph's text as Python."""
    switch = "do_not_emit_stack_traces"
    before = getattr(fx.config, switch, None)  # torch 2.13 has it; an export without it is the same, and slower
    if before is not None:
        setattr(fx.config, switch, True)
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        if before is not None:
            setattr(fx.config, switch, before)


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
