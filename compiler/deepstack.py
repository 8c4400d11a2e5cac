"""DeepStack: features of inner tower layers, one row per visual token, that a model adds to its stream behind the
first decoder layers. Each layer's are a plane.

The vision program returns them beside the features, thinned as those are; the decoder reads them as inputs.
"""

from __future__ import annotations

from torch import fx

_OUTPUT, _INPUT = "deepstack.", "deepstack_"


def plane_outputs(count: int) -> tuple[str, ...]:
    """Names of a vision program's outputs; those of tensors that a graph reads have no dots (:func:`as_input`)."""
    return tuple(f"{_OUTPUT}{index}" for index in range(count))


def as_input(name: str) -> str:
    return name.replace(".", "_")


def is_plane_output(name: str) -> bool:
    return name.startswith(_OUTPUT)


def is_plane(node: fx.Node) -> bool:
    """Whether a value of a decoder's graph is a plane: an input, or rows taken of one."""
    return bool(node.meta.get("plane")) or (node.op == "placeholder" and node.name.startswith(_INPUT))
