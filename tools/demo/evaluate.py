"""Accuracy of a model directory on held-out questions: `python -m secateur.tools.demo.evaluate demo/model`.

Runs the shipped half-precision weights in fp32 through the HF model. `--keep oracle:0.5` drops visual
tokens before the decoder, the ones with the least ink first, and leaves the others' positions as they were;
`--keep random:0.5` draws them (seeded); `--blind` shows a flat grey picture instead.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.tools.demo.architecture import VISUAL_TOKENS
from secateur.tools.demo.language import KINDS
from secateur.tools.demo.scenes import Scene, held_out
from secateur.tools.threads import read_threads

MOST_NEW_TOKENS = 3


def choose_patches(keep: str | None, scene: Scene, index: int) -> np.ndarray:
    """Sorted patches to keep, int64 [K], from 'oracle:R', 'random:R', or None for all."""
    if keep is None:
        return np.arange(VISUAL_TOKENS)
    rule, _, ratio = keep.partition(":")
    count = max(1, round(float(ratio) * VISUAL_TOKENS))
    if rule == "oracle":
        ranked = scene.rank_patches()
    elif rule == "random":
        ranked = np.random.default_rng([7, index]).permutation(VISUAL_TOKENS)
    else:
        raise ValueError(f"--keep {keep}: the rule is {rule!r}; choose oracle:R or random:R")
    return np.sort(ranked[:count])


def answer_batch(
    model: Any, processor: Any, images: list, questions: list[str], kept: list[np.ndarray]
) -> list[list[int]]:
    """Greedy answer ids (up to `MOST_NEW_TOKENS`) with only `kept` patches before the decoder."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    batch = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    if all(len(patches) == VISUAL_TOKENS for patches in kept):
        ids = model.generate(**batch, max_new_tokens=MOST_NEW_TOKENS)
        return ids[:, batch["input_ids"].shape[1] :].tolist()
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    features = torch.stack(list(features))
    answers = []
    for row, patches in enumerate(kept):
        answers.append(
            answer_pruned(model, batch["input_ids"][row], batch["attention_mask"][row], features[row], patches)
        )
    return answers


@torch.no_grad()
def answer_pruned(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, features: torch.Tensor, patches: np.ndarray
) -> list[int]:
    """Greedy answer of one prompt (ids, mask [T]) from features [196, D] of which only `patches` are kept."""
    ids = ids[mask.bool()]
    visual = ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(ids)
    embeds[visual] = features
    kept = ~visual
    kept[visual.nonzero().squeeze(1)[torch.from_numpy(patches)]] = True
    positions = torch.arange(len(ids))[kept][None]
    end = model.generation_config.eos_token_id
    output = model.model.language_model(inputs_embeds=embeds[kept][None], position_ids=positions, use_cache=True)
    answer: list[int] = []
    for step in range(MOST_NEW_TOKENS):
        answer.append(int(model.lm_head(output.last_hidden_state[0, -1]).argmax()))
        if answer[-1] == end:
            break
        output = model.model.language_model(
            input_ids=torch.tensor([[answer[-1]]]),
            position_ids=torch.tensor([[len(ids) + step]]),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return answer


def evaluate(
    directory: Path, questions: int = 1000, keep: str | None = None, blind: bool = False, batch: int = 50
) -> dict:
    """Accuracy in all and per kind of a model directory; an answer is right only if it also stops."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    processor.tokenizer.padding_side = "left"
    samples = held_out(questions)
    right: list[bool] = []
    started = time.monotonic()
    for first in range(0, len(samples), batch):
        chosen = samples[first : first + batch]
        images = [np.full_like(image, 70) if blind else image for image, *_ in chosen]
        kept = [choose_patches(keep, scene, first + i) for i, (*_, scene) in enumerate(chosen)]
        answers = answer_batch(model, processor, images, [question for _, question, *_ in chosen], kept)
        for ids, (_, _, answer, _) in zip(answers, chosen, strict=True):
            wanted = [processor.tokenizer.convert_tokens_to_ids(answer), processor.tokenizer.eos_token_id]
            right.append(ids[:2] == wanted)
    kinds = {
        kind: round(float(np.mean([ok for i, ok in enumerate(right) if i % len(KINDS) == k])), 4)
        for k, kind in enumerate(KINDS)
    }
    return {
        "questions": questions, "keep": keep or "all", "blind": blind, "accuracy": round(float(np.mean(right)), 4),
        "kinds": kinds, "majority": measure_majority(samples), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def measure_majority(samples: list) -> float:
    """Accuracy of always giving each kind's commonest answer: what the question's kind alone is worth."""
    right = 0
    for k in range(len(KINDS)):
        right += Counter(answer for _, _, answer, _ in samples[k :: len(KINDS)]).most_common(1)[0][1]
    return round(right / len(samples), 4)


def print_table(result: dict, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("kind")
    table.add_column("accuracy", justify="right")
    for kind, accuracy in [
        *result["kinds"].items(),
        ("all", result["accuracy"]),
        ("majority answer", result["majority"]),
    ]:
        table.add_row(kind, f"{100 * accuracy:.1f} %")
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="HF model directory")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--keep", help="oracle:R or random:R, the share R of visual tokens kept before the decoder")
    parser.add_argument("--blind", action="store_true", help="show a grey picture: what the text alone is worth")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--threads", type=read_threads, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = evaluate(options.model, options.questions, options.keep, options.blind)
    print_table(result, f"held-out accuracy, keep {result['keep']}{', blind' if result['blind'] else ''}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
