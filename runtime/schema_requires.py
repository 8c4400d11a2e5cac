"""The manifest's account of what has to be there to run a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from secateur.runtime.schema_fields import Count, Frozen, Size

Version = Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,10}){0,3}$")]
LEAST_ONNXRUNTIME: Mapping[int, str] = {23: "1.23.1", 22: "1.20", 21: "1.18", 20: "1.17"}
"""Opset of the standard domain -> the first release of ONNX Runtime that runs it. 1.23.0 loads opset 23 and computes
``Attention`` with grouped keys wrongly, without an error."""


class Requires(Frozen):
    """The library, and what it has to know."""

    library: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    """Which library runs the programs. Graphs in the dialect ``plain`` run in others too."""
    version: Version
    """The least version of it; of engines the version that built them."""
    exact: bool = False
    """Whether only that very version will do: engines that are not version compatible."""
    provider: str | None = None
    """The execution provider of ONNX Runtime; None for engines, and for graphs in a type the CPU does not compute."""
    architectures: list[Size] = []
    """The GPU architectures that engines run on, such as 89; empty where anything will do, or nobody said."""
    ir_version: Count
    """Of the graph files."""
    domains: dict[str, Size]
    """Operator domain -> least opset. The standard domain is ``ai.onnx``."""
    caches: Literal["in_place", "either"]
    """``in_place``: each ``present_…`` has to be bound to the memory of its ``past_…``. ``either``: it may be other
    memory, which is then given as ``past_…`` to the next step."""
    options: dict[str, str] = {}
    """Options of the provider without which results are others."""
