"""Trains the demo model in stages; run again to resume: `python -m secateur.tools.demo.train --work DIR`.

Everything is drawn from the seeds below; checkpoints and curves lie in the work folder.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.tools.demo.architecture import VISUAL_TOKENS, build_model, save_directory
from secateur.tools.demo.binding import (
    build_blocks,
    cache_features,
    draw_patches,
    draw_questions,
    measure_binding_loss,
    seed_matching,
)
from secateur.tools.demo.corpus import Corpus, load_corpus
from secateur.tools.demo.language import DIGITS
from secateur.tools.demo.loop import Schedule, run_stage
from secateur.tools.demo.tower import PatchHeads, measure_tower_loss, seed_local_attention
from secateur.tools.threads import read_threads

Measured = tuple[torch.Tensor, dict[str, float]]  # a loss and the figures that go into the curve
MODEL_SEED = 0
TRAIN_SCENES = (0, 16_000)  # first seed, number: two to four digits, as in the held-out questions
CROWDED_SCENES = (10_000_000, 12_000)  # four or five digits of all ten classes, for the tower only
VALIDATION_SCENES = (1_000_000, 400)  # held-out digits, other seeds than the 1,000 test questions
STAGES = ("tower", "binding")


def train_tower(work: Path, schedule: Schedule, batch: int) -> list[dict]:
    """Stage one; see `tower.py`."""
    torch.manual_seed(1)
    tower = build_model(MODEL_SEED).model.vision_tower
    seed_local_attention(tower)
    heads = PatchHeads(tower.config.hidden_size)
    corpora = (
        load_corpus(work, *CROWDED_SCENES, "train", (4, 5), DIGITS),
        load_corpus(work, *TRAIN_SCENES, "train"),
    )
    validation = load_corpus(work, *VALIDATION_SCENES, "held_out")

    def measure(step: int) -> Measured:
        corpus = corpora[step % 2]
        rows = np.random.default_rng([1, step]).integers(0, len(corpus), batch)
        return measure_tower_loss(tower, heads, corpus, np.sort(rows), torch.Generator().manual_seed(step))

    def validate() -> dict[str, float]:
        with torch.no_grad():
            return measure_tower_loss(tower, heads, validation, slice(None))[1]

    modules = {"tower": tower, "heads": heads}
    parameters = [*tower.parameters(), *heads.parameters()]
    return run_stage("tower", modules, parameters, measure, validate, schedule, work)


def load_tower(work: Path, model: Any) -> None:
    """Puts the trained tower of stage one into a model."""
    state = torch.load(work / "tower.pt", weights_only=False)
    model.model.vision_tower.load_state_dict(state["modules"]["tower"])


def load_features(work: Path, tower: Any, corpus: Corpus, name: str) -> torch.Tensor:
    """Cached tower features of a corpus; delete the file after changing the tower."""
    path = work / f"features-{name}.pt"
    if not path.exists():
        torch.save(cache_features(tower, corpus), path)
    return torch.load(path)


def choose_visual(step: int, steps: int) -> int:
    """How many visual tokens a step shows: few while binding forms, all or a random number at the end."""
    progress = step / steps
    if progress < 0.3:
        return 32
    if progress < 0.85:
        return (48, 64, VISUAL_TOKENS)[step % 3]
    return (VISUAL_TOKENS, 98, VISUAL_TOKENS, 48)[step % 4]


def train_binding(work: Path, schedule: Schedule, scenes: int, questions: int) -> list[dict]:
    """Stage two; see `binding.py`."""
    model = build_model(MODEL_SEED)
    load_tower(work, model)
    model.model.language_model.set_attn_implementation("eager")
    model.model.vision_tower.requires_grad_(False)
    torch.manual_seed(2)
    seed_matching(model)
    data = {}
    for name, where, split in (("train", TRAIN_SCENES, "train"), ("validation", VALIDATION_SCENES, "held_out")):
        corpus = load_corpus(work, *where, split)
        data[name] = (corpus, load_features(work, model.model.vision_tower, corpus, name), build_blocks(corpus))

    def measure(name: str, rng: np.random.Generator, chosen: np.ndarray, visual: int, longest: int = 99) -> Measured:
        corpus, features, blocks = data[name]
        owner = corpus.owner[chosen]
        patches = draw_patches(rng, owner, visual)
        rows = np.stack([draw_questions(rng, blocks, scene, questions, longest) for scene in chosen])

        def take(labels: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.take_along_axis(labels[chosen], patches, 1)).long()

        index = torch.from_numpy(patches)
        shown = features[torch.from_numpy(chosen)].gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        return measure_binding_loss(
            model, shown.float(), take(corpus.owner), (take(corpus.digit), take(corpus.colour)), index, blocks,
            rows,
        )  # fmt: skip

    def step_loss(step: int) -> Measured:
        rng = np.random.default_rng([2, step])
        chosen = rng.integers(0, len(data["train"][0]), scenes)
        visual = choose_visual(step, schedule.steps)
        # A full image costs several times as much: show fewer of them, which keeps steps equally long.
        chosen = chosen[: max(8, scenes * 160 // (visual + 128))]
        return measure("train", rng, chosen, visual, int(rng.choice([9, 9, 11, 99])))

    def validate() -> dict[str, float]:
        with torch.no_grad():
            rng = np.random.default_rng(3)
            return measure("validation", rng, np.arange(60), VISUAL_TOKENS)[1]

    modules = {"projector": model.model.multi_modal_projector, "decoder": model.model.language_model}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    curve = run_stage("binding", modules, parameters, step_loss, validate, schedule, work)
    save_directory(model, work / "model")
    return curve


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, checkpoints and curves")
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only this stage (repeatable)")
    parser.add_argument("--tower-steps", type=int, default=1800)
    parser.add_argument("--tower-batch", type=int, default=32)
    parser.add_argument("--binding-steps", type=int, default=2000)
    parser.add_argument("--binding-scenes", type=int, default=16)
    parser.add_argument("--binding-questions", type=int, default=8)
    parser.add_argument("--threads", type=read_threads, default=2)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    stages = options.stage or STAGES
    if "tower" in stages:
        train_tower(options.work, Schedule(options.tower_steps, 1.5e-3, weight_decay=0.1), options.tower_batch)
    if "binding" in stages:
        schedule = Schedule(options.binding_steps, 1.5e-3, warmup=50)
        train_binding(options.work, schedule, options.binding_scenes, options.binding_questions)


if __name__ == "__main__":
    main()
