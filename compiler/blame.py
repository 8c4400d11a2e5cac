"""The line of a function that an exporter's error, or a shape that depends on data, comes from."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = ("compiler", "exporters", "passes", "runtime", "tools")
_OURS = ("compiler/blame.py", "compiler/function.py", "passes/stage.py", "passes/check_function.py")
"""Files that call functions: where what they call fails, the line is not theirs."""


def blame_error(error: BaseException) -> str:
    """`` (FILE:LINE in FUNCTION: CODE)`` of the innermost line that is neither torch's nor one of :data:`_OURS`;
    empty where there is none."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # the loop ends at None
    # The exporter wraps what a function raised: the first cause knows the line.
    for cause in reversed(seen):
        if found := _innermost(traceback.extract_tb(cause.__traceback__)):
            return found
    return ""


def blame_shape(function: Callable[..., Any], feed: Mapping[str, Tensor]) -> str:
    """The same for the first operation of ``function(*feed.values())`` whose result has no fixed shape."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), mode:
            fakes = [mode.from_tensor(value, static_shapes=True) for value in feed.values()]
            with _RefuseDynamicShapes():
                function(*fakes)
    except Exception as error:
        return blame_error(error)
    return ""


class _RefuseDynamicShapes(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
                raise ValueError("a shape depends on data")
        return result


def _innermost(frames: Iterable[traceback.FrameSummary]) -> str:
    for frame in reversed(list(frames)):
        path = Path(frame.filename)
        if frame.filename.startswith(("<", _TORCH)) or _inside(path) in _OURS or not path.is_file():
            continue
        code = linecache.getline(frame.filename, frame.lineno or 0).strip()
        shown = _inside(path) or str(path)
        return f" ({shown}:{frame.lineno} in {frame.name}: {code})"
    return ""


def _inside(path: Path) -> str:
    """The path below this package, with forward slashes; empty for a file elsewhere."""
    try:
        inside = path.resolve().relative_to(_PACKAGE)
    except ValueError:
        return ""
    return inside.as_posix() if inside.parts[0] in _FOLDERS else ""
