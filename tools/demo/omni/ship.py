"""Ships a trained model: `python -m secateur.tools.demo.omni.ship --work DIR --to demo/omni`.

Writes the HF directory with its card, six held-out clips with questions, and the training curve.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from secateur.tools.demo.omni.architecture import save_directory
from secateur.tools.demo.omni.clips import make_clip
from secateur.tools.demo.omni.evaluate import evaluate
from secateur.tools.demo.omni.files import write_clip
from secateur.tools.demo.omni.language import KINDS, answer_question, phrase_question
from secateur.tools.threads import read_threads

SAMPLE_SEEDS = range(2_000_000, 2_000_006)  # held out; neither test nor validation clips
VARIANTS: dict[str, dict[str, Any]] = {
    "unpruned": {},
    "oracle-keep 0.25": {"keep": "oracle:0.25"},
    "random-keep 0.5": {"keep": "random:0.5"},
    "random-keep 0.1": {"keep": "random:0.1"},
    "without video": {"without": "video"},
    "without audio": {"without": "audio"},
}

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: any-to-any
---
# Secateur omni demo model

An audio-visual language model small enough to train on two CPU cores, in the layout of Qwen2.5-Omni's thinker
(`Qwen2_5OmniThinkerForConditionalGeneration`): vision tower of 4 layers with windows of 56 px (layers 1 and 3 see
whole frames), 14 px patches merged 2×2; audio tower of 2 layers on 128 mel bins in chunks of two seconds; decoder of 8
layers, 6 query and 2 key heads, M-RoPE. {parameters:.1f} million parameters, stored in fp16 and meant to be used in
fp32 or fp16. It answers one-word questions about clips of four seconds (8 frames of 112×112, sound at 16 kHz: 64 video
and 100 audio tokens): which digit is seen, which is heard, in which second, are the two the same. It exists to show
what token pruning does to a model; it is good for nothing else.

A clip shows a printed digit that moves during one of its seconds, before a still background and beside a square that
drifts through all of it. In one second a digit is dialled, with the two tones of a telephone's keypad (ITU-T Q.23),
over noise and a hum.

## Accuracy
{questions} questions about {clips} held-out clips (each is asked all kinds), greedy decoding of the shipped weights in
fp32; an answer is right only if it also stops. *oracle-keep* keeps the tokens with a digit before the decoder,
*random-keep* draws tokens, the same share of both modalities; *without* shows a grey picture or silence: the model
then names the digit of the other modality, which is right in more than half of the clips. Always giving each kind's
commonest answer scores {majority:.1f} %.

{table}

## Training
{training}
Seeds: model {model_seed}; training clips of the split `train`, for the decoder {train_clips}; validation clips
{validation_clips} and test clips from 0 of the split `held_out`; batches are a function of the step. The whole curve is
in `training_curve.json` beside this folder. Run again with `python -m secateur.tools.demo.omni.train --work DIR` and
`python -m secateur.tools.demo.omni.ship --work DIR --to demo/omni`.

Stage one leads the features of both towers towards the decoder's embeddings of the digits' words, token by token.
Stage two freezes the towers and teaches the decoder to answer, five questions per clip, at first on few tokens of the
clip, which makes it robust to pruning; early on a token of the clip learns to name its second.

## Licence
Apache-2.0. Clips are synthetic; the digits are set in the font that comes with Pillow.
"""


def write_samples(folder: Path) -> None:
    """Held-out clips `clips/*` and `questions.json` with two questions each."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, seed in enumerate(SAMPLE_SEEDS):
        clip = make_clip(seed, "held_out")
        picture, sound = (path.relative_to(folder) for path in write_clip(clip, folder / "clips" / f"clip-{number}"))
        for kind in (KINDS[number % len(KINDS)], KINDS[(number + 2) % len(KINDS)]):
            rows.append(
                {"frames": str(picture), "sound": str(sound), "question": phrase_question(kind, number),
                 "answer": answer_question(kind, clip)}
            )  # fmt: skip
    (folder / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


def format_accuracy(results: dict[str, dict]) -> str:
    """A Markdown table, a row per variant."""
    lines = ["| | all | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 2) + "|"]
    for name, result in results.items():
        figures = [result["accuracy"], *result["kinds"].values()]
        lines.append(f"| {name} | " + " | ".join(f"{100 * figure:.1f}" for figure in figures) + " |")
    return "\n".join(lines)


def format_training(curves: dict[str, list[dict]]) -> str:
    """One line per stage: steps, minutes, last validation figure."""
    lines = []
    for name, curve in curves.items():
        last, figure = curve[-1], "accuracy" if name == "answers" else "digit"
        told = "accuracy" if name == "answers" else "share of digit tokens named rightly"
        lines.append(
            f"* `{name}`: {last['step']} steps in {last['seconds'] / 60:.0f} minutes on a shared CPU core, "
            f"validation {told} {100 * last[f'val_{figure}']:.1f} %"
        )
    return "\n".join(lines) + "\n"


def load_trained(work: Path) -> tuple[Any, dict[str, list[dict]]]:
    """The model put together from the stages' checkpoints, and their curves."""
    import torch

    from secateur.tools.demo.omni.train import STAGES, list_modules, start_model

    model = start_model()
    parts = list_modules(model)
    curves = {}
    for stage in STAGES:
        state = torch.load(work / f"{stage}.pt", weights_only=False)
        curves[stage] = state["curve"]
        for name, weights in state["modules"].items():
            parts[name].load_state_dict(weights)
    return model, curves


def main(arguments: list[str] | None = None) -> None:
    import torch

    from secateur.tools.demo.omni import train

    parser = argparse.ArgumentParser(prog="ship", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the training's work folder")
    parser.add_argument("--to", type=Path, required=True, help="folder that gets model/, clips/, questions.json")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--threads", type=read_threads, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, curves = load_trained(options.work)
    save_directory(model, options.to / "model")
    write_samples(options.to)
    (options.to / "training_curve.json").write_text(json.dumps(curves, indent=1) + "\n")
    results = {name: evaluate(options.to / "model", options.clips, **how) for name, how in VARIANTS.items()}
    card = CARD.format(
        parameters=sum(weight.numel() for weight in model.parameters()) / 1e6,
        majority=100 * results["unpruned"]["majority"],
        clips=options.clips,
        questions=results["unpruned"]["questions"],
        table=format_accuracy(results),
        training=format_training(curves),
        model_seed=train.MODEL_SEED,
        train_clips="{}+{}".format(*train.TRAIN_CLIPS),
        validation_clips="{}+{}".format(*train.VALIDATION_CLIPS),
    )
    (options.to / "model" / "README.md").write_text(card)


if __name__ == "__main__":
    main()
