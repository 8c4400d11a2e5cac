"""A FAKE of ``tensorrt`` and ``tensorrt.plugin``, for tests alone: it computes nothing and builds no engine.

It checks what TensorRT 11.4 checks of a function it is given (names, annotations that are classes, one registration per
name), keeps what was registered, and calls it back in TensorRT's order: outputs while sizes are unknown, then with
them, then the kernel. What passes here may still fail in TensorRT.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

FLOAT, HALF, BF16, INT32 = "FLOAT", "HALF", "BF16", "INT32"


class ShapeExpr:
    """One size; ``value`` None while sizes are unknown."""

    def __init__(self, value: int | None = None) -> None:
        self.value = value


class ShapeExprs(tuple[ShapeExpr, ...]):
    pass


class TensorDesc:
    """``shape`` is there only while a kernel is asked for."""

    def __init__(self, shape_expr: ShapeExprs, dtype: str, shape: tuple[int, ...] | None = None) -> None:
        self.shape_expr, self.dtype, self._shape = shape_expr, dtype, shape

    @property
    def shape(self) -> tuple[int, ...]:
        if self._shape is None:
            raise ValueError("TensorDesc has no shape information available at this stage")
        return self._shape


class KernelLaunchParams:
    def __init__(self, **sizes: int) -> None:
        assert set(sizes) <= {"grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem"}
        assert all(type(n) is int for n in sizes.values())
        self.sizes = {"grid_y": 1, "grid_z": 1, "block_y": 1, "block_z": 1, **sizes}


class SymIntExprs(list[int]):
    def __init__(self, length: int) -> None:
        super().__init__([0] * length)


def from_shape_expr(shape: tuple[ShapeExpr | int, ...], dtype: str) -> TensorDesc:
    assert all(isinstance(n, (int, ShapeExpr)) for n in shape), shape
    return TensorDesc(ShapeExprs(ShapeExpr(n) if isinstance(n, int) else n for n in shape), dtype)


@dataclass
class Fake:
    """What was registered, by ``namespace::name``."""

    describe: dict[str, Callable[..., Any]] = field(default_factory=dict)
    implement: dict[str, Callable[..., Any]] = field(default_factory=dict)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    attributes: dict[str, dict[str, type]] = field(default_factory=dict)
    results: dict[str, int] = field(default_factory=dict)

    def register(self, identity: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            namespace, name = identity.split("::")
            assert "." not in namespace + name
            assert namespace not in ("", "trt", "tensorrt", "std")
            if identity in self.describe:
                raise ValueError(f"already has a definition for '{name}'")
            signature = inspect.signature(function)
            kinds = {n: p.annotation for n, p in signature.parameters.items()}
            assert all(p.default is inspect.Parameter.empty for p in signature.parameters.values())
            self.tensors[identity] = [n for n, kind in kinds.items() if kind is TensorDesc]
            self.attributes[identity] = {n: kind for n, kind in kinds.items() if kind is not TensorDesc}
            assert [*self.tensors[identity], *self.attributes[identity]] == list(kinds), "tensors come first"
            assert all(kind in (int, float, bytes, bool, str) for kind in self.attributes[identity].values())
            assert not {"outputs", "stream", "tactic"} & set(kinds)
            assert typing.get_origin(signature.return_annotation) is tuple
            returned = typing.get_args(signature.return_annotation)
            assert all(kind is TensorDesc for kind in returned)
            self.results[identity] = len(returned)
            self.describe[identity] = function
            return function

        return decorate

    def aot_impl(self, identity: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            assert identity in self.describe, "register comes first"
            signature = inspect.signature(function)
            wanted = [*self.tensors[identity], *self.attributes[identity], "outputs", "tactic"]
            assert list(signature.parameters) == wanted
            returned = typing.get_args(signature.return_annotation)
            assert returned == (str, str, KernelLaunchParams, SymIntExprs)
            self.implement[identity] = function
            return function

        return decorate

    def build(
        self, identity: str, inputs: Sequence[tuple[str, tuple[int, ...]]], attributes: dict[str, Any]
    ) -> tuple[list[TensorDesc], tuple[str, str, KernelLaunchParams, SymIntExprs]]:
        """What TensorRT asks of a plugin while it builds: outputs and the kernel."""
        assert {n: type(v) for n, v in attributes.items()} == self.attributes[identity]
        unknown = [TensorDesc(ShapeExprs(ShapeExpr() for _ in shape), dtype) for dtype, shape in inputs]
        first = self.describe[identity](*unknown, **attributes)
        known = [TensorDesc(ShapeExprs(map(ShapeExpr, shape)), dtype) for dtype, shape in inputs]
        outputs = list(self.describe[identity](*known, **attributes))
        assert [o.dtype for o in first] == [o.dtype for o in outputs]
        assert len(outputs) == self.results[identity]
        sized = [TensorDesc(d.shape_expr, d.dtype, shape) for d, (_, shape) in zip(known, inputs, strict=True)]
        for desc in outputs:
            assert all(n.value is not None for n in desc.shape_expr)
            desc._shape = tuple(int(n.value or 0) for n in desc.shape_expr)
        name, ptx, launch, extra = self.implement[identity](*sized, *attributes.values(), outputs, 0)
        assert isinstance(launch, KernelLaunchParams)
        assert isinstance(extra, SymIntExprs)
        return outputs, (name, ptx, launch, extra)


def install(monkeypatch: Any) -> Fake:
    """Put the fake where ``import tensorrt.plugin`` finds it."""
    fake, package, module = Fake(), types.ModuleType("tensorrt"), types.ModuleType("tensorrt.plugin")
    for name, value in {"float32": FLOAT, "float16": HALF, "bfloat16": BF16, "int32": INT32}.items():
        setattr(package, name, value)
    for thing in (TensorDesc, KernelLaunchParams, SymIntExprs, from_shape_expr, fake.register, fake.aot_impl):
        setattr(module, thing.__name__, thing)
    package.plugin = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
    return fake
