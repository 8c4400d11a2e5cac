"""Scores with learned weights: a recipe names the file, the tensors become constants of the compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.compiler import ops
from secateur.compiler.learned import WeightsFile
from secateur.runtime.errors import UserError


class Weights:
    """The tensors of a safetensors file by ``names``, in float32. A parameter with this type is an option that takes a
    file; see :mod:`secateur.compiler.learned`."""

    def __init__(self, file: WeightsFile, tensors: Mapping[str, Tensor]) -> None:
        self.file, self._tensors = file, tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._tensors))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"no tensor {name!r}", where=self.file.path, available=self.names)
        return self._tensors[name]

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor ``name``, which has to be of ``shape``; a -1 there allows any size. Raises UserError."""
        tensor = self[name]
        if len(shape) != tensor.dim() or any(n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True)):
            wanted = ", ".join("any" if n == -1 else str(n) for n in shape)
            raise UserError(
                f"tensor {name!r} is [{', '.join(map(str, tensor.shape))}], not [{wanted}]", where=self.file.path,
                fix="give weights that were trained for a model of this width",
            )  # fmt: skip
        return tensor


def load_weights(file: WeightsFile) -> Weights:
    """Every tensor of ``file`` in float32. Raises UserError where it is broken, changed since the recipe was read, or
    holds what are no numbers."""
    return _load(file, str(file.location))


@lru_cache(maxsize=4)
def _load(file: WeightsFile, location: str) -> Weights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from secateur.runtime.manifest import hash_file

    try:
        if hash_file(file.location) != file.sha256:
            raise UserError("the file has changed since the recipe was read", where=file.path)
        tensors = load_file(location)
    except OSError as error:
        raise UserError(f"cannot read it: {error.strerror}", where=file.path) from None
    except SafetensorError as error:
        raise UserError(f"not a safetensors file ({error})", where=file.path) from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(f"tensor {name!r} holds what are no finite floating-point numbers", where=file.path)
    return Weights(file, {name: tensor.float() for name, tensor in tensors.items()})


def learned_perceptron(
    tokens: Tensor,
    weights: Weights,
    activation: Literal["silu", "gelu"] = "silu",
    epsilon: Annotated[float, Field(gt=0)] = 1e-6,
) -> Tensor:
    """A trained perceptron on every one of ``tokens [G,N,D]``: RMS norm, linear, activation, linear to one number,
    ``[G,N]`` (the score head of EchoingPixels).

    ``weights``: ``norm.weight [D]`` (left out: no norm), ``up.weight [W,D]``, ``up.bias [W]`` (or none),
    ``down.weight [1,W]``; a bias of the last layer moves all scores alike and is not read.
    """
    width = tokens.shape[-1]
    rows = tokens
    if "norm.weight" in weights.names:
        rows = ops.rms_norm(rows, weights.take("norm.weight", width), epsilon)
    up = weights.take("up.weight", -1, width)
    inner = rows @ up.transpose(0, 1)
    if "up.bias" in weights.names:
        inner = inner + weights.take("up.bias", up.shape[0])
    bent = torch.nn.functional.silu(inner) if activation == "silu" else torch.nn.functional.gelu(inner)
    return (bent @ weights.take("down.weight", 1, up.shape[0]).transpose(0, 1)).squeeze(-1)


def learned_selector(tokens: Tensor, weights: Weights) -> Tensor:
    """A trained query and key of every one of ``tokens [G,N,D]``: the mean over all keys of their scaled products with
    a token's query, without softmax, ``[G,N]`` (VisionSelector, arXiv 2510.16598, whose scorer IDPruner takes).

    ``weights``: ``q_proj.weight [W,D]``, ``q_proj.bias [W]``, ``k_proj.weight [W,D]``, ``k_proj.bias [W]``. The mean
    over products is the product with the mean key, so the cost is linear in N.
    """
    width = tokens.shape[-1]
    into = weights.take("q_proj.weight", -1, width)
    inner = into.shape[0]
    query = tokens @ into.transpose(0, 1) + weights.take("q_proj.bias", inner)
    key = tokens.mean(dim=1, keepdim=True) @ weights.take("k_proj.weight", inner, width).transpose(0, 1)
    key = key + weights.take("k_proj.bias", inner)
    return (query * key).sum(dim=-1) * inner**-0.5


SCORES: dict[str, Callable[..., Tensor]] = {
    "learned_perceptron": learned_perceptron,
    "learned_selector": learned_selector,
}
TENSORS = {
    "learned_perceptron": "norm.weight [D], up.weight [W,D], up.bias [W] and down.weight [1,W]",
    "learned_selector": "q_proj.weight [W,D], q_proj.bias [W], k_proj.weight [W,D] and k_proj.bias [W]",
}
"""What a function of this module reads from its file: floating-point numbers of any width, D as wide as a token."""
