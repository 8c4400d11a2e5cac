"""What a bundle says of its engines: how they were built, and which weights they take from its files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from secateur.compiler.meta_model import DTYPES
from secateur.exporters.engine_options import EngineOptions
from secateur.exporters.weights import WeightLayout
from secateur.runtime import manifest as m

KINDS = {
    **{kind: name for name, kind in DTYPES.items()},
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}
"""What manifests call a dtype."""


def describe_engines(options: EngineOptions, sms: Sequence[int]) -> m.Engines:
    """How the engines were built."""
    return m.Engines(
        weights=options.weights,  # type: ignore[arg-type]  # pydantic checks
        version_compatible=options.version_compatible, hardware_compatible=options.hardware_compatible,
        opt_level=options.opt_level, workspace=options.workspace, architectures=list(sms),
        score_plugins=options.score_plugins,
    )  # fmt: skip


def list_outside(layout: WeightLayout, names: Iterable[str]) -> dict[str, m.StoredTensor]:
    """Where the weights lie that engines, or sessions on a GPU, are given."""
    places = {name: layout.tensors[name] for name in names}
    return {
        name: m.StoredTensor(
            file=place.file, offset=place.offset, bytes=place.length, shape=list(place.shape),
            dtype=KINDS[place.dtype],  # type: ignore[arg-type]  # pydantic checks
        )
        for name, place in sorted(places.items())
    }  # fmt: skip
