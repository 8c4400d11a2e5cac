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
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from secateur.compiler.budget import Budget, PrefillCost, visual_lengths
from secateur.compiler.pipeline import Geometry, choose_keep, load_recipe, plan_for, prune, read_source, trace_model
from secateur.tools.bench.latency import QUIET, describe_machine, saved_share
from secateur.tools.console import notes, quiet_compiler, results, set_up_logging

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
    "vocab_size": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}  # fmt: skip
_MARKS = {
    "vision_start_token_id": 1001, "vision_end_token_id": 1002, "image_token_id": 1003, "video_token_id": 1004,
    "audio_token_id": 1005, "audio_start_token_id": 1006, "audio_end_token_id": 1007, "pad_token_id": 0,
}  # fmt: skip


def geometry(seconds: int) -> Geometry:
    """A clip with its sound, frames of ``SIZE`` at ``FPS``."""
    return Geometry(image_size=SIZE, frames=int(seconds * FPS), fps=FPS, audio_seconds=seconds, text_tokens=TEXT_TOKENS)


def make_config(text: dict[str, Any], small: bool) -> Any:
    """The thinker's configuration; ``small`` shrinks both towers, which are not measured."""
    from transformers import Qwen2_5OmniThinkerConfig

    width = text["hidden_size"]
    vision: dict[str, Any] = {"out_hidden_size": width}
    audio: dict[str, Any] = {"output_dim": width}
    if small:
        vision |= {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "fullatt_block_indexes": [1]}
        audio |= {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "d_model": 64}
    return Qwen2_5OmniThinkerConfig(text_config=text, vision_config=vision, audio_config=audio, **_MARKS)


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
    """The smaller model, written once, seeded, in fp32."""
    if (directory / "model.safetensors").is_file():
        return directory
    import torch
    from transformers import AutoModelForMultimodalLM

    torch.manual_seed(0)
    AutoModelForMultimodalLM.from_config(make_config(TEXT_SMALL, small=True)).save_pretrained(
        directory, max_shard_size="20GB"
    )
    return directory


def open_prefill(
    traced: Any, recipe: Any, keep: float | None, work: Path, threads: int
) -> tuple[Any, Callable[[], float]]:
    """The pruned job, and a function that runs its prefill on ONNX Runtime once and returns the seconds it took.

    Vision and decode are left out: what is measured is prefill, on features drawn at random.
    """
    from dataclasses import replace

    from secateur.compiler.bundle import outline
    from secateur.compiler.inputs import list_placed
    from secateur.compiler.pipeline import export
    from secateur.exporters.checkpoint import Checkpoint
    from secateur.exporters.onnx import save_model
    from secateur.exporters.weights import WEIGHTS_FILE, write_weights
    from secateur.runtime.backends import open_backend
    from secateur.runtime.media import media_positions

    pruned = prune(traced, recipe, keep)
    programs = replace(pruned.programs, programs={"prefill": pruned.programs["prefill"]})
    exported = export(replace(pruned, programs=programs), "onnxruntime")
    work.mkdir(parents=True, exist_ok=True)
    save_model(exported.models["prefill"], work / "prefill.onnx")
    write_weights(exported.layout, Checkpoint(traced.source.path, traced.model), work / WEIGHTS_FILE, lambda *_: None)
    manifest = outline(pruned.job, programs).model_copy(update={"provider": None, "dialect": "onnxruntime"})
    backend = open_backend("onnxruntime", work, manifest, threads=threads)
    (placed,) = list_placed(manifest)
    words = TEXT_TOKENS - sum(token != manifest.model.image_token_id for token in placed)
    row = [5] * (words // 2) + placed + [5] * (words - words // 2)
    ids, lengths = np.array([row]), np.array([len(row)])
    assert manifest.media is not None
    feed = {"input_ids": ids, "lengths": lengths,
            "positions": media_positions(manifest, manifest.media, ids, lengths)[0]}  # fmt: skip
    source = np.random.default_rng(0)
    declared = manifest.programs["prefill"]
    ports = {p.name: backend.buffer(p.shape, p.dtype) for p in declared.inputs}
    for name, buffer in ports.items():
        if name in feed:
            buffer.write(feed[name])
        elif name == "kept":
            buffer.write(np.arange(buffer.shape[1])[None])
        elif not name.startswith("past_"):
            buffer.write(np.abs(source.standard_normal(buffer.shape)).astype(np.float32))
    shared = {p.name: ports.get(p.name.replace("present_", "past_")) for p in declared.outputs}
    outputs = {p.name: shared[p.name] or backend.buffer(p.shape, p.dtype) for p in declared.outputs}
    bound = backend.bind("prefill", ports, outputs)

    def run() -> float:
        start = time.perf_counter()
        bound.run()
        return time.perf_counter() - start

    return pruned, run


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
    from secateur.compiler.flops import count_flops as flops_of

    model = make_model(work / "omni-small")
    shape = geometry(seconds)
    with quiet_compiler():
        source = read_source(model, shape)
        traced = trace_model(source, shape)
        recipe = load_recipe("seats").with_rates(PAIR)
        keep = choose_keep(source, shape, recipe, Budget(rates=PAIR))
        whole, run_whole = open_prefill(traced, load_recipe("none"), None, work / "seats-none", threads)
        pruned, run_pruned = open_prefill(traced, recipe, keep, work / "seats-pruned", threads)
    run_theirs = open_transformers(model, whole.job.sequence, threads)
    taken: dict[str, list[float]] = {"whole": [], "pruned": [], "transformers": []}
    for turn in range(turns + 1):
        notes.print(f"turn {turn} of {turns}")
        for name, run in (("pruned", run_pruned), ("whole", run_whole), ("transformers", run_theirs)):
            spent = run()
            if turn:
                taken[name].append(spent)
    times = {name: median(each) for name, each in taken.items()}
    counts = [flops_of(job.programs["prefill"]) for job in (whole, pruned)]
    cut, faster = counts[0] / counts[1], times["whole"] / times["pruned"]
    decoder = traced.model.get_submodule(source.family.decoder_layers)
    return {
        "seconds": seconds, "visual": source.vision.tokens_per_row, "audio": source.audio_tokens, "text": TEXT_TOKENS,
        "parameters": sum(p.numel() for p in decoder.parameters()), "turns": turns,
        "plan": str(pruned.job.plan), "segments": [s.length for s in pruned.programs.segments],
        "flops": counts[0], "pruned_flops": counts[1], "cut": cut, "times": times, "all_times": taken,
        "speed_up": faster, "share": faster / cut, "saved": saved_share(faster, cut),
    }  # fmt: skip


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
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime and torch (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where models are kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    from secateur.tools.cli import fail

    set_up_logging()
    try:
        run(options)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
