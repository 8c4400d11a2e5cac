"""Random signals of the right kind for a stage: rows of attention sum to one at most, causality and padding hold."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.passes.stage import StageFunction

HEADS, WIDTH, KEY_WIDTH, LAYERS, PROBES = 3, 12, 5, 2, 4
BEFORE, QUESTION, PADDING = 2, 4, 1
"""Text slots before the visual tokens, after them, and pads at the end."""
TEXT = BEFORE + QUESTION + PADDING


def draw_signals(stage: StageFunction, groups: int, seed: int, carried: Tensor | None = None) -> dict[str, Tensor]:
    """Every signal ``stage`` asks for, and ``tokens``; ``carried [G,N]`` is handed through when it is given."""
    source = torch.Generator().manual_seed(seed)
    count = stage.planned.length_in
    found = {"tokens": torch.randn(groups, count, WIDTH, generator=source)}
    for name in stage.signals:
        if name == "tokens" or (name == "carried" and carried is None and not stage.bound.needs(name)):
            continue
        options = stage.signal_options[name]
        found[name] = carried if name == "carried" and carried is not None else _draw(name, groups, count, source)
        if name == "source" and stage.planned.layout is not None:
            entered = len(stage.planned.layout.frames)
            left = [torch.randperm(entered, generator=source)[:count].sort().values for _ in range(groups)]
            found[name] = torch.stack(left)
        if options.get("heads") == "joint":
            found[name] = found[name][:, :1]
    return found


def _draw(name: str, groups: int, n: int, source: torch.Generator) -> Tensor:
    total = n + TEXT
    slots = torch.arange(BEFORE, BEFORE + n)
    real = torch.arange(total) < total - PADDING
    text = torch.cat([torch.arange(BEFORE), torch.arange(BEFORE + n, total)])

    def normal(*shape: int) -> Tensor:
        return torch.randn(groups, *shape, generator=source)

    def attention(queries: int, keys: int) -> Tensor:
        return torch.softmax(2 * normal(HEADS, queries, keys + 1), -1)[..., :keys]

    causal = torch.arange(total)[:, None] >= torch.arange(total)
    logits = (2 * normal(HEADS, total, total)).masked_fill(~(causal & real), float("-inf"))
    # A padding query sees at least itself in the real thing; it never counts.
    logits = torch.where(real[:, None], logits, torch.where(causal, 0.0, float("-inf")))
    full = torch.softmax(logits, -1)
    made = {
        "normed_tokens": lambda: normal(n, WIDTH),
        "size": lambda: torch.ones(groups, n),
        "carried": lambda: normal(n).abs(),
        "source": lambda: torch.arange(n).expand(groups, n),
        "cls_attention": lambda: attention(1, n)[:, :, 0],
        "cls_attention_layers": lambda: torch.stack([attention(1, n)[:, :, 0] for _ in range(LAYERS)], 1),
        "received_attention": lambda: attention(n, n).mean(2),
        "received_attention_layers": lambda: torch.stack([attention(n, n).mean(2) for _ in range(LAYERS)], 1),
        "self_attention": lambda: full[:, :, slots][..., slots],
        "queries": lambda: normal(HEADS, n, KEY_WIDTH),
        "keys": lambda: normal(HEADS, n, KEY_WIDTH),
        "values": lambda: normal(HEADS, n, KEY_WIDTH),
        "cls_values": lambda: normal(HEADS, KEY_WIDTH),
        "projector_inputs": lambda: normal(n, WIDTH + 1),
        "probe_slopes": lambda: normal(PROBES, n, WIDTH),
        "last_query_attention": lambda: full[:, :, total - PADDING - 1][..., slots],
        "text_attention": lambda: full[:, :, text][..., slots],
        "text_to_text_attention": lambda: full[:, :, text][..., text],
        "text_rows": lambda: ((text >= BEFORE + n) & real[text]).expand(groups, TEXT),
        "text_tokens": lambda: normal(TEXT, WIDTH),
        "normed_text": lambda: normal(TEXT, WIDTH),
        "text_keys": lambda: normal(HEADS, TEXT, KEY_WIDTH),
        "attention_logits": lambda: logits,
        "slots": lambda: slots.expand(groups, n),
        "real_slots": lambda: real.expand(groups, total),
        "branch_inputs": lambda: normal(2, total, WIDTH),
        "branch_outputs": lambda: normal(2, total, WIDTH),
    }
    return made[name]()
