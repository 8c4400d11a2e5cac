"""Ships a trained model: `python -m secateur.tools.demo.ship --work DIR --to demo`.

Writes the HF directory with its card, eight held-out images with questions, and the training curve.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from secateur.tools.demo.architecture import build_model, save_directory
from secateur.tools.demo.evaluate import evaluate
from secateur.tools.demo.language import KINDS
from secateur.tools.demo.scenes import make_scene
from secateur.tools.threads import read_threads

SAMPLE_SEEDS = range(2_000_000, 2_000_008)  # held-out digits; not among the 1,000 test scenes
VARIANTS: dict[str, dict[str, Any]] = {
    "unpruned": {},
    "oracle-keep 0.5": {"keep": "oracle:0.5"},
    "random-keep 0.5": {"keep": "random:0.5"},
    "random-keep 0.1": {"keep": "random:0.1"},
    "blind": {"blind": True},
}

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# Secateur demo model

A vision-language model small enough to train on two CPU cores, in the layout of LLaVA-1.5
(`LlavaForConditionalGeneration`): CLIP tower with CLS (112 px, 8 px patches, 196 visual tokens), two-layer
GELU projector, Llama decoder of 8 layers. {parameters:.1f} million parameters, stored in fp16 and meant to be
used in fp32 or fp16. It answers one-word questions about coloured handwritten digits: which digit is red, what colour
is the 7, how many digits, is there a green 3, which digit is left (right) of the 5. It exists to show what
token pruning does to a model; it is good for nothing else.

## Accuracy
1,000 held-out questions (one per scene, kinds in equal parts; digit instances never seen in training), greedy
decoding of the shipped weights in fp32. *oracle-keep* keeps the patches with the most ink before the decoder.
*blind* sees a flat grey picture; always giving each kind's commonest answer scores {majority:.1f} %.

{table}

## Training
{training}
Seeds: model {model_seed}; training scenes {train_scenes} and {crowded_scenes} (split `train`); validation scenes
{validation_scenes} and test scenes from 0 (split `held_out`); batches are a function of the step.
The whole curve is in `training_curve.json` beside this folder. Run again with
`python -m secateur.tools.demo.train --work DIR` and `python -m secateur.tools.demo.ship --work DIR --to demo`.

Stage one teaches the tower what lies under each patch (digit, colour, ink, place) and CLS what the picture
holds; its heads look at neighbouring patches from the start, and pictures are distorted elastically. Stage two
freezes the tower and teaches projector and decoder to answer, several questions per image, at first on few visual
tokens, with the last prompt token's attention in layers 0, 1, 2 and 4 led to the digits asked about.

{note}
## Licence
Weights: Apache-2.0. The digits come from scikit-learn's `load_digits`, the test part of *Optical Recognition of
Handwritten Digits* (E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository, CC BY 4.0).
"""


def write_samples(folder: Path) -> None:
    """Eight held-out pictures `images/*.png` and `questions.json` with two questions each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, seed in enumerate(SAMPLE_SEEDS):
        scene = make_scene(seed, "held_out", counts=(2 + number % 3,))
        name = f"scene-{number}.png"
        Image.fromarray(scene.image).save(folder / "images" / name)
        for kind in (KINDS[number % len(KINDS)], KINDS[(number + 3) % len(KINDS)]):
            fitting = [question for question in scene.asked if question.kind == kind] or list(scene.asked)
            rows.append({"image": f"images/{name}", "question": fitting[-1].text, "answer": fitting[-1].answer})
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
        last = curve[-1]
        figure = "object_digit" if name == "tower" else "accuracy"
        lines.append(
            f"* `{name}`: {last['step']} steps in {last['seconds'] / 60:.0f} minutes on two CPU cores (shared), "
            f"validation {figure} {100 * last.get(f'val_{figure}', float('nan')):.1f} %"
        )
    return "\n".join(lines) + "\n"


def load_trained(work: Path) -> tuple[Any, dict[str, list[dict]]]:
    """The model put together from the stages' checkpoints, and their curves."""
    import torch

    from secateur.tools.demo.train import MODEL_SEED, STAGES

    model = build_model(MODEL_SEED)
    parts = {
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "decoder": model.model.language_model,
    }
    curves = {}
    for stage in STAGES:
        path = work / f"{stage}.pt"
        if not path.exists():
            continue
        state = torch.load(path, weights_only=False)
        curves[stage] = state["curve"]
        for name, weights in state["modules"].items():
            if name in parts:
                parts[name].load_state_dict(weights)
    return model, curves


def main(arguments: list[str] | None = None) -> None:
    import torch

    from secateur.tools.demo import train

    parser = argparse.ArgumentParser(prog="ship", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the training's work folder")
    parser.add_argument("--to", type=Path, required=True, help="folder that gets model/, images/, questions.json")
    parser.add_argument("--note", type=Path, help="Markdown on how this run differed from a fresh one, for the card")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--threads", type=read_threads, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, curves = load_trained(options.work)
    save_directory(model, options.to / "model")
    write_samples(options.to)
    (options.to / "training_curve.json").write_text(json.dumps(curves, indent=1) + "\n")
    results = {name: evaluate(options.to / "model", options.questions, **how) for name, how in VARIANTS.items()}
    (options.to / "accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
    card = CARD.format(
        parameters=sum(weight.numel() for weight in model.parameters()) / 1e6,
        majority=100 * results["blind"]["majority"],
        table=format_accuracy(results),
        training=format_training(curves),
        note=options.note.read_text() if options.note else "",
        model_seed=train.MODEL_SEED,
        train_scenes="{}+{}".format(*train.TRAIN_SCENES),
        crowded_scenes="{}+{}".format(*train.CROWDED_SCENES),
        validation_scenes="{}+{}".format(*train.VALIDATION_SCENES),
    )
    (options.to / "model" / "README.md").write_text(card)


if __name__ == "__main__":
    main()
