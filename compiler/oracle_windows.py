"""The oracle's sliding windows: which rows of a layer a query may see, by transformers' own rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Windows:
    """Of every decoder layer its window, and the numbers of the tokens that its cache holds.

    transformers compares places in the row. Rows that stages have shortened are compared by their tokens' position
    ids instead, which are the same in a whole row.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.numbers = [torch.zeros(0, dtype=torch.int64) for _ in self.layers]

    def size(self, index: int) -> int | None:
        """The window of a layer, None if it has none. Some models keep it in their attention, some in their
        configuration."""
        attention = self.layers[index].self_attn
        found = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        return None if found is None else int(found)

    def near(self, index: int, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Keys that the window leaves to each query, bool ``[queries, keys]``; None where it hides nothing."""
        size = self.size(index)
        if size is None:
            return None
        from transformers.masking_utils import sliding_window_overlay

        seen: Tensor = sliding_window_overlay(size)(0, 0, queries[:, None], keys[None])  # type: ignore[arg-type,assignment]
        return None if bool(seen.all()) else seen

    def narrow(self, index: int, whole: Tensor | None, numbers: Tensor) -> Tensor | None:
        """The mask of a layer in prefill: ``whole [1,1,S,S]`` without the window, None for a causal one, of the rows
        numbered ``numbers [S]``. None where that is all."""
        self.numbers[index] = numbers
        near = self.near(index, numbers, numbers)
        if near is None:
            return whole
        return (torch.ones_like(near).tril() if whole is None else whole) & near

    def keep(self, before: int, rows: Tensor) -> None:
        """The caches of the layers before ``before`` let go of all but ``rows``."""
        for index in range(before):
            self.numbers[index] = self.numbers[index][rows]

    @contextmanager
    def decoding(self, numbers: Sequence[int]) -> Iterator[None]:
        """One new token, numbered ``numbers[i]`` in layer i."""

        def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            index = self.layers.index(module)
            own = torch.tensor([numbers[index]])
            self.numbers[index] = torch.cat([self.numbers[index], own])
            near = self.near(index, own, self.numbers[index])
            kwargs["attention_mask"] = None if near is None else near[None, None]
            return args, kwargs

        hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
