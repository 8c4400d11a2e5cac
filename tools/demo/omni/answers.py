"""Stage two: the decoder learns to answer, on cached features of the frozen towers.

Each sequence is one clip followed by a block per kind of question: a block sees the clip and itself, and its positions
start where the clip ends, exactly as in a prompt with one question. Only some tokens of the clip are shown, at their
original positions, which makes steps cheap and the model robust to pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from secateur.tools.demo.omni.architecture import AUDIO_TOKENS, GRID_THW, MEL_FRAMES, TOKENS_PER_GRID, VIDEO_TOKENS
from secateur.tools.demo.omni.inputs import lay_out_media, write_prompt
from secateur.tools.demo.omni.language import KINDS, SECOND_WORDS, TEMPLATES, build_tokenizer, phrase_question

# What the loss of a question counts: the kind that needs two looks learns last.
LOSS_WEIGHTS = {"seen": 1.0, "heard": 1.0, "when_seen": 1.0, "when_heard": 1.0, "same": 2.0}
DEEP_LAYERS = (5, 6)  # hidden states that must already tell the answer
TIME_LAYER = 2  # from this many layers on a token knows its second
MATCHING_LAYERS = (1, 2, 3, 4)


@dataclass(frozen=True, eq=False)
class Prompt:
    """The prompt up to the end of the clip: ``ids`` int64 [T], ``positions`` int64 [3, T], ``video`` and ``audio`` the
    places of the media's tokens int64 [64], [100], ``after`` the position that follows."""

    ids: torch.Tensor
    positions: torch.Tensor
    video: torch.Tensor
    audio: torch.Tensor
    after: int


@cache
def build_blocks(kind: str, wording: int) -> list[int]:
    """Ids of what follows the clip in a prompt: the question, and the start of the assistant's turn."""
    text = write_prompt(phrase_question(kind, wording)).partition(lay_out_media())[2]
    ids: list[int] = build_tokenizer().encode(text, add_special_tokens=False)
    return ids


def build_prompt(model: Any) -> Prompt:
    """The prompt's shared part with the positions the model itself gives it."""
    text = write_prompt("?")
    head = text[: text.index(lay_out_media()) + len(lay_out_media())]
    ids = torch.tensor(build_tokenizer().encode(head, add_special_tokens=False))
    positions, _ = model.get_rope_index(
        ids[None],
        video_grid_thw=torch.tensor([GRID_THW]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        use_audio_in_video=True,
        audio_seqlens=torch.tensor([MEL_FRAMES]),
        second_per_grids=torch.tensor([1.0]),
    )
    video, audio = (
        (ids == token).nonzero().squeeze(1) for token in (model.config.video_token_id, model.config.audio_token_id)
    )
    assert len(video) == VIDEO_TOKENS
    assert len(audio) == AUDIO_TOKENS
    return Prompt(ids, positions[:, 0], video, audio, int(positions.max()) + 1)


def draw_shown(rng: np.random.Generator, labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Per clip ``count`` of its N tokens in order, int64 [B, count]: those with a digit first, but for at most three
    quarters. ``labels`` [B, N] as in ``inputs``."""
    score = rng.random(labels.shape)
    shows = labels != 10
    order = np.argsort(np.argsort(np.where(shows, score, 2.0), axis=1), axis=1)
    score = np.where(shows & (order < count * 3 // 4), score - 1, score)
    return np.sort(np.argsort(score, axis=1)[:, :count], axis=1)


def mask_blocks(prefix: int, blocks: int, length: int) -> torch.Tensor:
    """Which token sees which, bool [1, 1, T, T]: causal, and a block sees the prefix and itself only."""
    block = torch.cat([torch.zeros(prefix), torch.arange(1, blocks + 1).repeat_interleave(length)])
    return ((block[None, :] == 0) | (block[None, :] == block[:, None])).tril()[None, None]


def seed_matching(model: Any) -> None:
    """Starts the decoder where 'find what looks like this word and say it' is a small step away: in the layers named
    above queries equal keys, and what a head reads it writes back unchanged (values times their transpose)."""
    decoder, text = model.model.language_model, model.config.text_config
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    with torch.no_grad():
        for number in MATCHING_LAYERS:
            attention = decoder.layers[number].self_attn
            keys = nn.init.orthogonal_(attention.k_proj.weight).unflatten(0, (groups, -1))
            attention.q_proj.weight.copy_(keys.repeat_interleave(heads // groups, 0).flatten(0, 1))
            values = nn.init.orthogonal_(attention.v_proj.weight).unflatten(0, (groups, -1))
            attention.o_proj.weight.copy_(0.3 * values.repeat_interleave(heads // groups, 0).flatten(0, 1).T)


def measure_answers(
    model: Any,
    prompt: Prompt,
    video: tuple[torch.Tensor, NDArray[np.int64]],
    audio: tuple[torch.Tensor, NDArray[np.int64]],
    answers: list[dict[str, str]],
    wordings: NDArray[np.int64],
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of all kinds of question on B clips.

    ``video`` and ``audio``: features [B, N, D] of all tokens and which are shown, int64 [B, K]. ``answers`` the word
    per kind, ``wordings`` int64 [B, kinds].
    """
    decoder, tokenizer = model.model.language_model, build_tokenizer()
    clips, count = wordings.shape
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    asked = [[build_blocks(kind, int(w)) for kind, w in zip(KINDS, row, strict=True)] for row in wordings]
    length = max(len(block) for row in asked for block in row) + 1
    told = tokenizer.convert_tokens_to_ids([row[kind] for row in answers for kind in KINDS])
    target = torch.tensor(told).reshape(clips, count)
    ids = torch.tensor(
        [[[*block, int(target[b, q])] + [pad] * (length - 1 - len(block)) for q, block in enumerate(row)]
         for b, row in enumerate(asked)]
    )  # fmt: skip
    last = torch.tensor([[len(block) - 1 for block in row] for row in asked])

    # The clip's part, with only the tokens shown.
    words = (prompt.ids != model.config.video_token_id) & (prompt.ids != model.config.audio_token_id)
    kept = torch.cat(
        [words.nonzero().squeeze(1).expand(clips, -1), prompt.video[torch.from_numpy(video[1])],
         prompt.audio[torch.from_numpy(audio[1])]], 1
    ).sort(1).values  # fmt: skip
    prefix = decoder.embed_tokens(prompt.ids).expand(clips, -1, -1).clone()
    prefix[:, prompt.video], prefix[:, prompt.audio] = video[0], audio[0]
    which = torch.arange(clips)[:, None]
    shown = kept.shape[1]
    inputs = torch.cat([prefix[which, kept], decoder.embed_tokens(ids).flatten(1, 2)], 1)
    after = (prompt.after + torch.arange(length)).repeat(count).expand(3, clips, -1)
    positions = torch.cat([prompt.positions[:, kept], after], 2)
    output = decoder(
        inputs_embeds=inputs, attention_mask=mask_blocks(shown, count, length), position_ids=positions,
        use_cache=False, output_hidden_states=True,
    )  # fmt: skip

    index = shown + torch.arange(count) * length + last  # [B, kinds], the last token of the prompt
    weights = torch.tensor([LOSS_WEIGHTS[kind] for kind in KINDS]).expand(clips, -1).flatten()

    def miss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model.lm_head(hidden[which, index]).flatten(0, 1)
        return (weights * F.cross_entropy(logits, target.flatten(), reduction="none")).sum() / weights.sum(), logits

    losses: dict[str, torch.Tensor] = {}
    losses["answer"], logits = miss(output.last_hidden_state)
    stop = model.lm_head(output.last_hidden_state[which, index + 1]).flatten(0, 1)
    losses["end"] = F.cross_entropy(stop, torch.full((len(stop),), end))
    losses["deep"] = torch.stack([miss(decoder.norm(output.hidden_states[k]))[0] for k in DEEP_LAYERS]).mean()
    # A token of the clip learns early to name its second, so that 'when' is a look like the others.
    media = ~words[kept]
    seconds = torch.full((len(prompt.ids),), -1)
    seconds[prompt.video] = torch.arange(VIDEO_TOKENS) // TOKENS_PER_GRID
    seconds[prompt.audio] = torch.arange(AUDIO_TOKENS) // (AUDIO_TOKENS // GRID_THW[0])
    names = decoder.embed_tokens.weight[tokenizer.convert_tokens_to_ids(list(SECOND_WORDS))]
    told_time = F.normalize(output.hidden_states[TIME_LAYER][:, :shown][media], dim=-1)
    named = told_time * told_time.shape[-1] ** 0.5 @ names.T
    losses["time"] = F.cross_entropy(named, seconds[kept][media])
    total = losses["answer"] + 0.1 * losses["end"] + 0.5 * losses["deep"] + 0.5 * losses["time"]
    right = (logits.argmax(-1) == target.flatten()).float().detach().reshape(clips, count)
    figures = {name: float(value.detach()) for name, value in losses.items()} | {"accuracy": float(right.mean())}
    figures["told_time"] = float((named.argmax(-1) == seconds[kept][media]).float().mean())
    return total, figures | {kind: float(right[:, k].mean()) for k, kind in enumerate(KINDS)}


def draw_wordings(rng: np.random.Generator, clips: int) -> NDArray[np.int64]:
    """A wording per clip and kind, int64 [B, kinds]."""
    return np.stack([rng.integers(0, len(TEMPLATES[kind]), clips) for kind in KINDS], 1)
