"""Prefill on a GPU, whole and pruned: `python -m secateur.tools.bench gpu`.

A decoder of LLaVA-1.5-7B's shape with random weights reads five images, 2,880 visual tokens, and a text bucket of 64;
`fastv` keeps a tenth of them from layer 2 on. The whole bundle and the pruned one run in turn, and beside them the same
decoder in transformers with sdpa. Needs the library of the target, and torch with CUDA for transformers' times; with
`--target onnxruntime --layout small` it runs anywhere: a check, not a measurement.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from secateur.runtime.leftovers import held_directory
from secateur.tools.console import notes, results

DECODERS: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32064,
    },
    "small": {"num_hidden_layers": 4},
}  # fmt: skip
TOWERS: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "small": {"num_hidden_layers": 2},
}
IMAGES, TEXT_TOKENS, NEW_TOKENS, KEEP = 5, 64, 8, 0.1
TARGETS = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "onnxruntime")
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362, "L4": 121, "RTX 4090": 165}
"""TFLOP/s of dense products in half precision that the vendor names, by a part of the GPU's name."""
BARS = {1: 0.8, 4: 0.9}
"""Speed-up over FLOPs cut that is to be reached, by batch."""


def compile_pair(model: Path, work: Path, target: str, dtype: str, batch: int) -> list[Path]:
    """The whole bundle and the pruned one; weights stay where the checkpoint has them."""
    from secateur.compiler.pipeline import Geometry, compile

    geometry = Geometry(images=IMAGES, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS, batch=batch)
    made = []
    for recipe, keep in (("none", None), ("fastv", KEEP)):
        notes.print(f"compiling {recipe} for {target}, batch {batch}")
        out = work / f"{recipe}-{target}-{dtype}-{batch}"
        weights = "stream" if dtype == "fp32" else "reference"
        compile(
            model, out, recipe=recipe, keep=keep, geometry=geometry, target=target, dtype=dtype, weights=weights,
            force=True,
        )  # fmt: skip
        made.append(out)
    return made


def time_pair(bundles: list[Path], turns: int, warmup: int) -> list[dict[str, Any]]:
    """Median seconds of vision, prefill and a decode step of each bundle; they run in turn."""
    from contextlib import ExitStack

    from secateur.runtime.session import Session
    from secateur.tools.measure import make_workload, time_bundles

    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(bundle)) for bundle in bundles]
        found = time_bundles(sessions, [make_workload(s) for s in sessions], repeat=turns, warmup=warmup)
        flops = [{name: p.flops for name, p in s.manifest.programs.items()} for s in sessions]
    return [
        {"flops": cost, **{name: median(one.seconds[name]) for name in ("vision", "prefill", "tpot")}}
        for cost, one in zip(flops, found, strict=True)
    ]


def open_transformers(model: Path, batch: int, tokens: int, device: str, dtype: str) -> Callable[[], float]:
    """The decoder in transformers with sdpa, on as many rows of random numbers, and the head on the last."""
    import torch
    from transformers import LlavaForConditionalGeneration

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(model, dtype=kind, attn_implementation="sdpa")
    loaded = loaded.eval().to(device)
    rows = torch.randn(batch, tokens, loaded.config.text_config.hidden_size, device=device, dtype=kind)

    def run() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = loaded.model.language_model(inputs_embeds=rows, use_cache=True)
            loaded.lm_head(out.last_hidden_state[:, -1]).float().cpu()  # waits for the GPU
        return time.perf_counter() - start

    return run


def time_transformers(model: Path, batch: int, dtype: str, turns: int, warmup: int) -> dict[str, Any]:
    """Median seconds of transformers' prefill; it runs behind the bundles, whose memory it needs."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = IMAGES * 576 + TEXT_TOKENS
    run = open_transformers(model, batch, tokens, device, dtype)
    seconds = [run() for _ in range(warmup + turns)][warmup:]
    del run
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return {"seconds": median(seconds), "device": device, "torch": torch.__version__}


def find_peak(given: float | None) -> tuple[str, float | None]:
    """The GPU's name, and its peak in FLOP/s as given or known; None where it is neither."""
    try:
        from secateur.runtime.backends.cuda import call

        name = call("cudaGetDeviceProperties", 0).name
        shown = name.decode() if isinstance(name, bytes) else str(name)
    except Exception:  # no cuda-python, or no GPU
        shown = "no GPU"
    known = next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", shown)), None)
    peak = given if given is not None else known
    return shown, None if peak is None else 1e12 * peak


def summarize(batch: int, whole: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """Speed-up, FLOPs cut and their ratio for one batch."""
    speed_up, cut = whole["prefill"] / pruned["prefill"], whole["flops"]["prefill"] / pruned["flops"]["prefill"]
    return {"speed_up": speed_up, "cut": cut, "share": speed_up / cut, "bar": BARS.get(batch)}


def draw(report: dict[str, Any]) -> Table:
    """One block of rows for each batch."""
    table = Table("batch", "prefill", "ms", "TFLOP", "of peak", "vision ms", "ms per token", title=report["title"])

    def part(flops: float, seconds: float) -> str:
        return "" if report["peak"] is None else f"{flops / seconds / report['peak']:.0%}"

    for row in report["batches"]:
        for name in ("whole", "pruned"):
            one = row[name]
            flops = one["flops"]["prefill"]
            table.add_row(
                str(row["batch"]) if name == "whole" else "", name, f"{1e3 * one['prefill']:.2f}",
                f"{flops / 1e12:.2f}", part(flops, one["prefill"]), f"{1e3 * one['vision']:.2f}",
                f"{1e3 * one['tpot']:.2f}",
            )  # fmt: skip
        if beside := row["transformers"]:
            flops, seconds = row["whole"]["flops"]["prefill"], beside["seconds"]
            shown = f"transformers, sdpa, whole ({beside['device']})"
            table.add_row("", shown, f"{1e3 * seconds:.2f}", f"{flops / 1e12:.2f}", part(flops, seconds), "", "")
        told = f"{row['speed_up']:.2f}x for {row['cut']:.2f}x fewer FLOPs"
        table.add_row("", told, f"{row['share']:.3f}", "", "" if row["bar"] is None else f"bar {row['bar']}", "", "")
    return table


def run(options: argparse.Namespace) -> None:
    from secateur.tools.bench.random_model import make_random_model

    dtype = options.dtype or ("fp32" if options.target == "onnxruntime" else "bf16")
    stored = "bfloat16" if dtype == "bf16" else "float16"
    model = make_random_model(
        options.work / f"gpu-{options.layout}-{stored}", tower=TOWERS[options.layout],
        decoder=DECODERS[options.layout], dtype=stored,
    )  # fmt: skip
    gpu, peak = find_peak(options.peak_tflops)
    title = f"{options.layout} decoder, random weights, {options.target}, {dtype}, {gpu}"
    report: dict[str, Any] = {
        "title": title, "gpu": gpu, "peak": peak, "target": options.target, "dtype": dtype, "layout": options.layout,
        "turns": options.turns, "batches": [],
    }  # fmt: skip
    for batch in options.batches:
        with held_directory(options.work, "gpu-pair-") as folder:
            bundles = compile_pair(model, Path(folder), options.target, dtype, batch)
            whole, pruned = time_pair(bundles, options.turns, options.warmup)
        gc.collect()
        beside = None
        if not options.without_transformers:
            beside = time_transformers(model, batch, dtype, options.turns, options.warmup)
        report["batches"].append(
            {"batch": batch, "whole": whole, "pruned": pruned, "transformers": beside}
            | summarize(batch, whole, pruned)
        )  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    results.print(draw(report))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench gpu", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default=TARGETS[0], help="%(default)s")
    parser.add_argument("--layout", choices=tuple(DECODERS), default="7b", help="the decoder's shape (%(default)s)")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), help="bf16 if not given; fp32 on the CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="1 4")
    parser.add_argument("--turns", type=int, default=10, help="runs of each (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="runs before them (%(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in half precision, where it is not known")
    parser.add_argument("--without-transformers", action="store_true", help="leave transformers' times out")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where models are kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    from secateur.tools.cli import run_script

    run_script(run, options)


if __name__ == "__main__":
    main()
