"""Stage two: projector and decoder learn to answer, on cached features of the frozen tower.

Each sequence is one image followed by several question blocks: a block sees the image and itself, and its
positions start where the image ends, exactly as in a prompt with one question. Only some visual tokens are
shown, at their original positions, which makes steps cheap and the model robust to pruning. Beside the
answers, the attention of the last prompt token is led to the patches of the objects asked about.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from secateur.tools.demo.architecture import GRID, VISUAL_TOKENS
from secateur.tools.demo.corpus import Corpus
from secateur.tools.demo.language import COLOURS, DIGITS, KINDS, build_tokenizer
from secateur.tools.demo.tower import encode_patches, normalise_pixels

PREFIX = 3  # <s> user :
BLOCK = 24  # longest question block in tokens; checked when blocks are built
MOST_OBJECTS = 6
# Seldom kinds are drawn more often, so that training sees all kinds about equally.
KIND_WEIGHTS = {
    "digit_of_colour": 0.4, "colour_of_digit": 0.4, "count": 2.0, "exists": 0.3, "left_of": 4.0, "right_of": 4.0,
}  # fmt: skip
# Which layers' attention is led where, and how strongly: everything drawn, what is mentioned, what answers.
ATTENTION_TARGETS = ((0, "all", 0.05), (1, "mentioned", 0.15), (2, "mentioned", 0.15), (4, "source", 0.15))
# What the loss of a question counts: the kinds that need more than one look learn last.
LOSS_WEIGHTS = {
    "digit_of_colour": 0.6, "colour_of_digit": 0.6, "count": 2.0, "exists": 1.4, "left_of": 3.0, "right_of": 3.0,
}  # fmt: skip
DEEP_LAYERS = (6, 7)  # hidden states that must already tell the answer
NAMING_LAYER = 4


@dataclass(frozen=True, eq=False)
class Blocks:
    """Question blocks of S scenes, a row per question: `ids` int64 [R, BLOCK] (words, assistant, ':', answer,
    </s>, pads), `last` index of ':', `answer` id, `mentioned` and `source` bool [R, 6], `kind` index, `start` [S+1]."""

    ids: np.ndarray
    last: np.ndarray
    answer: np.ndarray
    mentioned: np.ndarray
    source: np.ndarray
    kind: np.ndarray
    start: np.ndarray


def build_blocks(corpus: Corpus) -> Blocks:
    """Tokenises every question of a corpus."""
    tokenizer = build_tokenizer()
    known: dict[str, list[int]] = {}
    vocabulary = tokenizer.get_vocab()
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    columns: list[list] = [[] for _ in range(6)]
    for asked in corpus.asked:
        for question in asked:
            if question.text not in known:
                text = f"{question.text} ASSISTANT:"
                known[question.text] = tokenizer.encode(text, add_special_tokens=False)
            words = known[question.text]
            answer = vocabulary[question.answer]
            ids = [*words, answer, end]
            source = [number in question.source for number in range(MOST_OBJECTS)]
            mentioned = [told or number in question.about for number, told in enumerate(source)]
            row = (
                ids + [pad] * (BLOCK - len(ids)), len(words) - 1, answer, mentioned, source,
                KINDS.index(question.kind),
            )  # fmt: skip
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    start = np.cumsum([0] + [len(asked) for asked in corpus.asked])
    rows, last, answers, about, sources, kinds = (np.array(column) for column in columns)
    return Blocks(rows, last, answers, about, sources, kinds, start)


def draw_questions(rng: np.random.Generator, blocks: Blocks, scene: int, count: int, longest: int) -> np.ndarray:
    """Rows of `count` questions about a scene, kinds balanced; a scene with fewer repeats some.

    Questions whose ':' lies beyond index `longest` are left out where others remain: all blocks of a step are as
    long as its longest one, so keeping the long wordings to some steps saves time.
    """
    rows = np.arange(blocks.start[scene], blocks.start[scene + 1])
    short = rows[blocks.last[rows] <= longest]
    rows = short if len(short) else rows
    weights = np.array([KIND_WEIGHTS[KINDS[kind]] for kind in blocks.kind[rows]])
    keys = rng.random(len(rows)) ** (1 / weights)
    return np.resize(rows[np.argsort(-keys)], count)


def draw_patches(rng: np.random.Generator, owner: np.ndarray, count: int) -> np.ndarray:
    """Per scene `count` patches in order, int64 [S, count]: three quarters under digits where there are as many."""
    if count == VISUAL_TOKENS:
        return np.tile(np.arange(VISUAL_TOKENS), (len(owner), 1))
    score = rng.random(owner.shape)
    under = owner >= 0
    order_under = np.argsort(np.argsort(np.where(under, score, 2.0), axis=1), axis=1)
    score = np.where(under & (order_under < count * 3 // 4), score - 1, score + 1)
    return np.sort(np.argsort(score, axis=1)[:, :count], axis=1)


def mask_blocks(visual: int, questions: int, length: int) -> torch.Tensor:
    """Additive mask [1, 1, T, T]: causal, and a block sees the image prefix and itself only."""
    block = torch.cat([torch.zeros(PREFIX + visual), torch.arange(1, questions + 1).repeat_interleave(length)])
    seen = (block[None, :] == 0) | (block[None, :] == block[:, None])
    seen = seen.tril()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def cache_features(tower: Any, corpus: Corpus, batch: int = 64) -> torch.Tensor:
    """The tower's patch features of every scene, float16 [S, 196, D]."""
    features = torch.empty(len(corpus), VISUAL_TOKENS, tower.config.hidden_size, dtype=torch.float16)
    with torch.no_grad():
        for first in range(0, len(corpus), batch):
            pixels = normalise_pixels(torch.from_numpy(corpus.images[first : first + batch]))
            features[first : first + batch] = encode_patches(tower, pixels)[:, 1:]
    return features


def seed_matching(model: Any) -> None:
    """Starts projector and decoder where 'find what looks like this word' is a small step away.

    In the layers whose attention is led, queries start equal to keys (alike attends to alike), and what a head
    reads it writes back unchanged (values times their transpose); embeddings and projector get like sizes.
    """
    decoder, projector = model.model.language_model, model.model.multi_modal_projector
    width, head = model.config.text_config.hidden_size, model.config.text_config.head_dim
    with torch.no_grad():
        decoder.embed_tokens.weight.normal_(std=0.1)
        projector.linear_1.weight.normal_(std=projector.linear_1.in_features**-0.5)
        projector.linear_2.weight.normal_(std=0.5 * width**-0.5)
        for number in sorted({layer for layer, *_ in ATTENTION_TARGETS}):
            attention = decoder.layers[number].self_attn
            heads = attention.o_proj.in_features // head
            values = nn.init.orthogonal_(attention.v_proj.weight)
            attention.o_proj.weight.copy_(0.15 * values.T.repeat(1, heads))
            if number > 0:
                keys = nn.init.orthogonal_(attention.k_proj.weight)
                attention.q_proj.weight.copy_(keys.repeat(heads, 1))


def measure_binding_loss(
    model: Any,
    features: torch.Tensor,
    owner: torch.Tensor,
    labels: tuple[torch.Tensor, torch.Tensor],
    patches: torch.Tensor,
    blocks: Blocks,
    rows: np.ndarray,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss on S images with Q questions each.

    `features` [S, V, D] of the shown patches, `owner` [S, V] and `labels` (digit, colour) of the same, `patches`
    [S, V] their indices, `rows` [S, Q] into `blocks`. The projector's output is also led towards the embeddings of the
    words for what it shows, so that one match between question and picture serves all words.
    """
    decoder = model.model.language_model
    scenes, visual = patches.shape
    count = rows.shape[1]
    flat = rows.reshape(-1)
    length = int(blocks.last[flat].max()) + 2  # up to and including the answer; </s> is only ever a target
    ids = torch.from_numpy(blocks.ids[flat][:, : length + 1]).reshape(scenes, count, length + 1)
    seen = model.model.multi_modal_projector(features)
    embed = decoder.embed_tokens
    prefix = embed(torch.tensor(build_prefix())).expand(scenes, -1, -1)
    inputs = torch.cat([prefix, seen, embed(ids[..., :length]).flatten(1, 2)], 1)
    after = PREFIX + VISUAL_TOKENS + torch.arange(length)
    positions = torch.cat(
        [torch.arange(PREFIX).expand(scenes, -1), PREFIX + patches, after.repeat(count).expand(scenes, -1)], 1
    )
    output = decoder(
        inputs_embeds=inputs, attention_mask=mask_blocks(visual, count, length), position_ids=positions,
        use_cache=False, output_attentions=True, output_hidden_states=True,
    )  # fmt: skip

    last = torch.from_numpy(blocks.last[flat]).reshape(scenes, count)
    index = PREFIX + visual + torch.arange(count) * length + last  # [S, Q], position of ':' in the sequence
    which = torch.arange(scenes)[:, None]
    answer = torch.from_numpy(blocks.answer[flat]).reshape(scenes, count)

    def read(hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return model.lm_head(hidden[which, where]).flatten(0, 1)

    kinds = torch.from_numpy(blocks.kind[flat])
    weights = torch.tensor([LOSS_WEIGHTS[kind] for kind in KINDS])[kinds]

    def miss(logits: torch.Tensor) -> torch.Tensor:
        return (weights * F.cross_entropy(logits, answer.flatten(), reduction="none")).sum() / weights.sum()

    logits = read(output.last_hidden_state, index)
    losses = {"answer": miss(logits)}
    end = ids.gather(2, last[..., None] + 2).flatten()
    losses["end"] = F.cross_entropy(read(output.last_hidden_state, index + 1), end)
    deep = [miss(read(decoder.norm(output.hidden_states[k]), index)) for k in DEEP_LAYERS]
    losses["deep"] = torch.stack(deep).mean()

    total = losses["answer"] + 0.1 * losses["end"] + 0.5 * losses["deep"]
    objects = F.one_hot(owner.clamp(min=0), MOST_OBJECTS).bool() & (owner >= 0)[..., None]  # [S, V, 6]
    for layer, target, weight in ATTENTION_TARGETS:
        if target == "all":
            wanted = (owner >= 0)[:, None].expand(-1, count, -1)
        else:
            marks = torch.from_numpy(getattr(blocks, target)[flat]).reshape(scenes, count, MOST_OBJECTS)
            wanted = torch.einsum("svo,sqo->sqv", objects.float(), marks.float()) > 0
        attention = output.attentions[layer].mean(1)[which, index][..., PREFIX : PREFIX + visual]  # [S, Q, V]
        share = (attention * wanted).sum(-1) / attention.sum(-1).clamp(min=1e-9)
        losses[f"attend{layer}"] = -(weights * share.flatten().clamp(min=1e-4).log()).sum() / weights.sum()
        total = total + weight * losses[f"attend{layer}"]

    names, tints, sides = word_ids()
    words = F.normalize(seen, dim=-1) * seen.shape[-1] ** 0.5
    under = owner >= 0
    losses["labels"] = F.cross_entropy((words @ embed(names).T)[under], labels[0][under]) + F.cross_entropy(
        (words @ embed(tints).T)[under], labels[1][under]
    )
    total = total + 0.3 * losses["labels"]
    # The further left a patch lies, the more it resembles the word 'left'; 'left of' is then a match like the others.
    left, right_word = embed(sides)
    column = (patches % GRID) / ((GRID - 1) / 2) - 1  # [S, V] in -1..1
    losses["place"] = F.mse_loss(words @ (left - right_word), -8 * column)
    total = total + 0.03 * losses["place"]
    # Half-way up, 'how many' names every colour in the picture alike, whatever the number of its patches.
    present = torch.zeros(scenes, len(COLOURS)).scatter_add_(1, labels[1].clamp(min=0), under.float()) > 0
    counting = kinds == KINDS.index("count")
    if counting.any():
        named = read(decoder.norm(output.hidden_states[NAMING_LAYER]), index)[counting][:, tints]
        share = present.float().repeat_interleave(count, 0)[counting]
        losses["naming"] = F.cross_entropy(named, share / share.sum(-1, keepdim=True))
        total = total + 0.1 * losses["naming"]
    # In the first layer one head looks at the words that say which object is meant, another at 'left' or 'right'.
    columns = PREFIX + visual + torch.arange(count * length).reshape(count, length)
    asked = torch.arange(length) < last[..., None]
    for name, head, words_meant in (("reading", 0, torch.cat([names, tints])), ("side", 1, sides)):
        telling = torch.isin(ids[..., :length], words_meant) & asked  # [S, Q, L]
        attention = output.attentions[0][:, head][which[..., None], index[..., None], columns]  # [S, Q, L]
        mass = (attention * telling).sum(-1)[telling.any(-1)]
        if len(mass):
            losses[name] = -(mass.clamp(min=1e-4).log()).mean()
            total = total + 0.2 * losses[name]
    right = (logits.argmax(-1) == answer.flatten()).float().detach()
    figures = {name: float(value.detach()) for name, value in losses.items()} | {"accuracy": float(right.mean())}
    for number, kind in enumerate(KINDS):
        if (kinds == number).any():
            figures[kind] = float(right[kinds == number].mean())
    return total, figures


@cache
def build_prefix() -> list[int]:
    """Ids before the image: <s> user ':'."""
    return build_tokenizer().encode("USER:")


@cache
def word_ids() -> tuple[torch.Tensor, ...]:
    """Ids of the words for digits [10], for colours [6], and for left and right [2]."""
    vocabulary = build_tokenizer().get_vocab()
    groups = ([str(digit) for digit in DIGITS], COLOURS, ("left", "right"))
    return tuple(torch.tensor([vocabulary[word] for word in words]) for words in groups)
