"""Secateur: multimodal LLMs, pruned by a published recipe, compiled to ONNX graphs and TensorRT engines.

    >>> import secateur
    >>> secateur.compile("model/", "bundle/", recipe="fastv", keep=0.25)
    >>> with secateur.Session("bundle/") as session: ...

The names below are loaded when they are first used, so that a machine which only runs bundles needs
neither torch nor onnx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.compiler.geometry import Geometry
    from secateur.compiler.pipeline import calibrate, compare, compile, explain, verify
    from secateur.runtime.errors import BundleError, MisfitError, SecateurError, UserError
    from secateur.runtime.session import Session

__version__ = "0.1.0"

__all__ = [
    "BundleError", "Geometry", "MisfitError", "SecateurError", "Session", "UserError", "__version__", "calibrate",
    "compare", "compile", "explain", "verify",
]  # fmt: skip

_HOMES = {
    "BundleError": "secateur.runtime.errors",
    "Geometry": "secateur.compiler.geometry",
    "MisfitError": "secateur.runtime.errors",
    "SecateurError": "secateur.runtime.errors",
    "Session": "secateur.runtime.session",
    "UserError": "secateur.runtime.errors",
    "calibrate": "secateur.compiler.pipeline",
    "compare": "secateur.compiler.pipeline",
    "compile": "secateur.compiler.pipeline",
    "explain": "secateur.compiler.pipeline",
    "verify": "secateur.compiler.pipeline",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
