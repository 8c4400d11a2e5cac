"""Trains the omni demo model in stages; run again to resume: `python -m secateur.tools.demo.omni.train --work DIR`.

Everything is drawn from the seeds below; checkpoints and curves lie in the work folder.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.tools.demo.loop import Schedule, run_stage
from secateur.tools.demo.omni.answers import build_prompt, draw_shown, draw_wordings, measure_answers, seed_matching
from secateur.tools.demo.omni.architecture import AUDIO_TOKENS, VIDEO_TOKENS, build_model, save_directory
from secateur.tools.demo.omni.clips import DIGITS, make_video
from secateur.tools.demo.omni.corpus import load_arrays, make_grids, make_sounds
from secateur.tools.demo.omni.inputs import cut_patches, label_video
from secateur.tools.demo.omni.language import SECOND_WORDS
from secateur.tools.demo.omni.towers import (
    EMBEDDING_STD,
    encode_mels,
    encode_patches,
    label_ids,
    measure_labels,
    use_equal_parts,
)
from secateur.tools.threads import read_threads

Measured = tuple[torch.Tensor, dict[str, float]]  # a loss and the figures that go into the curve
MODEL_SEED = 0
TRAIN_CLIPS = (0, 4000)  # first seed, number, of the split 'train'
VALIDATION_CLIPS = (1_000_000, 200)  # of the split 'held_out'; the test clips' seeds start at 0
STAGES = ("vision", "audio", "answers")


def start_model() -> Any:
    """The untrained model with embeddings large enough for the towers to aim at."""
    model = build_model(MODEL_SEED)
    with torch.no_grad():
        embed = model.model.language_model.embed_tokens.weight
        embed.normal_(std=EMBEDDING_STD, generator=torch.Generator().manual_seed(MODEL_SEED))
        model.lm_head.weight.copy_(embed)
    use_equal_parts(model)
    return model


def list_modules(model: Any) -> dict[str, nn.Module]:
    """What the stages train, by the names in their checkpoints."""
    inner = model.model
    return {"vision": inner.visual, "audio": inner.audio_tower, "decoder": inner.language_model, "head": model.lm_head}


def train_vision(work: Path, schedule: Schedule, batch: int) -> list[dict]:
    """Stage one for the vision tower, on single seconds of videos; see `towers.py`."""
    torch.manual_seed(1)
    model = start_model()
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.normal_(std=0.03)
    words = model.model.language_model.embed_tokens.weight[label_ids()].detach()
    validation = make_grids(*VALIDATION_CLIPS, "held_out")

    def measure(patches: np.ndarray, labels: np.ndarray) -> Measured:
        return measure_labels(encode_patches(model, torch.from_numpy(patches)), torch.from_numpy(labels), words)

    def step_loss(step: int) -> Measured:
        return measure(*make_grids(step * batch, batch, "train"))  # no video is seen twice

    def validate() -> dict[str, float]:
        with torch.no_grad():
            return measure(*validation)[1]

    modules = {"vision": list_modules(model)["vision"]}
    return run_stage("vision", modules, model.model.visual.parameters(), step_loss, validate, schedule, work)


def train_audio(work: Path, schedule: Schedule, batch: int) -> list[dict]:
    """Stage one for the audio tower; see `towers.py`."""
    torch.manual_seed(2)
    model = start_model()
    words = model.model.language_model.embed_tokens.weight[label_ids()].detach()
    train = load_arrays(work / "sounds-train.npz", lambda: make_sounds(*TRAIN_CLIPS, "train"))
    validation = load_arrays(work / "sounds-validation.npz", lambda: make_sounds(*VALIDATION_CLIPS, "held_out"))

    def measure(data: dict, rows: Any) -> Measured:
        mels = torch.from_numpy(data["mels"][rows]).float()
        return measure_labels(encode_mels(model, mels), torch.from_numpy(data["label"][rows]), words)

    def step_loss(step: int) -> Measured:
        return measure(train, np.random.default_rng([2, step]).integers(0, len(train["label"]), batch))

    def validate() -> dict[str, float]:
        with torch.no_grad():
            return measure(validation, slice(None))[1]

    modules = {"audio": list_modules(model)["audio"]}
    return run_stage("audio", modules, model.model.audio_tower.parameters(), step_loss, validate, schedule, work)


def load_towers(work: Path, model: Any) -> None:
    """Puts the trained towers of stage one into a model and freezes them."""
    for stage in STAGES[:2]:
        tower = list_modules(model)[stage]
        state = torch.load(work / f"{stage}.pt", weights_only=False)
        tower.load_state_dict(state["modules"][stage])
        tower.requires_grad_(False)


@torch.no_grad()
def encode_corpus(model: Any, first: int, size: int, split: str, sounds: dict) -> dict:
    """What the decoder is trained on: float16 features of whole clips ``video`` [S, 64, D] and ``audio`` [S, 100, D],
    their labels and seconds."""
    columns: dict[str, list] = {name: [] for name in ("video", "video_label", "seen", "when_seen")}
    for start in range(first, first + size, 16):
        videos = [make_video(seed, split) for seed in range(start, min(start + 16, first + size))]
        patches = torch.from_numpy(cut_patches(np.concatenate([video.frames for video in videos])))
        features = encode_patches(model, patches).reshape(len(videos), VIDEO_TOKENS, -1)
        columns["video"].append(features.numpy().astype(np.float16))
        columns["video_label"].append(np.stack([label_video(video).ravel() for video in videos]))
        columns["seen"].append(np.array([video.digit for video in videos]))
        columns["when_seen"].append(np.array([video.second for video in videos]))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    audio = [encode_mels(model, torch.from_numpy(mels).float()).numpy() for mels in np.array_split(sounds["mels"], 50)]
    return arrays | {
        "audio": np.concatenate(audio).astype(np.float16), "audio_label": sounds["label"],
        "heard": sounds["digit"], "when_heard": sounds["second"],
    }  # fmt: skip


def choose_shown(step: int, steps: int) -> tuple[int, int]:
    """How many video and audio tokens a step shows: few while answers form, all of them at the end."""
    progress = step / steps
    if progress < 0.5:
        return 24, 32
    if progress < 0.8:
        return ((24, 32), (40, 60), (VIDEO_TOKENS, AUDIO_TOKENS))[step % 3]
    return ((VIDEO_TOKENS, AUDIO_TOKENS), (32, 50))[step % 2]


def train_answers(work: Path, schedule: Schedule, clips: int) -> list[dict]:
    """Stage two; see `answers.py`."""
    model = start_model()
    load_towers(work, model)
    torch.manual_seed(3)
    seed_matching(model)
    prompt = build_prompt(model)
    data, by_digit = {}, {}
    for name, where, split in (("train", TRAIN_CLIPS, "train"), ("validation", VALIDATION_CLIPS, "held_out")):
        sounds = load_arrays(work / f"sounds-{name}.npz", partial(make_sounds, *where, split))
        make = partial(encode_corpus, model, *where, split, sounds)
        data[name] = load_arrays(work / f"features-{name}.npz", make)
        by_digit[name] = [np.flatnonzero(data[name]["heard"] == digit) for digit in DIGITS]

    def measure(name: str, rng: np.random.Generator, videos: np.ndarray, shown: tuple[int, int]) -> Measured:
        corpus = data[name]
        # Half of the sounds dial the digit seen.
        sounds = np.array(
            [rng.choice(by_digit[name][digit]) if same else rng.integers(len(corpus["heard"]))
             for digit, same in zip(corpus["seen"][videos], rng.random(len(videos)) < 0.5, strict=True)]
        )  # fmt: skip
        answers = [
            {
                "seen": str(corpus["seen"][v]), "heard": str(corpus["heard"][a]),
                "when_seen": SECOND_WORDS[corpus["when_seen"][v]], "when_heard": SECOND_WORDS[corpus["when_heard"][a]],
                "same": "yes" if corpus["seen"][v] == corpus["heard"][a] else "no",
            }
            for v, a in zip(videos, sounds, strict=True)
        ]  # fmt: skip

        def show(kind: str, rows: np.ndarray, count: int) -> tuple[torch.Tensor, np.ndarray]:
            features = torch.from_numpy(corpus[kind][rows]).float()
            return features, draw_shown(rng, corpus[f"{kind}_label"][rows], count)

        video, audio = show("video", videos, shown[0]), show("audio", sounds, shown[1])
        return measure_answers(model, prompt, video, audio, answers, draw_wordings(rng, len(videos)))

    def step_loss(step: int) -> Measured:
        rng = np.random.default_rng([3, step])
        shown = choose_shown(step, schedule.steps)
        # A whole clip costs more: show fewer of them, which keeps steps equally long.
        number = max(6, clips * 170 // (sum(shown) + 114))
        return measure("train", rng, rng.integers(0, len(data["train"]["seen"]), number), shown)

    def validate() -> dict[str, float]:
        with torch.no_grad():
            return measure("validation", np.random.default_rng(4), np.arange(60), (VIDEO_TOKENS, AUDIO_TOKENS))[1]

    modules = {name: list_modules(model)[name] for name in ("decoder", "head")}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    curve = run_stage("answers", modules, parameters, step_loss, validate, schedule, work)
    save_directory(model, work / "model")
    return curve


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for clips, checkpoints and curves")
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only this stage (repeatable)")
    parser.add_argument("--vision-steps", type=int, default=900)
    parser.add_argument("--vision-batch", type=int, default=40)
    parser.add_argument("--audio-steps", type=int, default=120)
    parser.add_argument("--audio-batch", type=int, default=16)
    parser.add_argument("--answers-steps", type=int, default=300)
    parser.add_argument("--answers-clips", type=int, default=16)
    parser.add_argument("--threads", type=read_threads, default=2)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    stages = options.stage or STAGES
    if "vision" in stages:
        train_vision(options.work, Schedule(options.vision_steps, 1.5e-3, 60), options.vision_batch)
    if "audio" in stages:
        train_audio(options.work, Schedule(options.audio_steps, 1.5e-3, 30), options.audio_batch)
    if "answers" in stages:
        schedule = Schedule(options.answers_steps, 1.5e-3, 20, log_every=25, save_every=50)
        train_answers(options.work, schedule, options.answers_clips)


if __name__ == "__main__":
    main()
