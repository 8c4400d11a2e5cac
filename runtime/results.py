"""What a generation returns: text, tokens, why it ended, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["eos", "stop", "length", "time", "cancelled"]
"""An end-of-sequence token; a stop string; ``max_new_tokens`` or ``max_length``; ``max_time``; cancelled by the
caller."""


@dataclass
class Metrics:
    """Times in seconds; counts of the whole request.

    ``ttft_s`` is all the work up to the first token, processing included; ``step_s`` are the times of the
    decode steps, sampling included, and ``tpot_s`` is their median, 0 if there was none.
    ``variant`` is which of the bundle's geometries it ran in.
    ``visual_tokens`` counts one row's visual tokens in each segment, by name. ``kept`` says for every stage
    which original patches of the row are left after it: int64 [B, K], image j's patches counted from
    ``j * tokens_per_image``, of images of several sizes from the number of patches of those before. In a model that
    puts squares of patches together these count, row by row, in their place.
    """

    preprocess_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    cache_bytes: int = 0
    variant: int = 0
    step_s: list[float] = field(default_factory=list)
    visual_tokens: dict[str, int] = field(default_factory=dict)
    kept: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        values = asdict(self)
        values["kept"] = {name: indices.tolist() for name, indices in self.kept.items()}
        return values


@dataclass
class Generation:
    """One row's answer. ``tokens`` holds every generated id, the end-of-sequence token included;
    ``text`` is without special tokens and ends before a stop string."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    metrics: Metrics

    def __str__(self) -> str:
        return self.text


class Piece(str):
    """A piece of streamed text that knows its row of the batch."""

    __slots__ = ("row",)
    row: int

    def __new__(cls, text: str, row: int = 0) -> Piece:
        piece = super().__new__(cls, text)
        piece.row = row
        return piece
