"""Stage two: projector and decoder learn to answer, on cached features of the frozen tower.

Each sequence is one image followed by several question blocks: a block sees the image and itself, and its
positions start where the image ends, exactly as in a prompt with one question. Only some visual tokens are
shown, at their original positions, which makes steps cheap and the model robust to pruning. Beside the
answers, the attention of the last prompt token is led to the patches of the objects asked about.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from secateur.tools.demo.architecture import VISUAL_TOKENS
from secateur.tools.demo.corpus import Corpus
from secateur.tools.demo.language import COLOURS, DIGITS, KINDS, build_tokenizer
from secateur.tools.demo.tower import encode_patches, normalise_pixels

PREFIX = 3  # <s> user :
BLOCK = 24  # longest question block in tokens; checked when blocks are built
MOST_OBJECTS = 6
# Seldom kinds are drawn more often, so that training sees all kinds about equally.
KIND_WEIGHTS = {
    "digit_of_colour": 0.6, "colour_of_digit": 0.6, "count": 1.0, "exists": 0.35, "left_of": 2.0, "right_of": 2.0,
}  # fmt: skip
# Which layers' attention is led where, and how strongly: everything drawn, what is mentioned, what answers.
ATTENTION_TARGETS = ((0, "all", 0.05), (1, "mentioned", 0.15), (2, "mentioned", 0.15), (4, "source", 0.15))
DEEP_LAYERS = (5, 6, 7)  # hidden states that must already tell the answer


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
    columns: list[list] = [[] for _ in range(6)]
    for asked in corpus.asked:
        for question in asked:
            if question.text not in known:
                text = f"{question.text} ASSISTANT:"
                known[question.text] = tokenizer.encode(text, add_special_tokens=False)
            words = known[question.text]
            answer = tokenizer.convert_tokens_to_ids(question.answer)
            ids = [*words, answer, tokenizer.eos_token_id]
            marks = np.zeros((2, MOST_OBJECTS), bool)
            marks[0, list({*question.about, *question.source})] = True
            marks[1, list(question.source)] = True
            row = (
                ids + [tokenizer.pad_token_id] * (BLOCK - len(ids)), len(words) - 1, answer, *marks,
                KINDS.index(question.kind),
            )  # fmt: skip
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    start = np.cumsum([0] + [len(asked) for asked in corpus.asked])
    return Blocks(*(np.array(column) for column in columns), start)


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


def cache_features(tower, corpus: Corpus, batch: int = 64) -> torch.Tensor:
    """The tower's patch features of every scene, float16 [S, 196, D]."""
    features = torch.empty(len(corpus), VISUAL_TOKENS, tower.config.hidden_size, dtype=torch.float16)
    with torch.no_grad():
        for first in range(0, len(corpus), batch):
            pixels = normalise_pixels(torch.from_numpy(corpus.images[first : first + batch]))
            features[first : first + batch] = encode_patches(tower, pixels)[:, 1:]
    return features


def measure_binding_loss(
    model,
    reader: nn.Linear,
    features: torch.Tensor,
    owner: torch.Tensor,
    labels: tuple[torch.Tensor, torch.Tensor],
    patches: torch.Tensor,
    blocks: Blocks,
    rows: np.ndarray,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss on S images with Q questions each.

    `features` [S, V, D] of the shown patches, `owner` [S, V] and `labels` (digit, colour) of the same, `patches`
    [S, V] their indices, `rows` [S, Q] into `blocks`. `reader` reads digit and colour off the projector's output.
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

    def read(hidden, where):
        return model.lm_head(hidden[which, where]).flatten(0, 1)

    logits = read(output.last_hidden_state, index)
    losses = {"answer": F.cross_entropy(logits, answer.flatten())}
    end = ids.gather(2, last[..., None] + 2).flatten()
    losses["end"] = F.cross_entropy(read(output.last_hidden_state, index + 1), end)
    deep = [F.cross_entropy(read(decoder.norm(output.hidden_states[k]), index), answer.flatten()) for k in DEEP_LAYERS]
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
        losses[f"attend{layer}"] = -(share.clamp(min=1e-4).log()).mean()
        total = total + weight * losses[f"attend{layer}"]

    read_digit, read_colour = reader(seen).split([len(DIGITS), len(COLOURS)], -1)
    under = owner >= 0
    losses["labels"] = F.cross_entropy(read_digit[under], labels[0][under]) + F.cross_entropy(
        read_colour[under], labels[1][under]
    )
    total = total + 0.2 * losses["labels"]
    right = (logits.argmax(-1) == answer.flatten()).float().detach()
    figures = {name: float(value.detach()) for name, value in losses.items()} | {"accuracy": float(right.mean())}
    kinds = blocks.kind[flat]
    for number, kind in enumerate(KINDS):
        if (kinds == number).any():
            figures[kind] = float(right[torch.from_numpy(kinds == number)].mean())
    return total, figures


def build_prefix() -> list[int]:
    """Ids before the image: <s> user ':'."""
    return build_tokenizer().encode("USER:")
