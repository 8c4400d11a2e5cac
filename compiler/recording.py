"""A Hugging Face model whose attention modules are listened to: what the eager oracle reads its scores from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compiler.rope import forget_lengths
from secateur.compiler.trace import Source

RECORDING = "secateur_recording"


class Record:
    """Rotated queries, rotated keys and values of the last call of every attention module, and its scale."""

    def __init__(self) -> None:
        self.taken: dict[nn.Module, tuple[dict[str, Tensor], float]] = {}
        self.calls: dict[nn.Module, list[tuple[dict[str, Tensor], float]]] = {}
        """All calls, of a tower that attends run by run."""


def load_recording_model(source: Source) -> nn.Module:
    """The checkpoint in fp32, with transformers' sdpa attention wrapped so that queries and keys can be seen.
    What it makes of a row does not depend on rows before it (:func:`secateur.compiler.rope.forget_lengths`)."""
    import transformers
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.utils import logging as hf_logging

    AttentionInterface.register(RECORDING, _attend_and_record)
    AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model: nn.Module = getattr(transformers, source.family.auto_class).from_pretrained(
            Path(source.path), config=deepcopy(source.config), dtype=torch.float32, attn_implementation=RECORDING,
            local_files_only=True,
        )  # fmt: skip
    finally:
        if bar:
            hf_logging.enable_progress_bar()
    forget_lengths(model.get_submodule(source.family.decoder))
    return model.eval()


@contextmanager
def recording(model: nn.Module) -> Iterator[Record]:
    global _active
    _active = Record()
    try:
        yield _active
    finally:
        _active = None


_active: Record | None = None


def _attend_and_record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _active is not None:
        scale = kw.get("scaling")
        heads = {"query": query, "key": key, "value": value}
        _active.taken[module] = heads, float(query.shape[-1] ** -0.5 if scale is None else scale)
        if not getattr(module, "is_causal", True):
            _active.calls.setdefault(module, []).append(_active.taken[module])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kw)
