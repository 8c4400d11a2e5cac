"""Transformers' video processors without torchvision: their arithmetic alone is wanted, and it is plain torch.

Without torchvision the library puts a placeholder in each class's stead, so the modules are loaded by their files.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock


@cache
def load(family: str) -> ModuleType:
    """The module ``video_processing_<family>``; methods of its class may be called on a stand-in for ``self``."""
    package = importlib.import_module(f"transformers.models.{family}")
    path = Path(str(package.__file__)).with_name(f"video_processing_{family}.py")
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.video_processing_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its decorators look the module up by name; torchvision it imports for what resizes, which is not called here.
    with mock.patch.dict(sys.modules, {**_stand_in_for_torchvision(), spec.name: module}):
        spec.loader.exec_module(module)
    return module


def _stand_in_for_torchvision() -> dict[str, ModuleType]:
    if importlib.util.find_spec("torchvision") is not None:
        return {}
    names = [
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    ]
    modules = {name: ModuleType(name) for name in names}
    for outer, inner in itertools.pairwise(names):
        setattr(modules[outer], inner.rpartition(".")[2], modules[inner])
    return modules
