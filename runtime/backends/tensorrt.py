"""TensorRT engines: for now the check of what is missing to run one here."""

from __future__ import annotations

import importlib.util
from ctypes import CDLL

from secateur.runtime.errors import UserError
from secateur.runtime.schema import Manifest

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def explain_absence(name: str, manifest: Manifest) -> UserError:
    """The error that says why ``manifest``'s engines cannot run here: GPU driver, library, or this version."""
    missing = []
    if not _has_driver():
        missing.append("an NVIDIA GPU with its driver (libcuda.so.1)")
    if importlib.util.find_spec(_MODULES[name]) is None:
        missing.append(f"the library (pip install 'secateur[{name}]')")
    if missing:
        return UserError(
            f"the {name} engines cannot run here: missing {' and '.join(missing)}",
            where=f"backend {name}",
            fix="to run on this machine compile with --target onnxruntime",
        )
    built_for = f" for SM {manifest.sm}" if manifest.sm else ""
    return UserError(
        f"this version builds {name} engines{built_for} but does not run them",
        where=f"backend {name}",
        fix="run the engine files with the vendor's own runtime, or compile with --target onnxruntime",
    )


def _has_driver() -> bool:
    try:
        CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
