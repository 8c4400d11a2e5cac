"""Hand the kernels to TensorRT as ahead-of-time plugins (``tensorrt.plugin``), before a graph with them is parsed.

TensorRT asks for a plugin's outputs by shape and, while it builds, for a kernel's PTX, its launch and the scalars it
takes; all of it goes into the engine, which then needs neither Python nor triton. Only the library ``tensorrt`` has
this: the wheel of TensorRT-RTX has no ``tensorrt.plugin``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from secateur.exporters.plugins.table import DOMAIN, PLUGINS, Plugin, read_settings
from secateur.runtime.errors import SecateurError, UserError

_building = {"sm": 0}
"""The architecture that kernels are compiled for. TensorRT's registry is one per process and its callbacks are not told
what they build for."""


def register_plugins(sm: int) -> None:
    """Make the nodes of domain ``secateur`` known to TensorRT in this process, for engines of architecture ``sm``.

    May be called again, for another architecture: plugins stay registered, kernels are compiled for the latest. Raises
    UserError when ``tensorrt.plugin`` or triton is missing, or triton has no kernels for ``sm``.
    """
    trt, trtp = _load("tensorrt", "tensorrt"), _load("tensorrt.plugin", "tensorrt")
    aot = _load("secateur.exporters.plugins.aot", "kernels")
    if sm not in aot.ARCHITECTURES:
        raise UserError(f"no kernels for GPU architecture {sm}", where="--sm", available=aot.ARCHITECTURES)
    first = _building["sm"] == 0
    _building["sm"] = sm
    if first:
        for plugin in PLUGINS.values():
            if plugin.inserted:
                _register(trt, trtp, plugin)


def _load(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"score plugins need {error.name}, which is not installed", where="plugins",
            fix=f"pip install 'secateur[{extra}]', or compile without plugins",
        ) from None  # fmt: skip


def _register(trt: Any, trtp: Any, plugin: Plugin) -> None:
    identity = f"{DOMAIN}::{plugin.name}"
    kinds = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16, "i32": trt.int32}
    names = {dtype: kind for kind, dtype in kinds.items()}

    def describe(*given: Any, **named: Any) -> Any:
        values = [*given, *named.values()]
        inputs, settings = values[:-1], read_settings(values[-1])
        made = plugin.outputs([d.shape_expr for d in inputs], settings)
        return tuple(trtp.from_shape_expr(shape, kinds[kind]) for kind, shape in made)

    def implement(*given: Any) -> Any:
        *inputs, text, outputs, _tactic = given
        shapes = [tuple(int(n) for n in d.shape) for d in inputs]
        if any(n < 0 for shape in shapes for n in shape):
            raise SecateurError(f"an input has no static shape: {shapes}", where=f"plugin {identity}")
        launch = plugin.launch(shapes, [names[d.dtype] for d in inputs], read_settings(text))
        passed = [name for name, kind in launch.pointers.items() if kind is not None]
        assert len(passed) == len(inputs) + len(outputs), f"{identity}: the kernel takes {passed}"
        from secateur.exporters.plugins.aot import compile_launch

        made = compile_launch(launch, _building["sm"])
        x, y, z = launch.grid
        where = trtp.KernelLaunchParams(grid_x=x, grid_y=y, grid_z=z, block_x=made.threads, shared_mem=made.shared)
        return made.name, made.ptx, where, trtp.SymIntExprs(0)

    inputs = dict.fromkeys(plugin.ports, trtp.TensorDesc)
    _sign(describe, {**inputs, "settings": str}, tuple[(trtp.TensorDesc,) * plugin.results])  # type: ignore[misc]
    _sign(
        implement,
        {**inputs, "settings": str, "outputs": tuple[trtp.TensorDesc], "tactic": int},
        tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs],
    )
    trtp.register(identity)(describe)
    trtp.aot_impl(identity)(implement)


def _sign(function: Callable[..., Any], parameters: dict[str, Any], result: Any) -> None:
    """Let the function show this signature. TensorRT compares names and types, which must be classes, not text."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=result,
    )
