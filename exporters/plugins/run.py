"""Run a kernel on tensors: on a GPU, or on the CPU where Triton's interpreter was chosen before triton was imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.exporters.plugins.table import PLUGINS

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
_DTYPES = {name: dtype for dtype, name in TYPES.items()}


def run_plugin(name: str, inputs: list[Tensor], settings: Mapping[str, Any], **sizes: int) -> list[Tensor]:
    """All outputs of the plugin, scratch included. ``inputs`` in the plugin's order, contiguous, integers int32; the
    optional last ones may be left out. ``sizes`` replaces the kernel's own tile."""
    plugin = PLUGINS[name]
    shapes = [tuple(t.shape) for t in inputs]
    launch = plugin.launch(shapes, [TYPES[t.dtype] for t in inputs], settings, **sizes)
    outputs = [
        torch.empty(shape, dtype=inputs[1].dtype if kind == "rows" else _DTYPES[kind], device=inputs[0].device)
        for kind, shape in plugin.outputs(shapes, settings)
    ]
    missing = [None] * (len(plugin.inputs) - len(inputs))
    given = dict(zip(plugin.inputs, [*inputs, *missing], strict=True))
    given |= dict(zip(list(launch.pointers)[len(plugin.inputs) :], [*outputs, *[None] * len(launch.pointers)]))  # noqa: B905
    arguments = {p: None if kind is None else given[p] for p, kind in launch.pointers.items()}
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False}
    launch.kernel[launch.grid](**arguments, **launch.constants, **options)
    return outputs
