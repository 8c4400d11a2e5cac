"""Opens a bundle and runs it: manifest, processors, sessions, KV caches, sampling, and one backend per file.

Nothing here imports torch, transformers, onnx, or any other folder of Secateur. Names are loaded on first
use, so that the compiler can import the manifest alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.runtime.errors import BundleError, SecateurError, UserError

if TYPE_CHECKING:
    from secateur.runtime.manifest import Manifest, check_files, read_manifest
    from secateur.runtime.results import Generation, Metrics, Piece
    from secateur.runtime.session import Session

_LAZY = {
    "Session": "session",
    "Generation": "results",
    "Metrics": "results",
    "Piece": "results",
    "Manifest": "manifest",
    "read_manifest": "manifest",
    "check_files": "manifest",
}

__all__ = [
    "BundleError",
    "Generation",
    "Manifest",
    "Metrics",
    "Piece",
    "SecateurError",
    "Session",
    "UserError",
    "check_files",
    "read_manifest",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
