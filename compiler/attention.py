"""What transformers calls for attention while a model is traced: a custom-op node, in towers one per length of run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compiler import ops
from secateur.compiler.program import arrange_operands
from secateur.runtime.errors import UserError

ATTENTION = "secateur"


PACKED = "secateur_flash"
"""For towers that take all grids in one row: they hand the bounds of the runs that attend to themselves to attention
functions of which the name says that they understand them."""


@dataclass(frozen=True)
class Runs:
    """Rows that attend to each other: ``bounds`` of the runs. Where they are of several lengths, ``taken`` sorts the
    rows by their run's length and ``back`` undoes it."""

    bounds: tuple[int, ...]
    taken: Tensor | None = None
    back: Tensor | None = None

    @property
    def starts(self) -> dict[int, list[int]]:
        """Where the runs of each length begin."""
        found: dict[int, list[int]] = {}
        for start, end in pairwise(self.bounds):
            found.setdefault(end - start, []).append(start)
        return found


class TowerIndices(nn.Module):
    """The indices of a tower without their values, which are in ``values`` by name. A tower is traced on the ``meta``
    device, where a tensor's values would be lost."""

    def __init__(self, name: str, indices: Mapping[str, Any]) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.runs: dict[str, Runs] = {}
        self.path = f"{name}.indices"
        for key, value in indices.items():
            if isinstance(value, Tensor):
                self._hold(key, value)
                continue
            self.runs[key] = runs = Runs(tuple(value))
            if len(runs.starts) > 1:
                starts = runs.starts.items()
                order = torch.tensor(
                    [first + i for length, firsts in starts for first in firsts for i in range(length)]
                )
                self._hold(f"{key}_taken", order)
                self._hold(f"{key}_back", order.argsort())

    def _hold(self, key: str, value: Tensor) -> None:
        self.register_buffer(key, torch.empty_like(value, device="meta"))
        self.values[f"{self.path}.{key}"] = value

    def read(self) -> dict[str, Any]:
        """What a tower takes. To be called while it is traced: the exporter then knows these as its own buffers."""
        held = dict(self.named_buffers())
        given: dict[str, Any] = {
            key: Runs(runs.bounds, held.pop(f"{key}_taken", None), held.pop(f"{key}_back", None))
            for key, runs in self.runs.items()
        }
        return given | held


def register_attention() -> None:
    """Make ``attn_implementation="secateur"`` known to transformers: one custom-op node, no mask arithmetic."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention_function)
    AttentionInterface.register(PACKED, _packed_attention_function)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


_READ = ("scaling", "is_causal", "sliding_window", "softcap", "block_ids")
_PACKED_READ = ("scaling", "is_causal", "softcap", "cu_seq_lens_q", "cu_seq_lens_k")
_NO_PART = frozenset(
    (
        "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "return_dict", "max_length_q", "max_length_k", "max_window_seqlen",
        "target_dtype", "num_items_in_batch", "deterministic",
    )
)  # fmt: skip
"""What transformers hands to every attention function and no number follows from: lengths say again what bounds
say, dropout is of training, and the rest tells the model, not its attention, what to do."""


def _check_given(module: nn.Module, mask: Tensor | None, given: Mapping[str, Any], read: Iterable[str]) -> None:
    """Raises UserError for what a model gives its attention and no operand here stands for."""
    other = {n: v for n, v in given.items() if n not in read and n not in _NO_PART} | {"attention_mask": mask}
    for name, value in other.items():
        if value is not None and value is not False:
            raise UserError(
                f"{type(module).__name__} gives its attention {name}, which the traced operator does not know",
                where="trace", fix="this model cannot be compiled; please report it with its config.json",
            )  # fmt: skip


def _attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    _check_given(module, attention_mask, kwargs, _READ)
    scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
    operands = {
        "q": query, "k": key, "v": value,
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "causal": bool(getattr(module, "is_causal", True) if causal is None else causal),
        "window": kwargs.get("sliding_window"), "softcap": kwargs.get("softcap") or None,
        "block_ids": kwargs.get("block_ids"),
    }  # fmt: skip
    out = ops.attention(*arrange_operands(ops.attention, operands))
    return out.transpose(1, 2), None


def _packed_attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention inside :class:`Runs` of ``[1,H,S,d]``, which the tower hands on as ``cu_seq_lens_q``.

    Runs of one length are a batch, so that a layer whose runs are all alike is one node.
    """
    _check_given(module, attention_mask, kwargs, _PACKED_READ)
    if kwargs.get("is_causal"):
        raise UserError(
            f"{type(module).__name__} attends causally inside runs of rows", where="trace",
            fix="towers must attend in both directions",
        )  # fmt: skip
    runs: Runs = kwargs["cu_seq_lens_q"]
    if kwargs.get("cu_seq_lens_k", runs) is not runs:
        raise UserError(
            f"{type(module).__name__} attends from runs of rows to other runs", where="trace",
            fix="towers must attend inside runs",
        )  # fmt: skip
    scale = float(kwargs["scaling"])
    heads, width = query.shape[1], query.shape[3]

    # Rows first, as the projections leave them: then runs become a batch without a move in memory.
    rows = [part.transpose(1, 2)[0] for part in (query, key, value)]

    def attend(length: int, *parts: Tensor) -> Tensor:
        batched = [part.reshape(-1, length, heads, width).transpose(1, 2) for part in parts]
        out = ops.attention(*batched, scale, False, softcap=kwargs.get("softcap") or None)
        return out.transpose(1, 2).reshape(-1, heads, width)

    if runs.taken is None or runs.back is None:
        return attend(next(iter(runs.starts)), *rows)[None], None
    turned = [part.index_select(0, runs.taken) for part in rows]
    outs, at = [], 0
    for length, starts in runs.starts.items():
        end = at + length * len(starts)
        outs.append(attend(length, *(part[at:end] for part in turned)))
        at = end
    return torch.cat(outs).index_select(0, runs.back)[None], None
