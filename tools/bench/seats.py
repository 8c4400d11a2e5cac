"""SEATS on the Qwen2.5-Omni layout: `python -m secateur.tools.bench seats`.

First what the 10 % setting (means of 6 % of what is seen and 35 % of what is heard) does to the FLOPs of the 7B
decoder's prefill, over the length of a clip, the stages' own left out. Then measured time: a decoder of the same depth
and a smaller width with random weights, on ONNX Runtime, whole and pruned in turn, and beside them the same decoder in
transformers with sdpa. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from secateur.compiler.budget import PrefillCost, visual_lengths
from secateur.compiler.inputs import random_rows
from secateur.compiler.pipeline import Budget, Geometry, choose_keep, compile, load_recipe, plan_for, read_source
from secateur.runtime.leftovers import held_directory
from secateur.runtime.session import Session
from secateur.tools.bench.latency import QUIET, describe_machine, saved_share
from secateur.tools.console import notes, results
from secateur.tools.demo.omni.architecture import build_config, save_directory
from secateur.tools.threads import read_threads

PAIR = (0.06, 0.35)
"""The setting the authors label 10 %: means over layers of what is seen and of what is heard."""
CLAIMED = {"flops": 9.3, "time": 4.8}
"""What arXiv 2605.20035 reports of it: prefill FLOPs and prefill time, whole over pruned."""
SIZE, FPS, TEXT_TOKENS = (280, 504), 2.0, 64
SECONDS = (8, 16, 18, 20, 32, 64, 128)
TEXT_7B: dict[str, Any] = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
TEXT_SMALL = TEXT_7B | {
    "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
    "vocab_size": 448, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}  # fmt: skip


def geometry(seconds: int) -> Geometry:
    """A clip with its sound, frames of ``SIZE`` at ``FPS``."""
    return Geometry(image_size=SIZE, frames=int(seconds * FPS), fps=FPS, audio_seconds=seconds, text_tokens=TEXT_TOKENS)


def make_config(text: Mapping[str, Any], small: bool) -> Any:
    """The thinker's configuration, with the demo model's tokens; ``small`` shrinks the towers, which are not
    measured."""
    from transformers import Qwen2_5OmniThinkerConfig

    told = build_config().to_dict()
    width = text["hidden_size"]
    vision: dict[str, Any] = {"out_hidden_size": width}
    audio: dict[str, Any] = {"output_dim": width}
    if small:
        vision |= {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "fullatt_block_indexes": [1]}
        audio |= {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "d_model": 64}
    kept = {key: told["text_config"][key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")}
    return Qwen2_5OmniThinkerConfig(
        **told | {"text_config": {**kept, **text}, "vision_config": vision, "audio_config": audio}
    )


def count_flops(work: Path) -> list[dict[str, Any]]:
    """Tokens and FLOPs of one row's prefill in the 7B decoder, per clip length."""
    folder = work / "omni-7b"
    folder.mkdir(parents=True, exist_ok=True)
    make_config(TEXT_7B, small=False).save_pretrained(folder)
    source, recipe, found = read_source(folder), load_recipe("seats").with_rates(PAIR), []
    for seconds in SECONDS:
        shape = geometry(seconds)
        at = source.at(shape)
        keep = choose_keep(source, shape, recipe, Budget(rates=PAIR))
        seen, heard = at.vision.tokens_per_row, at.audio_tokens
        lengths = visual_lengths(plan_for(source, shape, recipe, keep), seen + heard, at.decoder_layers)
        cost = PrefillCost.of(at.text, TEXT_TOKENS)
        whole, pruned = cost.flops([seen + heard] * at.decoder_layers), cost.flops(lengths)
        found.append(
            {"seconds": seconds, "visual": seen, "audio": heard, "text": TEXT_TOKENS, "lengths": lengths,
             "mean_keep": sum(lengths) / len(lengths) / (seen + heard), "flops": whole, "pruned_flops": pruned,
             "cut": whole / pruned}
        )  # fmt: skip
    return found


def make_model(directory: Path) -> Path:
    """The smaller model with the demo's processor files, written once, seeded; a directory that is there is used."""
    if directory.is_dir():
        return directory
    import torch
    from transformers import AutoModelForMultimodalLM

    directory.parent.mkdir(parents=True, exist_ok=True)
    with held_directory(directory.parent, ".omni-") as work:
        torch.manual_seed(0)
        save_directory(AutoModelForMultimodalLM.from_config(make_config(TEXT_SMALL, small=True)), work)
        os.replace(work, directory)
    return directory


def open_prefill(bundle: Path, threads: int) -> tuple[Any, Callable[[], float]]:
    """The bundle's manifest, and a function that runs its prefill once and returns the seconds it took.

    Frames and sound are noise, encoded once: what is measured is prefill.
    """
    session = Session(bundle, threads=threads)
    manifest, request = session.manifest, session.request()
    (row,) = random_rows(manifest, 1, 1, seed=0)
    ids = np.full((1, manifest.geometry.sequence), manifest.model.pad_token_id)
    # As many words as there is room for: padding is computed as well.
    words = [row.input_ids[0]] * (manifest.geometry.sequence - len(row.input_ids))
    ids[0] = [*words, *row.input_ids]
    lengths = np.array([ids.shape[1]])
    request.encode(row.pixel_values, row.input_features)

    def run() -> float:
        start = time.perf_counter()
        request.prefill(ids, lengths)
        return time.perf_counter() - start

    return manifest, run


def open_transformers(model_dir: Path, tokens: int, threads: int) -> Callable[[], float]:
    """The decoder in transformers with sdpa, on as many rows of random numbers, and the head on the last."""
    import torch
    from transformers import AutoModelForMultimodalLM

    torch.set_num_threads(threads)
    model = AutoModelForMultimodalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = torch.randn(1, tokens, model.config.text_config.hidden_size)
    positions = torch.arange(tokens).expand(3, 1, tokens)

    def run() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.model.language_model(inputs_embeds=rows, position_ids=positions, use_cache=True)
            model.lm_head(out.last_hidden_state[:, -1])
        return time.perf_counter() - start

    return run


def measure(work: Path, seconds: int, threads: int, turns: int) -> dict[str, Any]:
    """Median seconds of the whole prefill, the pruned one and transformers', which run in turn; one turn warms up."""
    model = make_model(work / "omni-small")
    bundles = {"whole": work / "seats-whole", "pruned": work / "seats-pruned"}
    for name, recipe in (("whole", "none"), ("pruned", "seats")):
        notes.print(f"compiling {name}")
        compile(
            model, bundles[name], recipe=recipe, mean_keep=PAIR if recipe == "seats" else None,
            geometry=geometry(seconds), force=True,
        )  # fmt: skip
    opened = {name: open_prefill(path, threads) for name, path in bundles.items()}
    whole, pruned = opened["whole"][0], opened["pruned"][0]
    runs = {name: run for name, (_, run) in opened.items()}
    runs["transformers"] = open_transformers(model, whole.geometry.sequence, threads)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        notes.print(f"turn {turn} of {turns}")
        for name, run in runs.items():
            spent = run()
            if turn:
                taken[name].append(spent)
    times = {name: median(each) for name, each in taken.items()}
    counts = [manifest.programs["prefill"].flops for manifest in (whole, pruned)]
    cut, faster = counts[0] / counts[1], times["whole"] / times["pruned"]
    sizes = whole.geometry
    config = json.loads((model / "config.json").read_text())["text_config"]
    return {
        "seconds": seconds, "visual": sizes.images * sizes.tokens_per_image, "audio": sizes.audio_tokens,
        "text": TEXT_TOKENS, "parameters": count_parameters(config), "turns": turns, "keep": pruned.recipe.keep,
        "segments": [segment.length for segment in pruned.segments], "flops": counts[0], "pruned_flops": counts[1],
        "cut": cut, "times": times, "all_times": taken, "speed_up": faster, "share": faster / cut,
        "saved": saved_share(faster, cut),
    }  # fmt: skip


def count_parameters(text: Mapping[str, Any]) -> int:
    """Of the decoder's linear maps."""
    width, heads, keys = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    size = width // heads
    layer = 2 * width * heads * size + 2 * width * keys * size + 3 * width * text["intermediate_size"]
    return int(text["num_hidden_layers"] * layer)


def draw_counts(found: list[dict[str, Any]]) -> Table:
    title = "Qwen2.5-Omni-7B, SEATS 10 % (video .06, audio .35): FLOPs of the decoder's prefill, one row"
    table = Table(
        "clip", "visual", "audio", "text", "left at layers", "mean keep", "whole", "pruned", "cut", title=title
    )
    for row in found:
        lengths = row["lengths"]
        steps = [n for i, n in enumerate(lengths) if i == 0 or lengths[i - 1] != n]
        table.add_row(
            f"{row['seconds']} s", str(row["visual"]), str(row["audio"]), str(row["text"]),
            " > ".join(map(str, steps)), f"{row['mean_keep']:.4f}", f"{row['flops'] / 1e12:.1f} T",
            f"{row['pruned_flops'] / 1e12:.2f} T", f"{row['cut']:.2f}x",
        )  # fmt: skip
    return table


def draw_times(found: dict[str, Any]) -> Table:
    tokens = f"{found['visual']} visual, {found['audio']} audio, {found['text']} text tokens"
    table = Table("prefill", "seconds", "FLOPs", title=f"Measured: {found['parameters'] / 1e6:.0f} M decoder, {tokens}")
    times = found["times"]
    table.add_row("transformers, sdpa, whole", f"{times['transformers']:.2f}", f"{found['flops'] / 1e12:.2f} T")
    table.add_row("ONNX Runtime, whole", f"{times['whole']:.2f}", f"{found['flops'] / 1e12:.2f} T")
    table.add_row("ONNX Runtime, SEATS", f"{times['pruned']:.2f}", f"{found['pruned_flops'] / 1e12:.3f} T")
    table.add_row("whole over SEATS", f"{found['speed_up']:.2f}x", f"{found['cut']:.2f}x")
    table.add_row("speed-up over FLOPs cut", f"{found['share']:.3f}", "")
    return table


def run(options: argparse.Namespace) -> None:
    load = round(os.getloadavg()[0], 2)
    if load > QUIET:
        notes.print(f"warning: the machine is busy (load {load:.1f}); times will be worse than they need be")
    counts = count_flops(options.work)
    results.print(draw_counts(counts))
    enough = [row["seconds"] for row in counts if row["cut"] >= CLAIMED["flops"]]
    results.print(
        f"Counted: the decoder's prefill alone, both towers left out; the paper reports {CLAIMED['flops']}x fewer "
        f"FLOPs and {CLAIMED['time']}x less time. From {min(enough)} s of clip on the cut is at least that."
    )
    report: dict[str, Any] = {"machine": describe_machine(options.threads), "load": load, "counts": counts}
    if options.turns:
        report["measured"] = measure(options.work, options.seconds, options.threads, options.turns)
        results.print(draw_times(report["measured"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench seats", description=__doc__)
    parser.add_argument("--seconds", type=int, default=24, help="length of the clip that is measured (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each, and one to warm up; 0 only counts")
    parser.add_argument("--threads", type=read_threads, default=2, help="of ONNX Runtime and torch (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where models are kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    from secateur.tools.cli import run_script

    run_script(run, options)


if __name__ == "__main__":
    main()
