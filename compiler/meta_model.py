"""The Hugging Face model without weights, for tracing: parameters on the meta device, computed buffers real."""

from __future__ import annotations

import inspect
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.compiler.attention import ATTENTION, PACKED, register_attention
from secateur.compiler.experts import use_experts

if TYPE_CHECKING:
    from secateur.compiler.trace import Source

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_meta_model(source: Source, dtype: str) -> nn.Module:
    """The Hugging Face model without weights: parameters on ``meta``, computed buffers real on the CPU."""
    import transformers
    from transformers.utils import logging as hf_logging

    register_attention()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    family = source.family
    try:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, family.auto_class).from_config(
                deepcopy(source.config), attn_implementation=ATTENTION, dtype=DTYPES[dtype]
            )
    finally:
        hf_logging.set_verbosity(verbosity)
    use_experts(model)
    if source.vision.deepstack:
        # Planes are given for every slot, zero at text, so that nothing is looked up by a mask.
        model.get_submodule(family.decoder)._deepstack_process = _add_plane  # type: ignore[assignment]  # a method is replaced
    if source.vision.packed:
        audio = family.audio.modules[:1] if family.audio is not None else ()
        for path in (family.vision_modules[0], *audio):
            # At construction a name like this is refused: it would have to be a library that is installed.
            tower: Any = model.get_submodule(path)
            tower.config._attn_implementation_internal = PACKED
    return model.eval()


def _add_plane(hidden: Tensor, mask: None, plane: Tensor) -> Tensor:
    return hidden + plane


def compute_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no checkpoint holds (rotary frequencies, position indices), by name, on the CPU.

    They are made by building their module once more, outside the ``meta`` device.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if module._non_persistent_buffers_set:
            if isinstance(module, nn.Embedding):  # built anew it would have its table
                twin = _fill_buffers(model, module)
            else:
                wanted = list(inspect.signature(type(module)).parameters)
                twin = type(module)(*(getattr(module, name) for name in wanted if hasattr(module, name)))
            found.update({f"{path}.{n}": getattr(twin, n).detach() for n in module._non_persistent_buffers_set})
    return found


def _fill_buffers(model: Any, module: nn.Module) -> nn.Module:
    """A copy of a module that cannot be built from a configuration alone, its computed buffers filled by the model's
    own initialisation; parameters stay on ``meta``."""
    twin = copy(module)
    twin._buffers = {n: torch.empty_like(b, device="cpu") for n, b in module._buffers.items() if b is not None}
    model._init_weights(twin)
    return twin
