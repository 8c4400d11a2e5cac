"""The result of a stage: which tokens stay, and how each of them is mixed from the stage's input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenMap(NamedTuple):
    """``keep [G,K]`` int64, strictly increasing source indices; ``mix [G,K,N]`` float32 or None.

    ``keep`` moves what cannot be averaged (positions, modality, masks), ``mix`` what can (hidden rows): row j of the
    output is ``mix[j] @ rows``. None stands for the one-hot matrix of ``keep``.
    """

    keep: Tensor
    mix: Tensor | None = None


def compose(outer: TokenMap, inner: TokenMap, *, length: int | None = None) -> TokenMap:
    """The map of ``inner`` (N to K1 tokens) followed by ``outer`` (K1 to K2): N to K2.

    ``length`` is N. It is needed only when ``outer`` mixes and ``inner`` does not, since then no tensor holds it.
    """
    keep = inner.keep.gather(1, outer.keep)
    if inner.mix is None and outer.mix is None:
        return TokenMap(keep)
    if outer.mix is None:
        assert inner.mix is not None
        rows = outer.keep.unsqueeze(-1).expand(-1, -1, inner.mix.shape[-1])
        return TokenMap(keep, inner.mix.gather(1, rows))
    if inner.mix is None:
        if length is None:
            raise ValueError("compose needs the source length when only the outer map mixes")
        source = torch.arange(length, device=keep.device)
        return TokenMap(keep, outer.mix @ (source == inner.keep.unsqueeze(-1)).to(outer.mix.dtype))
    return TokenMap(keep, outer.mix @ inner.mix)
