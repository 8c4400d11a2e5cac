"""Accuracy of a model directory on held-out clips: `python -m secateur.tools.demo.omni.evaluate demo/omni/model`.

Runs the shipped half-precision weights in fp32 through the HF model; every clip is asked all kinds of question. `--keep
oracle:0.25` drops tokens of video and audio before the decoder, those without a digit first, and leaves the others'
positions as they were; `--keep random:0.25` draws them (seeded); `--without video` (or audio) shows a grey picture (or
silence) instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.runtime.errors import UserError
from secateur.tools.demo.omni.architecture import AUDIO_TOKENS, GRID_THW, MEL_FRAMES, VIDEO_TOKENS
from secateur.tools.demo.omni.clips import Clip
from secateur.tools.demo.omni.inputs import cut_patches, hear_mels, label_audio, label_video, write_prompt
from secateur.tools.demo.omni.language import KINDS, build_tokenizer
from secateur.tools.demo.omni.questions import Asked, held_out
from secateur.tools.threads import read_threads

MOST_NEW_TOKENS = 3


def prepare_inputs(asked: list[Asked]) -> dict[str, Any]:
    """The HF model's inputs for a batch of questions, padded on the left."""
    tokenized = build_tokenizer()([write_prompt(question.text) for question in asked], padding=True)
    batch = {name: torch.tensor(tokenized[name]) for name in ("input_ids", "attention_mask")}
    patches = [cut_patches(question.frames) for question in asked]
    mels = [hear_mels(question.wave) for question in asked]
    return batch | {
        "pixel_values_videos": torch.from_numpy(np.concatenate(patches)),
        "video_grid_thw": torch.tensor([GRID_THW] * len(asked)),
        "video_second_per_grid": torch.ones(len(asked)),
        "input_features": torch.from_numpy(np.stack(mels)),
        "feature_attention_mask": torch.ones(len(asked), MEL_FRAMES, dtype=torch.long),
        "use_audio_in_video": True,
    }


def choose_tokens(keep: str, clip: Clip, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted video and audio tokens to keep, from 'oracle:R' or 'random:R': the share R of each modality."""
    rule, _, ratio = keep.partition(":")
    if rule not in ("oracle", "random"):
        raise UserError(f"no such rule: {rule!r}", where="--keep", available="oracle:R, random:R")
    rng = np.random.default_rng([7, index])
    chosen = []
    for labels, count in ((label_video(clip.video).ravel(), VIDEO_TOKENS), (label_audio(clip.audio), AUDIO_TOKENS)):
        ranked = rng.permutation(count)
        if rule == "oracle":
            ranked = ranked[np.argsort(labels[ranked] == 10, kind="stable")]
        chosen.append(np.sort(ranked[: max(1, round(float(ratio) * count))]))
    return chosen[0], chosen[1]


@torch.no_grad()
def encode_clip(model: Any, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    """What both towers make of a question's clip: float [64, D] and [100, D]."""
    inputs = prepare_inputs([asked])
    seen = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    heard = model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])
    return seen.pooler_output[0], heard.last_hidden_state


@torch.no_grad()
def answer_pruned(
    model: Any, text: str, features: tuple[torch.Tensor, torch.Tensor], kept_tokens: tuple[NDArray, NDArray]
) -> list[int]:
    """Greedy answer ids with only the kept video and audio tokens before the decoder, at their original positions."""
    encoded = build_tokenizer()([write_prompt(text)])
    inputs = {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask")}
    ids = inputs["input_ids"][0]
    embeds = model.get_input_embeddings()(ids)
    places = {name: (ids == getattr(model.config, f"{name}_token_id")).nonzero()[:, 0] for name in ("video", "audio")}
    positions, _ = model.get_rope_index(
        ids[None], None, torch.tensor([GRID_THW]), inputs["attention_mask"], True, torch.tensor([MEL_FRAMES]),
        torch.ones(1),
    )  # fmt: skip
    kept = torch.ones(len(ids), dtype=torch.bool)
    for place, values, tokens in zip(places.values(), features, kept_tokens, strict=True):
        embeds[place] = values
        kept[place] = False
        kept[place[torch.from_numpy(tokens)]] = True
    decoder, after = model.model.language_model, int(positions.max()) + 1
    output = decoder(inputs_embeds=embeds[kept][None], position_ids=positions[:, :, kept], use_cache=True)
    answer: list[int] = []
    for step in range(MOST_NEW_TOKENS):
        answer.append(int(model.lm_head(output.last_hidden_state[0, -1]).argmax()))
        if answer[-1] in model.generation_config.eos_token_id:
            break
        output = decoder(
            input_ids=torch.tensor([[answer[-1]]]), position_ids=torch.full((3, 1, 1), after + step),
            past_key_values=output.past_key_values, use_cache=True,
        )  # fmt: skip
    return answer


def take_away(asked: Asked, modality: str | None) -> Asked:
    """The question about a clip whose picture is grey ('video') or whose sound is silence ('audio')."""
    if modality == "video":
        return replace(asked, frames=np.full_like(asked.frames, 70))
    if modality == "audio":
        return replace(asked, wave=np.zeros_like(asked.wave))
    return asked


def load_model(directory: Path) -> Any:
    """The HF model of a directory in fp32, for evaluation."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    if not (directory / "config.json").is_file():
        raise UserError("no model directory", where=str(directory), fix="run from the repository's root")
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def evaluate(
    directory: Path, clips: int = 200, keep: str | None = None, without: str | None = None, batch: int = 20
) -> dict[str, Any]:
    """Accuracy in all and per kind of a model directory; an answer is right only if it also stops."""
    model = load_model(directory)
    tokenizer = build_tokenizer()
    samples = held_out(clips)
    right: list[bool] = []
    started = time.monotonic()
    for first in range(0, len(samples), batch):
        chosen = [take_away(asked, without) for asked in samples[first : first + batch]]
        if keep is None:
            inputs = prepare_inputs(chosen)
            ids = model.generate(**inputs, max_new_tokens=MOST_NEW_TOKENS)
            answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
        else:
            features = {asked.name: encode_clip(model, asked) for asked in {a.name: a for a in chosen}.values()}
            answers = [
                answer_pruned(
                    model, asked.text, features[asked.name],
                    choose_tokens(keep, asked.clip, (first + i) // len(KINDS)),
                )
                for i, asked in enumerate(chosen)
                if asked.clip is not None
            ]  # fmt: skip
        for ids, asked in zip(answers, chosen, strict=True):
            right.append(ids[:2] == [tokenizer.convert_tokens_to_ids(asked.answer), tokenizer.eos_token_id])
    kinds = {kind: round(float(np.mean(right[k :: len(KINDS)])), 4) for k, kind in enumerate(KINDS)}
    return {
        "clips": clips, "questions": len(samples), "keep": keep or "all", "without": without,
        "accuracy": round(float(np.mean(right)), 4), "kinds": kinds, "majority": measure_majority(samples),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def measure_majority(samples: list[Asked]) -> float:
    """Accuracy of always giving each kind's commonest answer: what the question's kind alone is worth."""
    commonest = [
        Counter(asked.answer for asked in samples[k :: len(KINDS)]).most_common(1)[0] for k in range(len(KINDS))
    ]
    return round(sum(count for _, count in commonest) / len(samples), 4)


def main(arguments: list[str] | None = None) -> None:
    from secateur.tools.demo.evaluate import print_table

    parser = argparse.ArgumentParser(prog="evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="HF model directory")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--keep", help="oracle:R or random:R, the share R of tokens kept before the decoder")
    parser.add_argument("--without", choices=("video", "audio"), help="take a modality away")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--threads", type=read_threads, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = evaluate(options.model, options.clips, options.keep, options.without)
    taken = f", without {options.without}" if options.without else ""
    print_table(result, f"held-out accuracy, keep {result['keep']}{taken}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
